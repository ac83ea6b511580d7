"""Progress of many answers."""

from __future__ import annotations

import os
import sys
import time

EVERY_SECONDS = 5.0


class Clock:
    """Says on stderr how many of `total` are done and how long the rest takes."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.started = self.spoken = time.perf_counter()

    def __call__(self, done: int) -> None:
        """`done` of them are done."""
        now = time.perf_counter()
        if now - self.spoken > EVERY_SECONDS and done < self.total and os.environ["RANK"] == "0":
            self.spoken = now
            left = (now - self.started) / done * (self.total - done)
            print(f"  {self.title}: {done} of {self.total}, {left:.0f} s left", file=sys.stderr)
