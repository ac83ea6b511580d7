"""python -m benchmarks.integrity: what checking a checkpoint's files costs, loading and saving.

Each pair of times is measured in turn, so that a busy machine slows both, with the files in the
page cache: a slower disk makes loading longer and the share of the check smaller. Loading is
`load_model`, as every command that answers calls it: it builds the model and reads its weights, and
the files are checked meanwhile, on the cores that building leaves idle.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment()
command.single_process_unless_launched()
compat.install()

from megatron.core import dist_checkpointing

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.checkpoint.integrity import begin_check, finish_check, with_manifest
from examples.mimo.checkpoint.loading import load_model, sharding_metadata
from examples.mimo.configs import get_model_config
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.hf.from_hf import from_hf, initialize_single_process

AIM = 0.05


def configs() -> dict[str, MimoConfig]:
    """`tiny_avlm`, and the same with a language model of a hundred million parameters."""
    tiny = get_model_config("tiny_avlm")
    language = dataclasses.replace(
        tiny.language,
        num_layers=8,
        hidden_size=1024,
        ffn_hidden_size=2816,
        num_attention_heads=8,
        num_query_groups=4,
    )
    return {"tiny": tiny, "large": dataclasses.replace(tiny, language=language)}


def seconds(action: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turn(actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times of each action, taken in turn, after one run that is not counted."""
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(seconds(action))
    return times


def measure_loading(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Loading without the check and with it, and the check by itself."""
    checkpoints = {verify: open_checkpoint(folder, verify=verify) for verify in (False, True)}
    weights = checkpoints[True].weights

    def check() -> None:
        begin_check(weights, "--ckpt")
        finish_check(weights)

    return in_turn(
        {
            "without": lambda: load_model(checkpoints[False]),
            "with": lambda: load_model(open_checkpoint(folder, verify=True)),
            "check": check,
        },
        repeats,
    )


def measure_saving(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Saving the same weights as training does, without the manifest and with it."""
    model = load_model(open_checkpoint(folder, verify=True))

    def save(name: str, verify: bool) -> None:
        target = folder / name
        target.mkdir(exist_ok=True)
        state = {"model": model.sharded_state_dict(metadata=sharding_metadata())}
        with_manifest(dist_checkpointing.save)(state, str(target), verify_integrity=verify)

    return in_turn({"without": lambda: save("a", False), "with": lambda: save("b", True)}, repeats)


@contextmanager
def converted(config: MimoConfig) -> Iterator[Path]:
    """A checkpoint of random weights, as `convert.py from-hf` writes it."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "checkpoint"
        from_hf(config, {}, folder, lambda text: None)
        yield folder


def row(name: str, size: int, times: dict[str, list[float]]) -> str:
    """Medians, the median of the differences in per cent, and its range."""
    base = statistics.median(times["without"])
    extra = [w - o for w, o in zip(times["with"], times["without"], strict=True)]
    low, middle, high = (statistics.quantiles(extra, n=4)[i] / base * 100 for i in range(3))
    cells = [
        name,
        f"{size / 1e6:,.0f} MB",
        f"{base:.3f} s",
        f"{statistics.median(times['with']):.3f} s",
        f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})",
        f"{statistics.median(times['check']):.3f} s" if "check" in times else "",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    with command.stdout_to(os.devnull):
        initialize_single_process(1234)
        for name, config in configs().items():
            with converted(config) as folder:
                weights = open_checkpoint(folder).weights
                size = sum(path.stat().st_size for path in weights.iterdir())
                rows.append(row(f"{name}, loading", size, measure_loading(folder, args.repeats)))
                rows.append(row(f"{name}, saving", size, measure_saving(folder, args.repeats)))
    page = PAGE.format(
        rows="\n".join(rows), repeats=args.repeats, cores=len(os.sched_getaffinity(0)), aim=AIM
    )
    if args.output:
        args.output.write_text(page, encoding="utf-8")
    print(page, file=sys.stderr if args.output else sys.stdout)


PAGE = """# Checking a checkpoint's files

`python -m benchmarks.integrity --output benchmarks/integrity.md` wrote this, on one process with
{cores} CPU cores: seconds to load and to save without the check and with it, medians of {repeats}
taken in turn; the difference in per cent, with its quartiles; and the check by itself.

| checkpoint | size | without | with | difference | check alone |
| --- | ---: | ---: | ---: | ---: | ---: |
{rows}

The files are in the page cache: from a disk, loading takes longer and the check does not read the
bytes a second time. Loading is the building of the model and the reading of its weights; the check
runs meanwhile, in threads on the other cores, and ends before the first weight is read. With cores
that are all busy, as where ranks are as many as cores, its own time comes on top, divided by the
number of ranks. The aim is a difference of less than {aim:.0%} in loading.
"""


if __name__ == "__main__":
    main()
