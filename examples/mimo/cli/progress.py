"""The table of a run on the terminal, and the metrics file: the same numbers for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

# Name and width of each column.
COLUMNS = (
    ("iteration", 15),
    ("loss", 9),
    ("grad norm", 10),
    ("lr", 9),
    ("samples/s", 10),
    ("tokens/s", 9),
    ("padding", 8),
    ("data wait", 10),
    ("left", 9),
)


@dataclass(frozen=True)
class IterationTotals:
    """What one iteration's batches held on all ranks, and how long it took.

    `slots` counts positions with padding, `tokens` those without; `items` counts media files.
    `wait_seconds` is the mean over ranks, and `bad_samples` those that could not be read since
    training began.
    """

    seconds: float
    tokens: int
    slots: int
    wait_seconds: float
    items: dict[str, int]
    bad_samples: int


class ProgressTable:
    """Prints a line every `--log-interval` iterations, and writes each one to `--metrics-file`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.losses: list[float] = []
        self.window: list[IterationTotals] = []
        self.has_heading = False

    def add(
        self,
        iteration: int,
        loss: float | None,
        grad_norm: float | None,
        lr: float | None,
        totals: IterationTotals,
        **metrics: Any,
    ) -> None:
        """Take in one iteration; `metrics` go to the file only. No loss: the update was skipped."""
        self.window.append(totals)
        if loss is not None:
            self.losses.append(loss)
        self.append_metrics(
            {
                "iteration": iteration,
                "loss": self.losses[-1] if self.losses else None,
                "grad_norm": grad_norm,
                "learning_rate": lr,
                **dataclasses.asdict(totals),
                **metrics,
            }
        )
        if iteration % self.args.log_interval and iteration != self.args.train_iters:
            return
        if not self.has_heading:
            self.has_heading = True
            self._print_row([name for name, _ in COLUMNS])
        self._print_row(self._cells(iteration, grad_norm, lr))
        self.losses.clear()
        self.window.clear()

    def append_metrics(self, record: dict[str, Any]) -> None:
        """A line of JSON in `--metrics-file`, if there is one."""
        if self.args.metrics_file:
            with open(self.args.metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _cells(self, iteration: int, grad_norm: float | None, lr: float | None) -> list[str]:
        """Means over the iterations since the last line; gradient norm and lr of the last one."""
        seconds = max(sum(totals.seconds for totals in self.window), 1e-9)
        tokens = sum(totals.tokens for totals in self.window)
        slots = sum(totals.slots for totals in self.window)
        waited = sum(totals.wait_seconds for totals in self.window)
        left = (self.args.train_iters - iteration) * seconds / len(self.window)
        return [
            f"{iteration}/{self.args.train_iters}",
            f"{sum(self.losses) / max(len(self.losses), 1):.4f}",
            "-" if grad_norm is None else f"{grad_norm:.3f}",
            "-" if lr is None else f"{lr:.2e}",
            f"{len(self.window) * self.args.global_batch_size / seconds:.1f}",
            f"{tokens / seconds:.0f}",
            f"{100 * (1 - tokens / slots) if slots else 0:.0f} %",
            f"{100 * waited / seconds:.0f} %",
            f"{int(left // 60)}:{int(left % 60):02d} min",
        ]

    def _print_row(self, cells: list[str]) -> None:
        padded = (f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))
        print(" ".join(padded), file=sys.stderr, flush=True)
