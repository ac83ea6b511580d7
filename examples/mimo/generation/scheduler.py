"""Scheduler: the engine's tokens become text, outputs and answers; stop strings and cancelling."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import Sample, TokenSequence
from examples.mimo.data.tokenizer import Tokenizer
from examples.mimo.generation.engine import (
    LENGTH,
    NOT_FINITE,
    STOP,
    Engine,
    SequenceRequest,
    TokenOutput,
)
from examples.mimo.generation.sampling import AnswerState, Options
from examples.mimo.generation.transformer import round_length
from examples.mimo.modalities.base import CodedItem

# What a tokenizer decodes the first bytes of an incomplete character to.
REPLACEMENT_CHARACTER = "\ufffd"
NOT_FINITE_ERROR = (
    "the model's logits are NaN or infinite, so there is no answer; its weights are damaged, or "
    "this input is beyond the range of its precision"
)
# Callers number their answers from 0.
PROBE = -1
# What a part of an answer that is kept takes beside its text and codes.
PART_BYTES = 1_000
# Four bytes are a character, a token each at most; behind more of them nothing will be complete.
MAX_TOKENS_OF_A_CHARACTER = 16


class TextStream:
    """The text of one answer; a string of `stops` ends it and is not part of it.

    The cost of a token does not depend on how many came before: only a window of the last tokens is
    decoded, of which the first ones are context whose text is known.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.tokens: list[int] = []
        self.stopped = False
        self._shown: list[str] = []
        # Decoded text that is not shown yet, as a stop string may begin in it.
        self._held = ""
        # The text of the window's first `_read` tokens is `_known`.
        self._window: list[int] = []
        self._read, self._known = 0, ""

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self._shown)

    def add(self, token: int) -> str:
        """Append a token; returns the text that is certain now and was not before."""
        self.tokens.append(token)
        self._window.append(token)
        self._held += self._decode_window()
        return self._show(final=False)

    def flush(self) -> str:
        """The text that was held, where an output begins: no stop string goes on behind one."""
        return self._show(final=True)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        if self.stopped:
            return ""
        decoded = self.text + self._held
        whole = self.tokenizer.decode(self.tokens)
        if not whole.startswith(decoded):
            # Only behind a long run of broken characters; the window's own rest is close to it.
            decoded, whole = self._known, self.tokenizer.decode(self._window)
        self._held += whole[len(decoded) :]
        return self._show(final=True)

    def _decode_window(self) -> str:
        """The text that the newest tokens add, once their last character is complete."""
        window = self.tokenizer.decode(self._window)
        is_complete = not window.endswith(REPLACEMENT_CHARACTER) and window.startswith(self._known)
        if not is_complete and len(self._window) - self._read < MAX_TOKENS_OF_A_CHARACTER:
            return ""
        new, last = window[len(self._known) :], self._window[self._read :]
        # What came last is the next window's context: a word's space depends on there being one.
        context = self.tokenizer.decode(last)
        is_long = len(self._window) >= MAX_TOKENS_OF_A_CHARACTER
        if context or (new and is_long):
            self._window, self._known = last, context
        elif is_long:  # of control tokens, which have no text and make no context
            del self._window[self._read :]
        else:
            self._known = window
        self._read = len(self._window)
        return new

    def _show(self, final: bool) -> str:
        """Take out of the held text what no stop string can begin in."""
        text = self._held
        ends = [end for stop in self.stops if (end := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            new, self._held = text[: min(ends)], ""
        else:
            held = 0 if final else max((_overlap(text, stop) for stop in self.stops), default=0)
            new, self._held = text[: len(text) - held], text[len(text) - held :]
        if new:
            self._shown.append(new)
        return new


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class OutputPiece(NamedTuple):
    """New codes of an output, in whole units; the last piece of an output may hold none.

    `number` counts the outputs of its modality in the answer, from 0.
    """

    modality: str
    number: int
    codes: tuple[int, ...]
    is_last: bool = False


class OutputStream:
    """The outputs of one answer, in whole units of codes."""

    def __init__(self, state: AnswerState) -> None:
        self.state = state
        self.outputs: dict[str, list[list[int]]] = {}

    def add(self, token: int) -> tuple[bool, OutputPiece | None]:
        """Append a token; returns whether it is text, and the codes that are whole by it."""
        before = self.state.modality
        self.state.add(token)
        modality = before or self.state.modality
        if modality is None:
            return True, None
        if self.state.modality is None:
            return False, self._last(modality)
        unit = self.state.outputs[modality].codec.unit
        codes = self.state.codes
        if not codes or len(codes) % unit:
            return False, None
        outputs = self.outputs.setdefault(modality, [])
        if len(codes) == unit:
            outputs.append([])
        outputs[-1] += codes[-unit:]
        return False, OutputPiece(modality, len(outputs) - 1, tuple(codes[-unit:]))

    def finish(self, codes: OutputPiece | None) -> OutputPiece | None:
        """The last token's `codes`, when no more tokens come; what is no whole unit is lost."""
        if self.state.modality is None:
            return codes
        return codes._replace(is_last=True) if codes else self._last(self.state.modality)

    def _last(self, modality: str) -> OutputPiece | None:
        is_begun = len(self.state.codes) >= self.state.outputs[modality].codec.unit
        if not is_begun:
            return None
        return OutputPiece(modality, len(self.outputs[modality]) - 1, (), is_last=True)


@dataclass(frozen=True)
class Answer:
    """What the model answered, without the end-of-text token: its text, and what else it put out.

    `outputs` are the codes of each output by modality, whole units of them. `tokens` are those of
    both, with the markers of outputs, and of an output that the limit cut also a broken unit.
    `finish` is "stop" at that token or at a stop string, "length" where the tokens ran out.
    `logprobs` are natural logarithms, of the end-of-text token too; see `TokenOutput`. `error` says
    why there is no answer.
    """

    text: str
    tokens: list[int]
    finish: str
    logprobs: list[float] | None = None
    prompt_logprobs: list[float | None] | None = None
    error: str | None = None
    outputs: dict[str, list[list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """New text of answer `number`, or `codes`; the last piece carries the whole `answer`.

    `output` is the token it came with, which both may lag behind. `error` says why there will be no
    answer.
    """

    number: int
    text: str
    answer: Answer | None = None
    output: TokenOutput | None = None
    error: str | None = None
    codes: OutputPiece | None = None


class AnswerParts:
    """The parts of an answer as they are generated; an output is kept as its codes."""

    def __init__(self, config: MimoConfig) -> None:
        self.config = config
        self.parts: list[dict[str, Any]] = []
        self.outputs: list[tuple[str, list[int]]] = []

    def add(self, piece: Piece) -> None:
        """Append new text or new codes."""
        if piece.text:
            if not self.parts or self.parts[-1]["type"] != "text":
                self.parts.append({"type": "text", "text": ""})
            self.parts[-1]["text"] += piece.text
        if piece.codes and piece.codes.codes:
            modality, number = piece.codes.modality, piece.codes.number
            if number == sum(modality == name for name, _ in self.outputs):
                codes: list[int] = []
                singular = self.config.outputs[modality].singular
                item = CodedItem(f"{singular} {number} of an answer", b"", codes)
                self.outputs.append((modality, codes))
                self.parts.append({"type": singular, singular: item})
            self.outputs[-1][1].extend(piece.codes.codes)


class KeptAnswers:
    """Answers that later requests name, by their ids: the text and codes of each.

    For `seconds`, and of all together at most `max_bytes`: beyond that the oldest go.
    """

    def __init__(self, max_bytes: int, seconds: float) -> None:
        self.max_bytes, self.seconds, self.num_bytes = max_bytes, seconds, 0
        self.answers: dict[str, tuple[int, int, list[dict[str, Any]]]] = {}
        # Threads that parse requests look here.
        self.lock = threading.Lock()

    def add(self, name: str, parts: Sequence[Mapping[str, Any]]) -> int:
        """Keep the parts of an answer; returns when they expire, in seconds of the Unix epoch."""
        kept = [{key: _compact(value) for key, value in part.items()} for part in parts]
        size = PART_BYTES + sum(_size(value) for part in kept for value in part.values())
        expires_at = int(time.time() + self.seconds)
        with self.lock:
            self.answers[name] = expires_at, size, kept
            self.num_bytes += size
            while self.answers and (
                self.num_bytes > self.max_bytes or self._oldest_expiry() <= time.time()
            ):
                self.num_bytes -= self.answers.pop(next(iter(self.answers)))[1]
        return expires_at

    def get(self, name: str) -> list[dict[str, Any]] | None:
        """The parts of an answer; None where it is unknown, or kept no longer."""
        with self.lock:
            expires_at, _, parts = self.answers.get(name, (0, 0, []))
        return parts if expires_at > time.time() else None

    def _oldest_expiry(self) -> int:
        return next(iter(self.answers.values()))[0]


def _compact(value: Any) -> Any:
    """A coded item with its codes in four bytes each."""
    if isinstance(value, CodedItem):
        return dataclasses.replace(value, codes=array("I", value.codes))
    return value


def _size(value: Any) -> int:
    if isinstance(value, CodedItem):
        return PART_BYTES + 4 * len(value.codes)
    return 4 * len(value)


@dataclass
class _OpenAnswer:
    """An answer that is being generated."""

    stream: TextStream
    outputs: OutputStream
    options: Options
    # The length of its slot.
    cache_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None


def cache_tokens(sample: Sample, options: Options, seq_length: int) -> int:
    """The tokens of the slot that a prompt and its answer may come to need."""
    return round_length(min(len(sample.tokens.ids) + options.max_new_tokens, seq_length))


def cache_too_small(num_tokens: int, max_tokens: int) -> str:
    """The error of an answer that never fits."""
    return (
        f"the prompt and its answer may take {num_tokens:,} tokens of the key/value cache, but "
        f"{max_tokens:,} fit; ask for a shorter answer"
    )


def count_slots(used: int, longest: int, sizes: Sequence[int], max_tokens: float) -> int:
    """How many slots of `sizes`, from the first, a cache of `max_tokens` holds beside `used` ones.

    Each has the length of the longest, which is `longest` among those that are used.
    """
    for count, size in enumerate(sizes):
        longest = max(longest, size)
        if (used + count + 1) * longest > max_tokens:
            return count
    return len(sizes)


class Scheduler:
    """The answers an engine is generating, by the number they were started with."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, seq_length: int) -> None:
        self.engine, self.tokenizer, self.seq_length = engine, tokenizer, seq_length
        self.open: dict[int, _OpenAnswer] = {}

    def __len__(self) -> int:
        return len(self.open)

    @property
    def max_cache_tokens(self) -> float:
        """The most tokens that all slots of the key/value cache hold together."""
        return self.engine.transformer.max_cache_tokens

    def cache_error(self, sample: Sample, options: Options) -> str | None:
        """Why a prompt and its answer never fit the key/value cache; None if they do."""
        num_tokens = cache_tokens(sample, options, self.seq_length)
        if num_tokens <= self.max_cache_tokens:
            return None
        return cache_too_small(num_tokens, int(self.max_cache_tokens))

    def count_that_fit(self, requests: Sequence[tuple[Sample, Options]]) -> int:
        """How many of `requests`, from the first, fit the cache beside what is being generated."""
        longest = max((answer.cache_tokens for answer in self.open.values()), default=0)
        sizes = [cache_tokens(*request, self.seq_length) for request in requests]
        return count_slots(len(self.open), longest, sizes, self.max_cache_tokens)

    def start(self, requests: Sequence[tuple[int, Sample, Options]]) -> list[Piece]:
        """Prefill prompts; those of one length go through the model together."""
        sequences, pieces = [], []
        for number, sample, options in requests:
            budget = min(options.max_new_tokens, self.seq_length - len(sample.tokens.ids))
            if budget < 1:
                pieces.append(Piece(number, "", Answer("", [], LENGTH)))
                continue
            stream = TextStream(self.tokenizer, options.stops)
            outputs = OutputStream(self.engine.grammar.start(options.outputs))
            size = cache_tokens(sample, options, self.seq_length)
            self.open[number] = _OpenAnswer(stream, outputs, options, size)
            logprobs = options.logprobs, options.prompt_logprobs, options.top_logprobs
            request = SequenceRequest(
                number, sample, budget, options.sampling, *logprobs, options.outputs
            )
            sequences.append(request)
        return pieces + [self._piece(output) for output in self.engine.start(sequences)]

    def step(self) -> list[Piece]:
        """Generate one more token of every answer."""
        return [self._piece(output) for output in self.engine.step()]

    def cancel(self, number: int) -> None:
        """Stop generating an answer, if it is not finished."""
        if self.open.pop(number, None):
            self.engine.stop(number)

    def abort(self, numbers: Collection[int] | None = None) -> None:
        """Give up answers after an error, by default all, with all that it may have spoiled."""
        for number in list(self.open if numbers is None else numbers):
            self.open.pop(number, None)
        self.engine.abort(numbers)

    def probe(self) -> list[Piece]:
        """Generate two tokens of a short prompt, and one of each other answer.

        It raises what keeps the model from computing; the pieces are those of the other answers.
        """
        # An end token is never a placeholder, which would ask for an item.
        end = min(self.tokenizer.end_ids, default=0)
        sample = Sample("probe", TokenSequence([end], [end], [0]), {}, {})
        pieces = self.start([(PROBE, sample, Options(max_new_tokens=2))]) + self.step()
        if error := next((p.error for p in pieces if p.number == PROBE and p.error), None):
            raise RuntimeError(error)
        return [piece for piece in pieces if piece.number != PROBE]

    def cancel_all(self) -> None:
        """Stop all answers and leave the engine empty."""
        for number in list(self.open):
            self.cancel(number)

    def _piece(self, output: TokenOutput) -> Piece:
        if output.finish == NOT_FINITE or not _are_finite(output.prompt_logprobs):
            self.cancel(output.number)
            answer = Answer("", [], NOT_FINITE, error=NOT_FINITE_ERROR)
            return Piece(output.number, "", answer, error=NOT_FINITE_ERROR)
        opened = self.open[output.number]
        stream = opened.stream
        if output.prompt_logprobs is not None:
            opened.prompt_logprobs = output.prompt_logprobs
        if output.logprob is not None:
            opened.logprobs.append(output.logprob)
        text, codes, finish = "", None, output.finish
        if finish != STOP:
            opened.tokens.append(output.token)
            is_text, codes = opened.outputs.add(output.token)
            text = stream.add(output.token) if is_text else stream.flush()
        if stream.stopped:
            self.engine.stop(output.number)
            finish = STOP
        if finish is None:
            return Piece(output.number, text, output=output, codes=codes)
        text += stream.finish()
        del self.open[output.number]
        answer = Answer(
            stream.text,
            opened.tokens,
            finish,
            opened.logprobs if opened.options.logprobs else None,
            opened.prompt_logprobs,
            outputs=opened.outputs.outputs,
        )
        return Piece(output.number, text, answer, output, codes=opened.outputs.finish(codes))


def _are_finite(logprobs: Sequence[float | None] | None) -> bool:
    return all(value is None or math.isfinite(value) for value in logprobs or ())
