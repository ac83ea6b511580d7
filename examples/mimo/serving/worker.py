"""The loop that works on the model, in one thread, and what others ask of it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from examples.mimo.data.conversation import Sample
from examples.mimo.generation.api import Answerer, share
from examples.mimo.generation.scheduler import Options, Piece

# An idle server speaks to its other ranks so often, lest they take it for dead.
HEARTBEAT_SECONDS = 5.0


class FullError(Exception):
    """More is waiting than the server takes."""


@dataclass(frozen=True)
class _Asked:
    number: int
    sample: Sample
    options: Options


@dataclass(frozen=True)
class _Orders:
    """What every rank does before its next token."""

    start: list[_Asked]
    cancel: list[int]
    stop: bool = False


class Worker:
    """Starts, steps and cancels answers, on all ranks alike.

    `max_batch` answers are worked on at once, `max_waiting` more wait for a place.
    """

    def __init__(self, answerer: Answerer, max_batch: int, max_waiting: int) -> None:
        self.running = answerer.running()
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.numbers = itertools.count()
        self.lock = threading.Condition()
        self.waiting: list[_Asked] = []
        self.cancelled: list[int] = []
        self.hear: dict[int, Callable[[Piece], None]] = {}
        self.ending = False

    @property
    def num_running(self) -> int:
        """How many answers are worked on."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """How many wait for a place."""
        return len(self.waiting)

    def submit(self, sample: Sample, options: Options, hear: Callable[[Piece], None]) -> int:
        """The number of an answer whose pieces `hear` will get, in the worker's thread."""
        with self.lock:
            if len(self.waiting) >= self.max_waiting:
                raise FullError
            number = next(self.numbers)
            self.waiting.append(_Asked(number, sample, options))
            self.hear[number] = hear
            self.lock.notify()
            return number

    def cancel(self, number: int) -> bool:
        """Nobody waits for this answer any more; False when it is done already."""
        with self.lock:
            if self.hear.pop(number, None) is None:
                return False
            left = [asked for asked in self.waiting if asked.number != number]
            if len(left) == len(self.waiting):
                self.cancelled.append(number)
            self.waiting = left
            self.lock.notify()
            return True

    def stop(self) -> None:
        """Let all ranks go."""
        with self.lock:
            self.ending = True
            self.lock.notify()

    def run(self) -> None:
        """Work until `stop`; every rank calls it, and rank 0 gives the orders."""
        while True:
            orders = share(self._orders)
            if orders.stop:
                return
            for number in orders.cancel:
                self.running.cancel(number)
            pieces = []
            if orders.start:
                asked = [(one.number, one.sample, one.options) for one in orders.start]
                pieces = self.running.start(asked)
            for piece in [*pieces, *self.running.step()]:
                self._tell(piece)

    def _orders(self) -> _Orders:
        """On rank 0: what has been asked since the last token; waits while there is no work."""
        with self.lock:
            while not (self.waiting or self.cancelled or self.ending or len(self.running)):
                woken = self.lock.wait(HEARTBEAT_SECONDS)
                if not woken and dist.get_world_size() > 1:
                    break
            room = self.max_batch - len(self.running)
            start, self.waiting = self.waiting[:room], self.waiting[room:]
            cancel, self.cancelled = self.cancelled, []
            return _Orders(start, cancel, self.ending)

    def _tell(self, piece: Piece) -> None:
        with self.lock:
            hear = self.hear.get(piece.number)
            if piece.answer is not None:
                self.hear.pop(piece.number, None)
        if hear:
            hear(piece)
