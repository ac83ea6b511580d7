"""Worker: the thread that runs the model, with a queue of requests from other threads.

An exception in it costs the answers that it may have spoiled, and no others:

- in starting a prompt, that prompt's answer; the others go on;
- in a step, the answer that it also fails for when that is generated alone: each of those that were
  being generated is begun again, one after the other, and what its client has already is not sent
  again;
- in a callback, its own answer;
- logits that are not finite, their own answer;
- a lack of memory, the answer that cannot start beside the others, which go on.

A short probe shows whether the model still computes. If not, `failure` says why, and nothing more
is taken. Several ranks agree about every step, so an error that all ranks meet, or one that
a rank meets outside of a collective, is handled alike everywhere. A rank that fails within a
collective leaves the others waiting in it: nothing can call them back, so after AGREE_SECONDS the
rank ends its process, which ends theirs.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from examples.mimo.cli import command
from examples.mimo.data.conversation import Sample
from examples.mimo.generation.api import Mimo, on_rank_zero
from examples.mimo.generation.sampling import Options
from examples.mimo.generation.scheduler import (
    KeptAnswers,
    Piece,
    cache_tokens,
    cache_too_small,
    count_slots,
)

if TYPE_CHECKING:
    from examples.mimo.serving.media import Budget

# An idle server contacts its other ranks this often, or their collective would time out.
HEARTBEAT_SECONDS = 5.0
# Ranks end a step within milliseconds of one another, unless one of them failed in it.
AGREE_SECONDS = 15.0
MAX_ERROR_LENGTH = 300
HISTOGRAM_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
REPEATED = "repeated"
# What errors begin with that a lack of memory causes, on whichever rank.
NO_MEMORY = "no memory"
log = logging.getLogger(__name__)


class CacheTooSmallError(Exception):
    """An answer may come to need more of the key/value cache than there is."""


class QueueFullError(Exception):
    """As many answers are waiting as the server allows."""


class WorkerFailedError(Exception):
    """The worker cannot answer any more; the message says why."""


@dataclass(frozen=True)
class _QueuedRequest:
    number: int
    sample: Sample
    options: Options
    # The most tokens that it may come to have in the key/value cache.
    num_tokens: int = 0


@dataclass(frozen=True)
class _Commands:
    """What every rank does before its next token."""

    start: list[_QueuedRequest]
    cancel: list[int]
    stop: bool = False


class Worker:
    """Starts, steps and cancels answers, on all ranks alike.

    At most `max_batch` answers are generated at once, fewer where the key/value cache holds no more
    than `cache_tokens`, and `max_waiting` more wait for a slot. `failure` is None, or why the
    worker takes no more requests.
    """

    def __init__(
        self, model: Mimo, max_batch: int, max_waiting: int, cache_tokens: int | None = None
    ) -> None:
        self.scheduler, self.cache_tokens = model.scheduler(), cache_tokens
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.numbers = itertools.count()
        # Ranks agree in a group of their own, whose collectives never meet the model's.
        self.group = None
        if dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=AGREE_SECONDS))
        # Guards all below, and wakes the worker when one of them changes.
        self.condition = threading.Condition()
        self.waiting: list[_QueuedRequest] = []
        self.cancelled: list[int] = []
        self.callbacks: dict[int, Callable[[Piece], None]] = {}
        # Of rank 0: what is being generated, and which of it was in a step that failed. Suspects
        # are generated alone, first to last, before anything else.
        self.generating: dict[int, _QueuedRequest] = {}
        self.suspects: dict[int, _QueuedRequest] = {}
        # The tokens that callbacks have got, and how many of them a suspect has repeated.
        self.sent: dict[int, list[int]] = {}
        self.repeated: dict[int, int] = {}
        self.stopping = False
        self.failure: str | None = None
        # Whether an answer was not finite, which may be its input's fault or the model's.
        self.needs_probe = False

    @property
    def num_running(self) -> int:
        """The number of answers that are being generated."""
        return len(self.scheduler)

    @property
    def num_waiting(self) -> int:
        """The number of answers that wait for a slot."""
        return len(self.waiting) + len(self.suspects.keys() - self.generating.keys())

    @property
    def num_cache_tokens(self) -> int:
        """The tokens that the key/value cache has memory for at the moment."""
        cache = self.scheduler.engine.cache
        return cache.batch_size * cache.length

    def submit(self, sample: Sample, options: Options, callback: Callable[[Piece], None]) -> int:
        """Queue an answer and return its number.

        `callback` gets its pieces, in the worker's thread; the last has an answer or an error.
        QueueFullError when too many wait, CacheTooSmallError when it may never fit,
        WorkerFailedError after a failure.
        """
        num_tokens = 0
        if self.cache_tokens is not None:
            num_tokens = cache_tokens(sample, options, self.scheduler.seq_length)
            if num_tokens > self.cache_tokens:
                raise CacheTooSmallError(cache_too_small(num_tokens, self.cache_tokens))
        with self.condition:
            if self.failure is not None:
                raise WorkerFailedError(self.failure)
            if len(self.waiting) >= self.max_waiting:
                raise QueueFullError
            number = next(self.numbers)
            self.waiting.append(_QueuedRequest(number, sample, options, num_tokens))
            self.callbacks[number] = callback
            self.condition.notify()
            return number

    def cancel(self, number: int) -> bool:
        """Stop an answer that nobody waits for any more; False when it is finished already."""
        with self.condition:
            if self.callbacks.pop(number, None) is None:
                return False
            self._forget(number)
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
        try:
            while not (commands := on_rank_zero(self._next_commands)).stop:
                self._run(commands)
        except BaseException as error:
            self._fail(f"the worker ended: {_in_one_line(error)}")
            raise

    def _run(self, commands: _Commands) -> None:
        """Carry out commands and generate a token of every answer."""
        if self.failure is not None:
            return
        if commands.cancel and (error := self._attempt(lambda: self._cancel(commands.cancel))):
            self._give_up(error)
            return
        if commands.start:
            self._start(commands.start)
        if self.failure is None and (error := self._attempt(self.scheduler.step)):
            self._give_up(error)
        if self.needs_probe and self.failure is None:
            self.needs_probe = False
            if error := self._attempt(self.scheduler.probe):
                self._give_up(error)

    def _cancel(self, numbers: Sequence[int]) -> list[Piece]:
        for number in numbers:
            self.scheduler.cancel(number)
        return []

    def _start(self, requests: Sequence[_QueuedRequest]) -> None:
        prompts = [(request.number, request.sample, request.options) for request in requests]
        numbers = [request.number for request in requests]
        error = self._attempt(lambda: self.scheduler.start(prompts))
        if error is None:
            return
        if len(requests) == 1:
            self._give_up(error, numbers)
            return
        # Which of them is to blame shows when each starts alone.
        if error := self._attempt(lambda: self._abort(numbers)):
            self._give_up(error)
            return
        for request in requests:
            if self.failure is None:
                self._start([request])

    def _attempt(self, function: Callable[[], list[Piece]]) -> str | None:
        """Deliver the pieces that `function` makes; None, or the error of it on any rank."""
        error, pieces = None, []
        try:
            pieces = function()
        except Exception as exception:
            error = _in_one_line(exception)
            # Where the memory ended says nothing about the fault.
            log.error("the model failed: %s", error, exc_info=NO_MEMORY not in error)
        try:
            error = self._first_error(error)
        except RuntimeError as lost:
            raise RuntimeError(f"{error or 'another rank failed'}; {_in_one_line(lost)}") from None
        if error is None:
            for piece in pieces:
                self.needs_probe = self.needs_probe or piece.error is not None
                self._deliver(piece)
        return error

    def _first_error(self, error: str | None) -> str | None:
        """The error of the first rank that has one; RuntimeError unless all ranks ask for it."""
        if self.group is None:
            return error
        failed = torch.tensor(int(error is not None), device="cpu")
        dist.all_reduce(failed, dist.ReduceOp.MAX, self.group)
        if not failed:
            return None
        errors: list[str | None] = [None] * self.group.size()
        named = None if error is None else f"rank {self.group.rank()}: {error}"
        dist.all_gather_object(errors, named, self.group)
        return next(named for named in errors if named is not None)

    def _give_up(self, error: str, numbers: Sequence[int] | None = None) -> None:
        """Drop answers, by default all that are being generated, and see what still works.

        One that was alone gets the error; of several each is tried again.
        """
        were_several = len(self.scheduler) > 1
        problem = self._attempt(lambda: self._recover(numbers, NO_MEMORY in error))
        if problem is not None:
            self._fail(problem if problem == error else f"{error}; then {problem}")
            return
        with self.condition:
            if numbers is None and were_several:
                self.suspects |= self.generating
                self.repeated |= dict.fromkeys(self.generating, 0)
                self.generating.clear()
                return
            numbers = list(self.generating) if numbers is None else numbers
        for number in numbers:
            self._deliver(Piece(number, "", error=error))

    def _abort(self, numbers: Sequence[int] | None) -> list[Piece]:
        """Drop answers, with the memory that they and the error's frames hold."""
        self.scheduler.abort(numbers)
        gc.collect()
        torch.cuda.empty_cache()
        return []

    def _recover(self, numbers: Sequence[int] | None, lacked_memory: bool) -> list[Piece]:
        """Drop answers, and see whether the model still computes.

        Beside others that fill the memory there may be no room to see; their next step shows it.
        """
        self._abort(numbers)
        return [] if lacked_memory and len(self.scheduler) else self.scheduler.probe()

    def _fail(self, reason: str) -> None:
        """Take no more requests, and answer all that are open with an error."""
        with self.condition:
            self.failure = reason
            self.waiting, self.cancelled = [], []
            self.generating, self.suspects = {}, {}
            numbers = list(self.callbacks)
        for number in numbers:
            self._deliver(Piece(number, "", error=reason))

    def _next_commands(self) -> _Commands:
        """On rank 0: what was requested since the last token; waits while there is no work."""
        with self.condition:
            while not (
                self.waiting
                or self.suspects
                or self.cancelled
                or self.stopping
                or self._is_generating
            ):
                notified = self.condition.wait(HEARTBEAT_SECONDS)
                if not notified and dist.get_world_size() > 1:
                    break
            if self.suspects:
                start = [] if self.generating else [next(iter(self.suspects.values()))]
            else:
                free = self._num_that_fit(self.max_batch - len(self.scheduler))
                start, self.waiting = self.waiting[:free], self.waiting[free:]
            self.generating |= {request.number: request for request in start}
            cancel, self.cancelled = self.cancelled, []
            return _Commands(start, cancel, self.stopping)

    def _num_that_fit(self, free: int) -> int:
        """How many of those that wait, at most `free`, fit the key/value cache now.

        Each of its slots has the length of the longest.
        """
        if self.cache_tokens is None:
            return min(free, len(self.waiting))
        longest = max((r.num_tokens for r in self.generating.values()), default=0)
        sizes = [request.num_tokens for request in self.waiting[:free]]
        return count_slots(len(self.generating), longest, sizes, self.cache_tokens)

    @property
    def _is_generating(self) -> bool:
        return self.failure is None and len(self.scheduler) > 0

    def _deliver(self, piece: Piece) -> None:
        with self.condition:
            callback = self.callbacks.get(piece.number)
            if callback is not None and piece.output is not None:
                error = self._check_repetition(piece.number, piece.output.token)
                if error == REPEATED:
                    return
                piece = Piece(piece.number, "", error=error) if error else piece
            if piece.answer is not None or piece.error is not None:
                self.callbacks.pop(piece.number, None)
                self._forget(piece.number)
        if callback is None:
            return
        try:
            callback(piece)
        except Exception as error:
            log.exception("an answer was not taken")
            self.cancel(piece.number)
            with contextlib.suppress(Exception):
                callback(Piece(piece.number, "", error=_in_one_line(error)))

    def _check_repetition(self, number: int, token: int) -> str | None:
        """None for a new token, REPEATED for one that is sent already, or that they differ."""
        sent = self.sent.setdefault(number, [])
        position = self.repeated.get(number, len(sent))
        if position == len(sent):
            self.repeated.pop(number, None)
            sent.append(token)
            return None
        self.repeated[number] = position + 1
        if token == sent[position]:
            return REPEATED
        self.cancelled.append(number)
        return "begun again after an error, the answer differed"

    def _forget(self, number: int) -> None:
        for numbers in (self.generating, self.suspects, self.sent, self.repeated):
            numbers.pop(number, None)


