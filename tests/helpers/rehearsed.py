"""Paths of the package on a rehearsed GPU (rehearsal.py), and where their hosts waited.

One interpreter imports Megatron and forks the ranks of every path.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import rehearsal
from tests.helpers.ranks import free_port

# Two iterations of two micro-batches, then one of four; there are samples for twenty of two.
TRAIN = (
    *("--model-provider", "tiny_avlm", "--dataset-provider", "mock", "--seed", "11"),
    *("--micro-batch-size", "2", "--step-batch-size-schedule", "0:4 1024:8"),
    *("--train-iters", "20", "--exit-interval", "3", "--lr", "1e-3"),
)


@dataclass(frozen=True)
class Rehearsed:
    """A path: flags of `train.py`, or another function of a folder to work in."""

    flags: tuple[str, ...] = ()
    processes: int = 1
    run: Callable[[Path], Any] | None = None


PATHS = {
    "padded": Rehearsed(),
    "packed": Rehearsed(("--pack-sequences", "--bf16")),
    "two layers": Rehearsed(("--num-layers", "2")),
    "packed, two layers": Rehearsed(("--pack-sequences", "--bf16", "--num-layers", "2")),
    "distributed optimizer": Rehearsed(("--bf16", "--use-distributed-optimizer")),
}


def train(flags: Collection[str]) -> None:
    """`train.py` as a user types it."""
    from examples.mimo import train

    sys.argv = ["train.py", *TRAIN, *flags]
    train.main()


def note_parts() -> None:
    """Let the record say in which iteration and which micro-batch of it the host waits."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import training

    record, calls = rehearsal.record, Counter[str]()

    def within(part: str, function: Callable[..., Any]) -> Any:
        """`function` with what follows it, up to the next part of the run."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[part] += 1
            calls["forward"] = calls["backward"] = 0
            record.part = f"{part} {calls[part]}"
            return function(*args, **kwargs)

        return call

    def micro_batch(name: str, function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = record.part
            calls[name] += 1
            record.part = f"{before}, micro-batch {calls[name]}"
            try:
                return function(*args, **kwargs)
            finally:
                record.part = before

        return call

    schedules.forward_step = micro_batch("forward", schedules.forward_step)
    schedules.backward_step = micro_batch("backward", schedules.backward_step)
    training.train_step = within("iteration", training.train_step)
    training.evaluate = within("evaluation", training.evaluate)
    training.save_checkpoint_and_time = within("save", training.save_checkpoint_and_time)


def run_rank(path: Rehearsed, folder: Path, rank: int) -> None:
    """Become a rank of a path; writes `RANK.json` and ends."""
    started = time.process_time()
    os.dup2(os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    error = None
    try:
        if path.run:
            path.run(folder)
        else:
            train(path.flags)
    except SystemExit as end:  # as of --exit-interval
        error = f"ended with status {end.code}" if end.code else None
    except Exception:
        error = traceback.format_exc()
    record = rehearsal.record
    report = {
        "error": error,
        "seconds": time.process_time() - started,
        "waits": [[*key, count] for key, count in record.waits.items()],
        "collectives": [[*key, count] for key, count in record.collectives.items()],
        "num_on_device": record.num_on_device,
    }
    (folder / f"{rank}.json").write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)


def run(name: str, folder: Path) -> list[dict[str, Any]]:
    """What the ranks of a path report; RuntimeError when one of them ended early."""
    path, port = PATHS[name], free_port()
    pids = []
    for rank in range(path.processes):
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)},
                **{"WORLD_SIZE": str(path.processes), "MASTER_ADDR": "127.0.0.1"},
            }
            run_rank(path, folder, rank)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    reports = []
    for rank in range(path.processes):
        file = folder / f"{rank}.json"
        if not file.is_file():
            raise RuntimeError((folder / f"{rank}.txt").read_text())
        reports.append(json.loads(file.read_text()))
    return reports


@dataclass
class Waits:
    """How often a rank waited: inside each micro-batch, and in an iteration besides."""

    micro_batches: dict[str, int]
    iterations: dict[str, int]
    places: Counter[tuple[str, str]]
    places_of_iterations: Counter[tuple[str, str]]


def waits(report: dict[str, Any]) -> Waits:
    """The waits of a training rank after its first iteration, which fills caches."""
    result = Waits(Counter(), Counter(), Counter(), Counter())
    for part, reason, place, count in report["waits"]:
        numbers = re.fullmatch(r"iteration (\d+)(, micro-batch \d+)?", part)
        if numbers is None or numbers[1] == "1":
            continue
        if numbers[2]:
            result.micro_batches[part] += count
            result.places[reason, place] += count
        else:
            result.iterations[part] += count
            result.places_of_iterations[reason, place] += count
    return result


def warm_up() -> None:
    """The rehearsed device, and what a rank imports."""
    rehearsal.install()
    from examples.mimo import compat
    from examples.mimo.cli import command

    command.prepare_environment()
    compat.install()
    import megatron.training.argument_utils  # noqa: F401

    import examples.mimo.cli.observer
    import examples.mimo.compat.megatron
    import examples.mimo.training.pretrain  # noqa: F401

    note_parts()


def main() -> None:
    """Run the paths named on the command line, or all, and print where their hosts waited."""
    os.environ["OMP_NUM_THREADS"] = "1"
    warm_up()
    for name in sys.argv[1:] or PATHS:
        with tempfile.TemporaryDirectory() as folder:
            for rank, report in enumerate(run(name, Path(folder))):
                print(f"\n{name}, rank {rank}: {report['seconds']:.1f} s")
                print(report["error"] or describe(report), flush=True)


def describe(report: dict[str, Any]) -> str:
    """The waits of a rank by place, per micro-batch and per iteration."""
    counted = waits(report)
    count, iterations = len(counted.micro_batches), max(1, len(counted.iterations))
    lines = [f"  most in a micro-batch: {max(counted.micro_batches.values(), default=0)}"]
    for (reason, place), waits_there in counted.places.most_common():
        lines.append(f"    {waits_there / max(1, count):6.2f}  {place}  {reason}")
    lines.append(f"  besides, in an iteration: {sorted(counted.iterations.values())}")
    for (reason, place), waits_there in counted.places_of_iterations.most_common():
        lines.append(f"    {waits_there / iterations:6.2f}  {place}  {reason}")
    return "\n".join(lines)
