"""python -m benchmarks.gpu_check: the `gpu` tests, training and generation on a machine with CUDA.

Trains two models for twenty bf16 iterations on mock data and generates with what was trained.
Tokens per second count real tokens, not padding. Model FLOP utilisation (MFU) is
planner/flops.py's count, frozen parts at what they cost, over the device's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS, WARM_UP = 20, 5
NEW_TOKENS = 128

# Dense bf16 TFLOP/s from the makers' data sheets, by a part of the device's name.
PEAK_TFLOPS = {
    "H200": 989.5,
    "H100 PCIe": 756.0,
    "H100": 989.5,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


@dataclass(frozen=True)
class Case:
    """A model and how it trains; a micro-batch is an iteration."""

    model: str
    micro_batch_size: int
    frozen: tuple[str, ...] = ()


CASES = (
    Case("tiny_avlm", 64),
    Case("scale_1b_avlm", 2),
    Case("scale_1b_avlm", 4, frozen=("images.encoder", "audios.encoder")),
)


def main() -> None:
    """Run all, print the table; status 2 without CUDA, 1 if a part fails."""
    parser = argparse.ArgumentParser(description="What the package does on a CUDA device.")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.generate:
        print(json.dumps(generate(args.generate)))
        return
    if not torch.cuda.is_available():
        print("gpu_check.py: no CUDA device here; run it on a machine with one", file=sys.stderr)
        sys.exit(2)
    device = torch.cuda.get_device_name()
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    if subprocess.run(tests, cwd=ROOT).returncode:
        sys.exit(1)
    table = "\n".join([*HEADING, *(measure(case, device) for case in CASES)])
    text = f"# On {device}\n\n`make gpu-check`, torch {torch.__version__}.\n\n{table}\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


HEADING = (
    "| model | frozen | training tokens/s | TFLOP/s | MFU | peak memory | generated tokens/s "
    "| with CUDA graphs |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def measure(case: Case, device: str) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        iterations = train(case, Path(folder))
        generated = generate_in_new_process(Path(folder) / "checkpoint")
    timed = iterations[WARM_UP:]
    flops = iteration_flops(case, len(iterations))[WARM_UP:]
    seconds = statistics.median(iteration["seconds"] for iteration in timed)
    tokens = statistics.mean(iteration["tokens"] for iteration in timed)
    tflops = statistics.mean(flops) / seconds / 1e12
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in device), None)
    cells = [
        case.model,
        ", ".join(case.frozen) or "-",
        f"{tokens / seconds:,.0f}",
        f"{tflops:.1f}",
        f"{100 * tflops / peak:.1f} %" if peak else "peak unknown",
        f"{max(i['peak_memory_bytes'] or 0 for i in iterations) / 2**30:.1f} GiB",
        f"{generated['tokens_per_second']:,.0f}",
        f"{generated['tokens_per_second_of_graphs']:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def train(case: Case, folder: Path) -> list[dict]:
    """Twenty iterations; what the metrics file says of each. Leaves a checkpoint of the weights."""
    metrics, size = folder / "metrics.jsonl", str(case.micro_batch_size)
    command = [sys.executable, str(ROOT / "examples/mimo/train.py"), "--bf16"]
    command += ["--model-provider", case.model, "--dataset-provider", "mock", "--seed", "1"]
    command += ["--micro-batch-size", size, "--global-batch-size", size]
    command += ["--train-iters", str(ITERATIONS), "--metrics-file", str(metrics)]
    command += ["--save", str(folder / "checkpoint"), "--save-interval", str(ITERATIONS)]
    command += ["--no-save-optim", "--no-save-rng"]
    command += ["--freeze", *case.frozen] if case.frozen else []
    _run(command)
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def iteration_flops(case: Case, iterations: int) -> list[int]:
    """What each iteration of `train` costs, from the batches it drew."""
    from examples.mimo.configs import get_model_config
    from examples.mimo.data.batch import collate
    from examples.mimo.data.datasets import MockDataset
    from tests.helpers.training_flops import training_flops

    config, size = get_model_config(case.model), case.micro_batch_size
    dataset = MockDataset(config, config.language.seq_length, iterations * size, seed=1)
    counted = []
    for iteration in range(iterations):
        batch = collate([dataset[iteration * size + i] for i in range(size)])
        assert batch.input_ids is not None
        media_tokens = {
            name: int((batch.input_ids == modality.token_id).sum())
            for name, modality in config.modalities.items()
        }
        items = {name: len(sources) for name, sources in batch.items.items()}
        counted.append(
            training_flops(
                config, batch.batch_size, batch.seq_length, items, media_tokens, case.frozen
            )
        )
    return counted


def generate_in_new_process(checkpoint: Path) -> dict[str, float]:
    """`generate`, apart: Megatron's state is one a process."""
    done = _run([sys.executable, "-m", "benchmarks.gpu_check", "--generate", str(checkpoint)])
    return json.loads(done.stdout.splitlines()[-1])


def generate(checkpoint: Path, batch_size: int = 8) -> dict[str, float]:
    """Greedy tokens per second over `batch_size` sequences of one mock prompt, after a warm-up.

    With CUDA also those of CUDA graphs.
    """
    from examples.mimo import compat
    from examples.mimo.cli import command

    command.prepare_environment()
    command.single_process_unless_launched()
    compat.install()
    from examples.mimo.checkpoint.description import open_checkpoint
    from examples.mimo.checkpoint.loading import load_model
    from examples.mimo.data.datasets import MockDataset
    from examples.mimo.generation.engine import Engine, SequenceRequest

    with command.stdout_to(os.devnull):
        opened = open_checkpoint(checkpoint)
        model = load_model(opened)
    length = opened.config.language.seq_length // 2
    sample = MockDataset(opened.config, length, 1, seed=3)[0]
    count = min(NEW_TOKENS, opened.config.language.seq_length - len(sample.tokens.ids))
    requests = [SequenceRequest(number, sample, count) for number in range(batch_size)]

    def answer(engine: Engine) -> float:
        _synchronize()
        start = time.perf_counter()
        engine.start(requests)
        while engine.sequences:
            engine.step()
        _synchronize()
        return batch_size * count / (time.perf_counter() - start)

    plain = Engine(model, opened.config, end_ids=())
    answer(plain)
    measured = {"tokens_per_second": answer(plain)}
    if torch.cuda.is_available():
        graphs = Engine(model, opened.config, end_ids=(), cuda_graphs=True)
        answer(graphs)
        measured["tokens_per_second_of_graphs"] = answer(graphs)
    return measured


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _run(command: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done


if __name__ == "__main__":
    main()