def _in_one_line(error: BaseException) -> str:
    kind = f"{NO_MEMORY}: " if command.is_out_of_memory(error) else ""
    return " ".join(f"{kind}{type(error).__name__}: {error}".split())[:MAX_ERROR_LENGTH]


class Metrics:
    """Prometheus metrics of one server."""

    def __init__(self, worker: Worker, bodies: Budget, decoding: Budget, kept: KeptAnswers) -> None:
        self.start_time = time.time()
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mimo_requests", "Requests by their HTTP status.", ["status"], registry=self.registry
        )
        self.prompt_tokens = Counter(
            "mimo_prompt_tokens", "Tokens of prompts.", registry=self.registry
        )
        self.answer_tokens = Counter(
            "mimo_answer_tokens", "Tokens of answers.", registry=self.registry
        )
        self.cancelled = Counter(
            "mimo_left", "Answers whose client left before their end.", registry=self.registry
        )
        self.failed = Counter(
            "mimo_failed", "Answers that ended in an error of the model.", registry=self.registry
        )
        self.first_token = self._seconds("first_token", "From a request to its first token.")
        self.first_sound = self._seconds("first_sound", "From a request to its first sound.")
        self.whole_answer = self._seconds("answer", "From a request to the end of its answer.")
        running = Gauge("mimo_running", "Answers that are being generated.", registry=self.registry)
        running.set_function(lambda: worker.num_running)
        waiting = Gauge("mimo_waiting", "Answers that wait for a slot.", registry=self.registry)
        waiting.set_function(lambda: worker.num_waiting)
        cached = Gauge(
            "mimo_cache_tokens", "Room in the key/value cache's slots.", registry=self.registry
        )
        cached.set_function(lambda: worker.num_cache_tokens)
        self.connections = Gauge("mimo_connections", "Open connections.", registry=self.registry)
        self.timeouts = Counter(
            "mimo_timeouts", "Connections that were too slow.", ["what"], registry=self.registry
        )
        received = Gauge("mimo_body_bytes", "Bodies that are being read.", registry=self.registry)
        received.set_function(lambda: bodies.used)
        decoded = Gauge(
            "mimo_decoding", "Pixels and samples that are being decoded.", registry=self.registry
        )
        decoded.set_function(lambda: decoding.used)
        answers = Gauge(
            "mimo_kept_bytes", "Answers with sound that may be named.", registry=self.registry
        )
        answers.set_function(lambda: kept.num_bytes)

    def _seconds(self, name: str, what: str) -> Histogram:
        name = f"mimo_{name}_seconds"
        return Histogram(name, what, buckets=HISTOGRAM_SECONDS, registry=self.registry)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
