"""Kill tables: runs that are killed and started again, beside one that is not.

`python -m tests.helpers.kills DATA` prints them as Markdown; DATA is a folder of spoken questions.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import ranks
from tests.helpers.commands import PP2, TP2

DISTRIBUTED = ("--use-distributed-optimizer",)
# Another tensor- and pipeline-parallel size for each restart, with its processes.
LAYOUTS = (
    (1, ()),
    (2, TP2),
    (2, PP2),
    (4, (*TP2, *PP2)),
    (2, (*TP2, "--sequence-parallel")),
)
TRACKER = "latest_checkpointed_iteration.txt"
# What a checkpoint has when a kill is aimed at it, from its first file to its last.
STAGES = ("iter_*", "iter_*/*.distcp", "iter_*/.metadata", "iter_*/metadata.json")


@dataclass(frozen=True)
class KillTable:
    """`kills` of runs that were to compute `iterations`, and how the rest of them went on.

    `exact` counts restarts whose samples and losses are those of the uninterrupted run, within
    `bound`; `largest` is the largest relative difference of a loss.
    """

    name: str
    kills: int
    exact: int
    iterations: int
    recomputed: int
    bound: float
    largest: float

    def row(self) -> str:
        """As a line of the Markdown table."""
        return (
            f"| {self.name} | {self.kills} | {self.exact} | {self.iterations} | {self.recomputed} "
            f"| {self.largest:.1e} |"
        )


HEADING = (
    "| kills | tries | exact restarts | iterations | computed twice | largest difference of a loss "
    "|\n| --- | --- | --- | --- | --- | --- |"
)


class KilledRun:
    """One training in `work` that is started until it is finished."""

    def __init__(self, data: Path, work: Path, iterations: int, every: int) -> None:
        self.work, self.iterations = work, iterations
        self.checkpoint, self.metrics = work / "checkpoint", work / "metrics.jsonl"
        self.flags = (
            *("--dataset-provider", "spoken_questions", "--data-path", str(data), "--augment"),
            *("--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-4"),
            *("--num-layers", "2", "--train-iters", str(iterations)),
            *("--save-interval", str(every), "--save", str(self.checkpoint)),
            *("--load", str(self.checkpoint), "--metrics-file", str(self.metrics)),
        )

    def start(
        self,
        processes: int,
        flags: tuple[str, ...],
        kill_when: Callable[[], Collection[int]] = tuple,
        exit_early: int = 0,
    ) -> None:
        """Train from the last checkpoint on, to the end or until `kill_when` says whom to kill."""
        if exit_early:
            flags = (*flags, "--exit-interval", str(exit_early))
        done = ranks.run(
            "examples/mimo/train.py", *self.flags, *flags, processes=processes, kill_when=kill_when
        )
        killed = kill_when is not tuple
        assert (done.returncode != 0) == killed, done.stderr
        assert "Traceback" not in done.stderr, done.stderr

    def rows(self) -> list[dict[str, Any]]:
        """What all starts said of their iterations, in the order of time."""
        text = self.metrics.read_text() if self.metrics.exists() else ""
        # A kill may leave part of a line behind, which the next start ends.
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def saved(self) -> int:
        """The iteration of the last checkpoint."""
        tracker = self.checkpoint / TRACKER
        return int(tracker.read_text()) if tracker.exists() else 0


def kill_at_random(
    run: KilledRun, moments: random.Random, processes: int, most: int
) -> Callable[[], Collection[int]]:
    """Kills one rank or all after a few iterations, at any moment."""
    begun = len(run.rows())
    count = begun + moments.randint(1, most)
    victims = moments.choice([range(processes), [moments.randrange(processes)]])
    delay = moments.uniform(0, 0.3)
    due: list[float] = []

    def kill_when() -> Collection[int]:
        if not due and run.metrics.exists() and run.metrics.read_text().count("\n") >= count:
            due.append(time.monotonic() + delay)
        return victims if due and time.monotonic() >= due[0] else ()

    return kill_when


def kill_in_save(run: KilledRun, stage: str, processes: int) -> Callable[[], Collection[int]]:
    """Kills all ranks when a checkpoint has what `stage` says and the tracker names another."""
    known = set(run.checkpoint.glob(stage))
    saves = {path.stat().st_mtime_ns for path in known}

    def kill_when() -> Collection[int]:
        for path in run.checkpoint.glob(stage):
            try:
                is_new = path not in known or path.stat().st_mtime_ns not in saves
            except FileNotFoundError:
                continue
            if is_new:
                return range(processes)
        return ()

    return kill_when


def compare(
    name: str,
    kills: int,
    run: KilledRun,
    starts: list[int],
    whole: list[dict[str, Any]],
    bound: float,
) -> KillTable:
    """The table's row: every iteration of every start, beside the uninterrupted run."""
    expected = {row["iteration"]: row for row in whole}
    rows = run.rows()
    bounds = [*starts[1:], len(rows)]
    exact, largest = 0, 0.0
    for first, last in zip(starts, bounds, strict=True):
        good = True
        for row in rows[first:last]:
            other = expected[row["iteration"]]
            difference = abs(row["loss"] - other["loss"]) / other["loss"]
            largest = max(largest, difference)
            good &= row["keys"] == other["keys"] and difference <= bound
        exact += good
    assert sorted({row["iteration"] for row in rows}) == sorted(expected)
    # The first start is no restart.
    twice = len(rows) - len(expected)
    return KillTable(name, kills, exact - 1, len(expected), twice, bound, largest)


