"""One rank reads what is asked; the others follow.

A loaded model that answers requests.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from examples.mimo.checkpoint.description import Checkpoint, open_checkpoint
from examples.mimo.checkpoint.loading import load_model
from examples.mimo.cli import command
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import Sample, SampleEncoder, Turn
from examples.mimo.data.tokenizer import Tokenizer, load_tokenizer
from examples.mimo.generation.engine import Engine
from examples.mimo.generation.sampling import numbered
from examples.mimo.generation.scheduler import DEFAULTS, Answer, Options, Piece, Scheduler
from examples.mimo.modalities.base import Source


def share[T](make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, or its ValueError, on every rank."""
    if dist.get_world_size() == 1:
        return make()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = make()
        except ValueError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    value, message = found
    if message is not None:
        raise ValueError(message)
    return value


# Rows that are kept when they are done, for questions that begin like them.
PREFIXES = 4


@dataclass(frozen=True)
class Request:
    """A prompt and its files: `files[modality]`, in the order of the placeholders.

    `history` are the turns before it; their files come first in `files`.
    """

    prompt: str
    files: Mapping[str, Sequence[Source]] = field(default_factory=dict)
    key: str = "prompt"
    history: tuple[Turn, ...] = ()


class Answerer:
    """Answers requests with the model in a checkpoint; `blank` wipes out modalities' content.

    On several ranks every rank must make the same calls; all get the same answers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tp: int = 1,
        pp: int = 1,
        prefixes: int = PREFIXES,
        graphs: bool = False,
    ) -> None:
        if graphs and not torch.cuda.is_available():
            raise ValueError("--cuda-graphs needs a CUDA device, and there is none here")
        self.config: MimoConfig = checkpoint.config
        self.tokenizer = load_tokenizer(checkpoint.tokenizer)
        # Loading is slow and wrong files are common, so the tokenizer is checked first.
        self.reader()
        self.model = load_model(checkpoint, tp, pp)
        forbidden = forbidden_tokens(self.tokenizer, self.config)
        self.engine = Engine(
            self.model, self.config, self.tokenizer.eos_id, forbidden, prefixes, graphs
        )

    @classmethod
    def open(cls, folder: str | Path, tp: int = 1, pp: int = 1) -> Answerer:
        """The model in `folder`; tp x pp processes under torchrun, else this one alone."""
        command.alone_unless_launched()
        with command.stdout_to(os.devnull):
            return cls(open_checkpoint(Path(folder)), tp, pp)

    def reader(self, blank: Sequence[str] = ()) -> SampleEncoder:
        """What turns files and prompts into the model's inputs."""
        seq_length = self.config.language.seq_length
        return SampleEncoder(self.config, self.tokenizer, seq_length, blank=blank)

    def read(self, request: Request, blank: Sequence[str] = ()) -> Sample:
        """The request as a sample; ValueError for a file or a placeholder that is wrong.

        Files whose placeholder no turn names are put in front of the prompt.
        """
        request = self.with_placeholders(request)
        turns = [*request.history, Turn(is_answer=False, text=request.prompt)]
        files = {name: list(items) for name, items in request.files.items()}
        record = {"conversations": turns, **files}
        return self.reader(blank).encode(record, Path, name=request.key)

    def with_placeholders(self, request: Request) -> Request:
        """The request with a placeholder for every file in front of a prompt that names none."""
        if any(m.placeholder in request.prompt for m in self.config.modalities.values()):
            return request
        return dataclasses.replace(request, prompt=self._placeholders(request) + request.prompt)

    def running(self) -> Scheduler:
        """Nothing yet: answers are started on it. One at a time, so ValueError beside another."""
        if self.engine.rows:
            raise ValueError("other answers are being written; close or finish them first")
        return Scheduler(self.engine, self.tokenizer, self.config.language.seq_length)

    def answer(
        self,
        samples: Sequence[Sample],
        options: Options = DEFAULTS,
        batch_size: int = 64,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Answer]:
        """Answers in the samples' order."""
        found: dict[int, Answer] = {}
        for number, answer in self.answers(iter(enumerate(samples)), options, batch_size):
            found[number] = answer
            progress(len(found))
        return [found[number] for number in range(len(samples))]

    def answers(
        self,
        samples: Iterator[tuple[int, Sample]],
        options: Options = DEFAULTS,
        batch_size: int = 64,
    ) -> Iterator[tuple[int, Answer]]:
        """Answers as they are done, with the numbers their samples came with.

        `batch_size` are worked on at once. They are begun in order of their length, as far as
        four batches are looked ahead, so that prompts of one length go through together.
        """
        running = self.running()
        waiting: list[tuple[int, Sample]] = []
        try:
            while True:
                while len(waiting) < 4 * batch_size and (one := next(samples, None)) is not None:
                    waiting.append(one)
                pieces: list[Piece] = []
                if waiting and 2 * len(running) <= batch_size:
                    waiting.sort(key=lambda pair: len(pair[1].tokens.ids))
                    count = batch_size - len(running)
                    chosen, waiting = waiting[:count], waiting[count:]
                    pieces = running.start([(n, s, _of(options, n)) for n, s in chosen])
                elif not len(running):
                    return
                pieces += running.step()
                yield from ((p.number, p.answer) for p in pieces if p.answer is not None)
        finally:
            running.cancel_all()

    def stream(self, sample: Sample, options: Options = DEFAULTS) -> Iterator[Piece]:
        """The answer as it comes, in whole characters; the last piece has all of it."""
        running = self.running()
        try:
            yield from running.start([(0, sample, options)])
            while len(running):
                yield from running.step()
        finally:
            running.cancel_all()

    def _placeholders(self, request: Request) -> str:
        said = "".join(turn.text for turn in request.history if not turn.is_answer)
        return "".join(
            modality.placeholder
            * (len(request.files.get(name, ())) - said.count(modality.placeholder))
            for name, modality in self.config.modalities.items()
        )


def forbidden_tokens(tokenizer: Tokenizer, config: MimoConfig) -> set[int]:
    """Rows of the table that are no words: beyond the tokenizer's, placeholders, padding.

    Many tokenizers pad with the end-of-text token, which must stay.
    """
    beyond = range(tokenizer.size, config.language.vocab_size)
    placeholders = (modality.token_id for modality in config.modalities.values())
    return {*beyond, *placeholders, tokenizer.pad_id} - {tokenizer.eos_id}


def _of(options: Options, number: int) -> Options:
    """Each answer draws numbers of its own, whatever is answered beside it."""
    if options.sampling.temperature == 0:
        return options
    return dataclasses.replace(options, sampling=numbered(options.sampling, number))
