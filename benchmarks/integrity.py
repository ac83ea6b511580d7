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
from typing import Any, NamedTuple

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment(uses_gpus=False)  # the page compares CPUs
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


class Times(NamedTuple):
    """Seconds that calls took, and those that all threads of the process computed meanwhile."""

    wall: list[float]
    cpu: list[float]


def in_turn(actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Times of each action, taken in turn, after one run that is not counted."""
    for action in actions.values():
        action()
    times = {name: Times([], []) for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            times[name].wall.append(time.perf_counter() - wall)
            times[name].cpu.append(time.process_time() - cpu)
    return times


def measure_loading(folder: Path, repeats: int) -> dict[str, Times]:
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


def measure_saving(folder: Path, repeats: int) -> dict[str, Times]:
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


def row(name: str, size: int, times: dict[str, Times]) -> str:
    """Medians of both kinds of seconds, and the median of their differences in per cent."""
    cells = [name, f"{size / 1e6:,.0f} MB"]
    for kind in Times._fields:
        without, checked = (getattr(times[which], kind) for which in ("without", "with"))
        base = statistics.median(without)
        extra = statistics.median(c - w for c, w in zip(checked, without, strict=True))
        cells += [f"{base:.3f} s", f"{statistics.median(checked):.3f} s", f"{extra / base:+.0%}"]
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
        rows="\n".join(rows),
        repeats=args.repeats,
        cores=len(os.sched_getaffinity(0)),
        load=os.getloadavg()[1],
        nice=os.nice(0),
        aim=AIM,
    )
    if args.output:
        args.output.write_text(page, encoding="utf-8")
    print(page, file=sys.stderr if args.output else sys.stdout)


PAGE = """# Checking a checkpoint's files

`python -m benchmarks.integrity --output benchmarks/integrity.md` wrote this, on one process with
{cores} CPU cores, a load average of {load:.1f} and a niceness of {nice}: seconds to load and to
save without the check and with it, and the CPU seconds of the process meanwhile; medians of
{repeats} taken in turn.

| checkpoint | size | wall: without | with | | CPU: without | with | |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

The files are in the page cache: from a disk, loading takes longer and the check does not read the
bytes a second time. Loading is the building of the model and the reading of its weights; the check
runs meanwhile, in threads on the cores that building leaves idle, and ends before the first weight
is read. The aim is a wall time of less than {aim:.0%} more. It needs a core that is idle while the
model is built; a load average above the number of cores says that there was none, and then the CPU
seconds come on top. Of ranks that hold the same weights each checks a share. Saving waits for the
digests, but not training with --async-save.
"""


if __name__ == "__main__":
    main()
