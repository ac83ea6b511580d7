"""python -m benchmarks.balance: is the split that --balance-stages chooses the fastest?

Trains a model with a heavy picture encoder on two pipeline stages, once with each split of the
language model's layers, and compares the measured time of an iteration with the predicted one.
Pictures of 256 tokens and sequences of up to 1,024 keep a processor busy: where tensors are small,
an operation costs more than its count, and a plan that counts cannot know how much.
Rounds go over all splits in turn, so that a slow moment of the machine meets them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

from tests.helpers import ranks

TRAIN = "examples/mimo/train.py"
NUM_LAYERS, ENCODER_LAYERS = 8, 20
ITERATIONS, WARMUP, ROUNDS = 6, 2, 3
BOUND = 1.05

COMMON = (
    *("--model-provider", "tiny_avlm", "--dataset-provider", "mock", "--seed", "11"),
    *("--pipeline-model-parallel-size", "2", "--num-layers", str(NUM_LAYERS)),
    *("--set", f"images.encoder.num_layers={ENCODER_LAYERS}", "images.encoder.image_size=128"),
    *("--seq-length", "1024", "--micro-batch-size", "2", "--global-batch-size", "16"),
)


def layout_flag(first: int) -> tuple[str, str]:
    """`first` layers on the first stage, the rest on the second."""
    layers = "t" * first, "t" * (NUM_LAYERS - first)
    return "--pipeline-model-parallel-layout", f"E{layers[0]}|{layers[1]}L"


def seconds_per_iteration(first: int, folder: Path) -> list[float]:
    """Iterations of one run, the first ones left out."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    run_flags = ("--train-iters", str(ITERATIONS), "--metrics-file", str(metrics))
    ranks.run(TRAIN, *COMMON, *layout_flag(first), *run_flags, processes=2).check_returncode()
    iterations = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [iteration["seconds"] for iteration in iterations[WARMUP:]]


def plan(*flags: str) -> tuple[int, float]:
    """The layers of the first stage and the bubble that a dry run predicts."""
    done = ranks.run(TRAIN, "--dry-run", "2", *COMMON, *flags)
    done.check_returncode()
    match = re.search(r"layers by stage (\d+), .* bubble of (\d+) %", done.stdout)
    assert match, done.stdout
    return int(match[1]), int(match[2])


def main() -> None:
    """Measure, print and write the table; status 1 when another split is faster by 5 %."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the page is about CPUs
    parser = argparse.ArgumentParser(description="Is the split of --balance-stages the fastest?")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file")
    output = parser.parse_args().output
    chosen, _ = plan("--balance-stages")
    splits = range(NUM_LAYERS + 1)
    bubbles = {first: plan(*layout_flag(first))[1] for first in splits}
    measured: dict[int, list[float]] = {first: [] for first in splits}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for first in splits:
                print(f"  round {number + 1} of {ROUNDS}: {first} layers first", file=sys.stderr)
                measured[first] += seconds_per_iteration(first, Path(folder))
    medians = {first: statistics.median(times) for first, times in measured.items()}
    fastest = min(medians.values())
    rows = [
        "| layers by stage | bubble predicted | time over the fastest's | |",
        "| --- " * 4 + "|",
    ]
    rows += [
        f"| {first}, {NUM_LAYERS - first} | {bubbles[first]} % | {medians[first] / fastest:.3f} | "
        f"{'chosen by --balance-stages' if first == chosen else ''} |"
        for first in splits
    ]
    print("\n".join(rows))
    if output:
        table = "\n".join(rows)
        output.write_text(_PAGE.format(table=table), encoding="utf-8")
    sys.exit(0 if medians[chosen] <= BOUND * fastest else 1)


_PAGE = f"""# The split that --balance-stages chooses

`make balance` wrote this: `tiny_avlm` with a picture encoder of {ENCODER_LAYERS} layers over 256
tokens and a language model of {NUM_LAYERS} layers over sequences of up to 1,024, on two pipeline
stages, two CPU cores. The time is the median of {ROUNDS} x {ITERATIONS - WARMUP} iterations.

{{table}}
"""


if __name__ == "__main__":
    main()