def uninterrupted(data: Path, work: Path, iterations: int, every: int, *layout: Any) -> list[dict]:
    """The rows of a run that nobody kills."""
    run = KilledRun(data, work, iterations, every)
    run.start(*layout)
    return run.rows()


def random_kills(data: Path, work: Path, kills: int = 20, seed: int = 0) -> KillTable:
    """SIGKILL to one rank or all, at any moment, with a checkpoint every three iterations."""
    layout, every = (2, TP2), 3
    iterations = 6 * kills
    whole = uninterrupted(data, work / "whole", iterations, every, *layout)
    run, moments = KilledRun(data, work / "killed", iterations, every), random.Random(seed)
    starts = []
    for _ in range(kills):
        starts.append(len(run.rows()))
        run.start(*layout, kill_at_random(run, moments, 2, most=6))
    starts.append(len(run.rows()))
    run.start(*layout)
    return compare("at random, TP 2", kills, run, starts, whole, 0.0)


def kills_in_saves(data: Path, work: Path, kills: int = 10) -> KillTable:
    """SIGKILL to all ranks between the first file of a checkpoint and the tracker."""
    layout, every = (2, DISTRIBUTED), 2
    iterations = 4 * kills
    whole = uninterrupted(data, work / "whole", iterations, every, *layout)
    run = KilledRun(data, work / "killed", iterations, every)
    starts, hits, tries = [], 0, 0
    while hits < kills:
        starts.append(len(run.rows()))
        # The first checkpoint of a start is saved, the next is hit.
        run.start(*layout, kill_in_save(run, STAGES[tries % len(STAGES)], 2))
        tries += 1
        newest = max(int(path.name[5:]) for path in run.checkpoint.glob("iter_*"))
        hits += newest > run.saved()
        assert tries < 3 * kills, "the kills come too late"
    starts.append(len(run.rows()))
    run.start(*layout)
    return compare("in a save, DP 2", hits, run, starts, whole, 0.0)


def kills_and_layouts(data: Path, work: Path, kills: int = 10, seed: int = 1) -> KillTable:
    """SIGKILL at any moment, and each restart at another tensor- and pipeline-parallel size."""
    every = 2
    iterations = 4 * kills
    whole = uninterrupted(data, work / "whole", iterations, every, *LAYOUTS[0])
    run, moments = KilledRun(data, work / "killed", iterations, every), random.Random(seed)
    # Random weights are other ones on other stages, so the first start saves once.
    run.start(*LAYOUTS[0], exit_early=every)
    starts = []
    for number in range(kills + 1):
        starts.append(len(run.rows()))
        processes, flags = LAYOUTS[(number + 1) % len(LAYOUTS)]
        if number == kills:
            run.start(processes, flags)
        else:
            run.start(processes, flags, kill_at_random(run, moments, processes, most=3))
    return compare("at random, each restart at another TP x PP", kills, run, starts, whole, 1e-6)


TABLES = (random_kills, kills_in_saves, kills_and_layouts)


def main() -> None:
    """Print the tables."""
    print(HEADING)
    for table in TABLES:
        with tempfile.TemporaryDirectory() as work:
            for folder in ("whole", "killed"):
                Path(work, folder).mkdir()
            print(table(Path(sys.argv[1]), Path(work)).row(), flush=True)


if __name__ == "__main__":
    main()
