"""The Python interface: `Mimo` loads a checkpoint and answers prompts about media."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.distributed as dist

from examples.mimo import compat
from examples.mimo.checkpoint.description import Checkpoint, open_checkpoint
from examples.mimo.cli import command
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import ANSWER_ROLES, FindFile, Sample, SampleEncoder
from examples.mimo.data.tokenizer import Tokenizer, load_tokenizer
from examples.mimo.generation.sampling import DEFAULT_OPTIONS, Options, Sampling
from examples.mimo.modalities.files import Blob, Source

if TYPE_CHECKING:
    from examples.mimo.generation.scheduler import Answer, Piece, Scheduler

# Finished sequences that the prefix cache keeps, for prompts that start alike.
PREFIX_CACHE = 4
BATCH_SIZE = 64
# Answers are started in the order of their length, sorted over so many batches.
LOOKAHEAD_BATCHES = 4
Record = Mapping[str, Any]


class Mimo:
    """A model that answers prompts about media.

        model = Mimo.load("demo/checkpoint")
        answer = model.generate("What is it?", images=["digit.png"], audios=["question.wav"])

    Media are named by the model's modalities (`model.config.modalities`). On several ranks every
    rank makes the same calls, and all get the same answers.
    """

    @classmethod
    def load(cls, folder: str | Path, tp: int = 1, pp: int = 1) -> Mimo:
        """Load the checkpoint in `folder`, on tp x pp ranks under torchrun, else on one process.

        On a machine without CUDA this replaces, for the whole process, what Megatron needs of
        torch.cuda (`Tensor.cuda`, `Module.cuda`, tensor factories, streams, random state ...);
        `python -m examples.mimo.compat` lists it all. It must come before the process imports
        Megatron in another way, sets environment variables that torch and Megatron read, and makes
        a process group of one where there is none. ValueError, one line, for a wrong checkpoint.
        """
        command.prepare_environment()
        command.single_process_unless_launched()
        compat.install()
        with command.stdout_to(os.devnull):
            return cls(open_checkpoint(Path(folder)), tp, pp)

    def __init__(
        self,
        checkpoint: Checkpoint,
        tp: int = 1,
        pp: int = 1,
        prefix_cache: int = PREFIX_CACHE,
        cuda_graphs: bool = False,
    ) -> None:
        if cuda_graphs and not torch.cuda.is_available():
            raise ValueError("--cuda-graphs needs a CUDA device, and there is none here")
        # Megatron looks for CUDA when it is imported, so `compat.install` must have run.
        from examples.mimo.checkpoint.loading import load_model
        from examples.mimo.generation.engine import Engine

        self.config: MimoConfig = checkpoint.config
        self.tokenizer = load_tokenizer(checkpoint.tokenizer)
        # Loading is slow and wrong files are common, so the tokenizer is checked first.
        self.sample_encoder()
        self.model = load_model(checkpoint, tp, pp)
        forbidden = forbidden_tokens(self.tokenizer, self.config)
        self.engine = Engine(
            self.model, self.config, self.tokenizer.eos_id, forbidden, prefix_cache, cuda_graphs
        )

    @overload
    def generate(
        self, prompt: str | None = None, *, batch_size: int = BATCH_SIZE, **keywords: Any
    ) -> str: ...

    @overload
    def generate(
        self, prompt: Sequence[str], *, batch_size: int = BATCH_SIZE, **keywords: Any
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        **keywords: Any,
    ) -> str | list[str]:
        """Answer a prompt with a str, or a list of prompts with a list of str.

        `keywords` are the files of each modality, such as `images=["a.png", Path("b.png")]` or
        the bytes of files, and the fields of `Sampling`, `max_new_tokens` and `stop` (a str or a
        list). For a list of prompts the media are a list for each prompt: `images=[["a.png"], []]`.
        Without a prompt the one in the model's config is used. A placeholder such as `<image>` in
        the prompt says where a file goes; else files come before the prompt.
        """
        options, media = self._parse_keywords(keywords)
        if prompt is None or isinstance(prompt, str):
            records = [self._record(prompt, media, "prompt")]
        else:
            for name, lists in media.items():
                if not isinstance(lists, list | tuple) or len(lists) != len(prompt):
                    raise ValueError(
                        f"{name}: {len(prompt)} prompts need {len(prompt)} lists of files, "
                        f"not {lists!r:.60}"
                    )
            records = [
                self._record(text, {name: media[name][n] or [] for name in media}, f"prompt {n}")
                for n, text in enumerate(prompt)
            ]
        samples = on_rank_zero(lambda: [self.encode(record) for record in records])
        texts = [answer.text for answer in self.answer(samples, options, batch_size)]
        return texts[0] if prompt is None or isinstance(prompt, str) else texts

    def stream(self, prompt: str | None = None, **keywords: Any) -> Iterator[str]:
        """Answer one prompt in pieces of text, as they are generated; keywords as `generate`."""
        options, media = self._parse_keywords(keywords)
        record = self._record(prompt, media, "prompt")
        sample = on_rank_zero(lambda: self.encode(record))
        return (piece.text for piece in self.stream_answer(sample, options) if piece.text)

    def sample_encoder(self, blank: Sequence[str] = ()) -> SampleEncoder:
        """What turns records into the model's inputs; `blank` modalities lose their content."""
        seq_length = self.config.language.seq_length
        return SampleEncoder(self.config, self.tokenizer, seq_length, blank=blank)

    def encode(
        self, record: Record, find_file: FindFile = Path, blank: Sequence[str] = ()
    ) -> Sample:
        """Turn a record of the training data's shape into a sample to answer.

        Its `conversations` end with a prompt; files that no turn has a placeholder for come before
        that prompt. Media are file names for `find_file`, paths, or Blobs. ValueError, one line,
        for a wrong record or whatever reading a file raises.
        """
        record = _without_empty_answers(self.with_placeholders(record))
        return self.sample_encoder(blank).encode(record, find_file)

    def with_placeholders(self, record: Record) -> Record:
        """Put a placeholder for every new file in front of a prompt that names none itself."""
        turns = record.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            return record  # which encoding refuses
        texts = [str(turn.get("value", turn.get("content", ""))) for turn in turns]
        modalities = self.config.modalities
        if not texts or any(m.placeholder in texts[-1] for m in modalities.values()):
            return record
        history = "".join(
            text
            for turn, text in zip(turns[:-1], texts, strict=False)
            if turn.get("from", turn.get("role")) not in ANSWER_ROLES
        )
        placeholders = ""
        for name, modality in modalities.items():
            files = record.get(name)
            count = len(files) if isinstance(files, list) else 0
            placeholders += modality.placeholder * (count - history.count(modality.placeholder))
        text_field = "value" if "value" in turns[-1] else "content"
        last = {**turns[-1], text_field: placeholders + texts[-1]}
        return {**record, "conversations": [*turns[:-1], last]} if placeholders else record

    def scheduler(self) -> Scheduler:
        """A scheduler without answers; ValueError while another one is at work."""
        from examples.mimo.generation.scheduler import Scheduler

        if self.engine.sequences:
            raise ValueError("other answers are being generated; close or finish them first")
        return Scheduler(self.engine, self.tokenizer, self.config.language.seq_length)

    def answer(
        self,
        samples: Sequence[Sample],
        options: Options = DEFAULT_OPTIONS,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Answer]:
        """Answers in the samples' order; `progress` is told how many are done."""
        answers: dict[int, Answer] = {}
        for number, answer in self.iter_answers(iter(enumerate(samples)), options, batch_size):
            answers[number] = answer
            progress(len(answers))
        return [answers[number] for number in range(len(samples))]

    def iter_answers(
        self,
        samples: Iterator[tuple[int, Sample]],
        options: Options = DEFAULT_OPTIONS,
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[tuple[int, Answer]]:
        """Answers as they are done, with the numbers that their samples came with.

        At most `batch_size` sequences run at once. They start in the order of their length, over a
        look-ahead of a few batches, so that prompts of one length are prefilled together. Sampled
        answers have the seed plus their number, so they do not depend on the batch size.
        """
        scheduler = self.scheduler()
        waiting: list[tuple[int, Sample]] = []
        try:
            while True:
                while len(waiting) < LOOKAHEAD_BATCHES * batch_size:
                    numbered_sample = next(samples, None)
                    if numbered_sample is None:
                        break
                    waiting.append(numbered_sample)
                pieces: list[Piece] = []
                if waiting and 2 * len(scheduler) <= batch_size:
                    waiting.sort(key=lambda pair: len(pair[1].tokens.ids))
                    free = batch_size - len(scheduler)
                    batch, waiting = waiting[:free], waiting[free:]
                    pieces = scheduler.start(
                        [(n, sample, options.with_seed_offset(n)) for n, sample in batch]
                    )
                elif not len(scheduler):
                    return
                pieces += scheduler.step()
                yield from ((p.number, p.answer) for p in pieces if p.answer is not None)
        finally:
            scheduler.cancel_all()

    def stream_answer(self, sample: Sample, options: Options = DEFAULT_OPTIONS) -> Iterator[Piece]:
        """Pieces of one answer as they are generated; the last one has the whole answer."""
        scheduler = self.scheduler()
        try:
            yield from scheduler.start([(0, sample, options)])
            while len(scheduler):
                yield from scheduler.step()
        finally:
            scheduler.cancel_all()

    def _parse_keywords(self, keywords: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
        """Options and media from `generate`'s keywords; ValueError for a name that is neither."""
        sampling_names = [f.name for f in dataclasses.fields(Sampling)]
        names = [*self.config.modalities, "max_new_tokens", *sampling_names, "stop"]
        for name in keywords:
            if name not in names:
                raise ValueError(
                    f"{name}: neither a modality of {self.config.name} nor a sampling option; "
                    f"choose from {', '.join(names)}"
                )
        stop = keywords.get("stop", ())
        options = Options(
            keywords.get("max_new_tokens", DEFAULT_OPTIONS.max_new_tokens),
            Sampling(**{name: keywords[name] for name in sampling_names if name in keywords}),
            (stop,) if isinstance(stop, str) else tuple(stop),
        )
        return options, {n: keywords[n] for n in self.config.modalities if keywords.get(n)}

    def _record(self, prompt: str | None, media: Mapping[str, Any], key: str) -> Record:
        prompt = self.config.prompt if prompt is None else prompt
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt must be a str, not {prompt!r:.60}")
        sources: dict[str, list[Source]] = {}
        for name, files in media.items():
            if not isinstance(files, list | tuple):
                raise ValueError(f"{name} must be a list of files, not {files!r:.60}")
            sources[name] = [_source(file, f"{name}[{i}]") for i, file in enumerate(files)]
        if not prompt.strip() and not any(sources.values()):
            raise ValueError("nothing to answer: give a prompt or a file")
        return {"key": key, "conversations": [{"role": "user", "content": prompt}], **sources}


def _without_empty_answers(record: Record) -> Record:
    """Drop answers without text from a conversation.

    A model may answer nothing, or be stopped before it does; training data has no such turns, so
    encoding refuses them.
    """
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return record  # which encoding refuses

    def is_empty(turn: Mapping[str, Any]) -> bool:
        is_answer = turn.get("from", turn.get("role")) in ANSWER_ROLES
        return is_answer and not str(turn.get("value", turn.get("content"))).strip()

    return {**record, "conversations": [turn for turn in turns if not is_empty(turn)]}


def _source(file: object, name: str) -> Source:
    if isinstance(file, bytes):
        return Blob(name, file)
    if isinstance(file, str | Path):
        return Path(file)
    if isinstance(file, Blob):
        return file
    raise ValueError(f"{name} must be a path or the bytes of a file, not {file!r:.60}")


def forbidden_tokens(tokenizer: Tokenizer, config: MimoConfig) -> set[int]:
    """Ids that no answer may hold: padding of the vocabulary, placeholders, the padding token.

    Many tokenizers pad with the end-of-text token, which must stay allowed.
    """
    beyond = range(tokenizer.size, config.language.vocab_size)
    placeholders = (modality.token_id for modality in config.modalities.values())
    return {*beyond, *placeholders, tokenizer.pad_id} - {tokenizer.eos_id}


def on_rank_zero[T](function: Callable[[], T]) -> T:
    """Run `function` on rank 0 alone; every rank gets its result, or raises with it.

    A ValueError is one on every rank. Any other error is a RuntimeError that quotes it on the
    others: a rank that was not told would wait for ever, or take the next result for this one.
    """
    if dist.get_world_size() == 1:
        return function()
    result: list[Any] = [None, None, False]
    raised: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result[0] = function()
        except Exception as error:
            raised = error
            is_value_error = isinstance(error, ValueError)
            kind = "" if is_value_error else f"rank 0: {type(error).__name__}: "
            result[1:] = [f"{kind}{error}", is_value_error]
    dist.broadcast_object_list(result, src=0)
    value, message, is_value_error = result
    if raised is not None:
        raise raised
    if message is not None:
        raise (ValueError if is_value_error else RuntimeError)(message)
    return value
