"""Worker: the thread that runs the model, with a queue of requests from other threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from examples.mimo.data.conversation import Sample
from examples.mimo.generation.api import Mimo, on_rank_zero
from examples.mimo.generation.sampling import Options
from examples.mimo.generation.scheduler import Piece

# An idle server contacts its other ranks this often, or their collective would time out.
HEARTBEAT_SECONDS = 5.0


class QueueFullError(Exception):
    """As many answers are waiting as the server allows."""


@dataclass(frozen=True)
class _QueuedRequest:
    number: int
    sample: Sample
    options: Options


@dataclass(frozen=True)
class _Commands:
    """What every rank does before its next token."""

    start: list[_QueuedRequest]
    cancel: list[int]
    stop: bool = False


class Worker:
    """Starts, steps and cancels answers, on all ranks alike.

    At most `max_batch` answers are generated at once, and `max_waiting` more wait for a slot.
    """

    def __init__(self, model: Mimo, max_batch: int, max_waiting: int) -> None:
        self.scheduler = model.scheduler()
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.numbers = itertools.count()
        # Guards all below, and wakes the worker when one of them changes.
        self.condition = threading.Condition()
        self.waiting: list[_QueuedRequest] = []
        self.cancelled: list[int] = []
        self.callbacks: dict[int, Callable[[Piece], None]] = {}
        self.stopping = False

    @property
    def num_running(self) -> int:
        """The number of answers that are being generated."""
        return len(self.scheduler)

    @property
    def num_waiting(self) -> int:
        """The number of answers that wait for a slot."""
        return len(self.waiting)

    def submit(self, sample: Sample, options: Options, callback: Callable[[Piece], None]) -> int:
        """Queue an answer and return its number.

        `callback` gets its pieces, in the worker's thread. QueueFullError when too many wait.
        """
        with self.condition:
            if len(self.waiting) >= self.max_waiting:
                raise QueueFullError
            number = next(self.numbers)
            self.waiting.append(_QueuedRequest(number, sample, options))
            self.callbacks[number] = callback
            self.condition.notify()
            return number

    def cancel(self, number: int) -> bool:
        """Stop an answer that nobody waits for any more; False when it is finished already."""
        with self.condition:
            if self.callbacks.pop(number, None) is None:
                return False
            still_waiting = [request for request in self.waiting if request.number != number]
            if len(still_waiting) == len(self.waiting):
                self.cancelled.append(number)
            self.waiting = still_waiting
            self.condition.notify()
            return True

    def stop(self) -> None:
        """Make `run` return on all ranks."""
        with self.condition:
            self.stopping = True
            self.condition.notify()

    def run(self) -> None:
        """Generate until `stop`; every rank calls it, and rank 0 sends the commands."""
        while True:
            commands = on_rank_zero(self._next_commands)
            if commands.stop:
                return
            for number in commands.cancel:
                self.scheduler.cancel(number)
            pieces: list[Piece] = []
            if commands.start:
                requests = [(r.number, r.sample, r.options) for r in commands.start]
                pieces = self.scheduler.start(requests)
            for piece in [*pieces, *self.scheduler.step()]:
                self._deliver(piece)

    def _next_commands(self) -> _Commands:
        """On rank 0: what was requested since the last token; waits while there is no work."""
        with self.condition:
            while not (self.waiting or self.cancelled or self.stopping or len(self.scheduler)):
                notified = self.condition.wait(HEARTBEAT_SECONDS)
                if not notified and dist.get_world_size() > 1:
                    break
            free = self.max_batch - len(self.scheduler)
            start, self.waiting = self.waiting[:free], self.waiting[free:]
            cancel, self.cancelled = self.cancelled, []
            return _Commands(start, cancel, self.stopping)

    def _deliver(self, piece: Piece) -> None:
        with self.condition:
            callback = self.callbacks.get(piece.number)
            if piece.answer is not None:
                self.callbacks.pop(piece.number, None)
        if callback:
            callback(piece)
