"""Text of tokens as they come: whole characters only, and nothing from a stop string on.

Answers that are being written: tokens of the engine become text, and text becomes answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from examples.mimo.data.conversation import Sample
from examples.mimo.data.tokenizer import Tokenizer
from examples.mimo.generation.engine import LENGTH, STOP, Engine, SequenceRequest, TokenOutput
from examples.mimo.generation.sampling import GREEDY, Sampling

# What a decoder writes for the bytes of a character that is not whole yet.
UNFINISHED = "\ufffd"


class TextStream:
    """The text of one answer; `stops` end it and are not part of it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown now and could not before."""
        self.tokens.append(token)
        whole = self.tokenizer.decode(self.tokens)
        return self._show(self._without_stop(whole), final=self.stopped)

    def _without_stop(self, whole: str) -> str:
        found = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        self.stopped = bool(found)
        return whole[: min(found)] if found else whole

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        return self._show(self._without_stop(self.tokenizer.decode(self.tokens)), final=True)

    def _show(self, text: str, final: bool) -> str:
        if not final:
            text = text.rstrip(UNFINISHED)
            text = text[: len(text) - max((_overlap(text, s) for s in self.stops), default=0)]
        if not text.startswith(self.text):
            # The next token changed what its predecessors spell; wait for the end of it.
            return ""
        new, self.text = text[len(self.text) :], text
        return new


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


MAX_STOPS, MAX_STOP_LENGTH = 16, 200


@dataclass(frozen=True)
class Options:
    """How a prompt is answered; a text of `stops` ends the answer and is not part of it."""

    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    stops: tuple[str, ...] = ()
    logprobs: bool = False
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens!r:.30}: at least 1")
        if len(self.stops) > MAX_STOPS:
            raise ValueError(f"stop holds {len(self.stops)} strings: at most {MAX_STOPS}")
        for stop in self.stops:
            if not 0 < len(stop) <= MAX_STOP_LENGTH:
                raise ValueError(
                    f"stop string of {len(stop)} characters: from 1 to {MAX_STOP_LENGTH}"
                )


DEFAULTS = Options()


@dataclass(frozen=True)
class Answer:
    """What the model said, without the end-of-text token.

    `finish` is "stop" at that token or at a stop string, "length" where the tokens ran out.
    `logprobs` are natural logarithms, of the end-of-text token too; see `Report`.
    """

    text: str
    tokens: list[int]
    finish: str
    logprobs: list[float] | None = None
    prompt_logprobs: list[float | None] | None = None


@dataclass(frozen=True)
class Piece:
    """New text of an answer; `answer` comes with its last piece."""

    number: int
    text: str
    answer: Answer | None = None


@dataclass
class _Writing:
    stream: TextStream
    options: Options
    logprobs: list[float]
    prompt_logprobs: list[float | None] | None = None


class Scheduler:
    """The answers that an engine works on, by the number they were started with."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, seq_length: int) -> None:
        self.engine, self.tokenizer, self.seq_length = engine, tokenizer, seq_length
        self.writing: dict[int, _Writing] = {}

    def __len__(self) -> int:
        return len(self.writing)

    def start(self, asked: Sequence[tuple[int, Sample, Options]]) -> list[Piece]:
        """Begin answers; prompts of one length are worked through together."""
        jobs, pieces = [], []
        for number, sample, options in asked:
            budget = min(options.max_new_tokens, self.seq_length - len(sample.tokens.ids))
            if budget < 1:
                pieces.append(Piece(number, "", Answer("", [], LENGTH)))
                continue
            self.writing[number] = _Writing(TextStream(self.tokenizer, options.stops), options, [])
            wanted = options.logprobs, options.prompt_logprobs
            jobs.append(SequenceRequest(number, sample, budget, options.sampling, *wanted))
        return pieces + self._pieces(self.engine.start(jobs))

    def step(self) -> list[Piece]:
        """One more token of every answer."""
        return self._pieces(self.engine.step())

    def cancel(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        if self.writing.pop(number, None):
            self.engine.stop(number)

    def cancel_all(self) -> None:
        """Leave the engine empty."""
        for number in list(self.writing):
            self.cancel(number)

    def _pieces(self, reports: Sequence[TokenOutput]) -> list[Piece]:
        return [self._piece(report) for report in reports]

    def _piece(self, report: TokenOutput) -> Piece:
        writing = self.writing[report.number]
        stream = writing.stream
        if report.prompt_logprobs is not None:
            writing.prompt_logprobs = report.prompt_logprobs
        if report.logprob is not None:
            writing.logprobs.append(report.logprob)
        text, finish = "", report.finish
        if finish != STOP:
            text = stream.add(report.token)
        if stream.stopped:
            self.engine.stop(report.number)
            finish = STOP
        if finish is None:
            return Piece(report.number, text)
        text += stream.finish()
        del self.writing[report.number]
        logprobs = writing.logprobs if writing.options.logprobs else None
        answer = Answer(stream.text, stream.tokens, finish, logprobs, writing.prompt_logprobs)
        return Piece(report.number, text, answer)
