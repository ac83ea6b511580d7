"""The Python interface: `Mimo` loads a checkpoint and answers prompts about media."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.distributed as dist

from examples.mimo import compat
from examples.mimo.checkpoint.description import Checkpoint, open_checkpoint
from examples.mimo.cli import command
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import Sample, SampleEncoder
from examples.mimo.data.tokenizer import load_tokenizer
from examples.mimo.data.turns import FindFile, prompt_content
from examples.mimo.generation.sampling import (
    DEFAULT_OPTIONS,
    Options,
    Sampling,
    check_outputs,
    forbidden_tokens,
)
from examples.mimo.modalities.files import Blob, Source

if TYPE_CHECKING:
    from examples.mimo.generation.scheduler import Answer, Piece, Scheduler

# Finished sequences that the prefix cache keeps, for prompts that start alike.
PREFIX_CACHE = 4
BATCH_SIZE = 64
# Answers are started in the order of their length, sorted over so many batches.
LOOKAHEAD_BATCHES = 4
Record = Mapping[str, Any]
# A text, or a list of parts as in `data/turns.py`.
Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Generated:
    """The text of an answer, and the decoded items of its outputs: `answer.speech` is a list."""

    text: str
    outputs: dict[str, list[Any]]

    def __getattr__(self, name: str) -> list[Any]:
        """The items of a modality that was asked for."""
        outputs = vars(self).get("outputs", {})
        if name not in outputs:
            raise AttributeError(f"no output {name!r}: {', '.join(outputs) or 'text alone'}")
        return outputs[name]


class Mimo:
    """A model that answers prompts about media.

        model = Mimo.load("demo/checkpoint")
        answer = model.generate("What is it?", images=["digit.png"], audios=["question.wav"])

    Media are named by the model's modalities (`model.config.inputs`), and so are the outputs that
    one may ask for (`model.config.outputs`). On several ranks every rank makes the same calls, and
    all get the same answers.
    """

    @classmethod
    def load(
        cls, folder: str | Path, tp: int = 1, pp: int = 1, verify_integrity: bool = True
    ) -> Mimo:
        """Load the checkpoint in `folder`, on tp x pp ranks under torchrun, else on one process.

        With `verify_integrity` its files are compared with the digests of what was saved.

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
            return cls(open_checkpoint(Path(folder), verify=verify_integrity), tp, pp)

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
            self.model, self.config, self.tokenizer.end_ids, forbidden, prefix_cache, cuda_graphs
        )
        self.limit_cache()

    @overload
    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        outputs: None = None,
        **keywords: Any,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        *,
        batch_size: int = BATCH_SIZE,
        outputs: None = None,
        **keywords: Any,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        outputs: Sequence[str],
        **keywords: Any,
    ) -> Generated: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        *,
        batch_size: int = BATCH_SIZE,
        outputs: Sequence[str],
        **keywords: Any,
    ) -> list[Generated]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        outputs: Sequence[str] | None = None,
        **keywords: Any,
    ) -> str | Generated | list[str] | list[Generated]:
        """Answer a prompt with a str, or a list of prompts with a list of str.

        With `outputs`, such as `outputs=["speech"]`, an answer is a `Generated` with text and
        decoded items; without, it is text alone, and ends where the model would put out more.
        `keywords` are the files of each modality, such as `images=["a.png", Path("b.png")]` or
        the bytes of files, and the fields of `Sampling`, `max_new_tokens` and `stop` (a str or a
        list). For a list of prompts the media are a list for each prompt: `images=[["a.png"], []]`.
        Without a prompt the one in the model's config is used. Files come before the prompt, or
        where it has placeholders such as `<image>`. Without files those are words, and they always
        are in a list of parts, which a prompt may be as well: `[{"type": "image"}, {"type": "text",
        "text": "What does <image> mean?"}]`.
        """
        options, media = self._parse_keywords(keywords, outputs or ())
        is_single = prompt is None or isinstance(prompt, str) or _is_parts(prompt)
        if is_single:
            records = [self._record(prompt, media, "prompt")]
        else:
            assert prompt is not None
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
        answers = self.answer(samples, options, batch_size)
        if outputs is None:
            texts = [answer.text for answer in answers]
            return texts[0] if is_single else texts
        generated = on_rank_zero(lambda: [self._decode(a, outputs) for a in answers])
        return generated[0] if is_single else generated

    def stream(self, prompt: Prompt | None = None, **keywords: Any) -> Iterator[str]:
        """Answer one prompt in pieces of text, as they are generated; keywords as `generate`.

        `stream_answer` gives the codes of outputs too.
        """
        options, media = self._parse_keywords(keywords, outputs=())
        record = self._record(prompt, media, "prompt")
        sample = on_rank_zero(lambda: self.encode(record))
        return (piece.text for piece in self.stream_answer(sample, options) if piece.text)

    def limit_cache(self, max_bytes: int | None = None) -> int:
        """Bound the key/value cache; returns how many tokens its slots hold, alike on all ranks.

        By default, as after loading, it takes half of the memory that is free. A quarter of it, or
        less, is for the prefix cache; of the rest half is kept for copying the slots when they
        grow.
        """
        from examples.mimo.generation.transformer import LENGTH_STEP

        transformer, prefixes = self.engine.transformer, self.engine.prefix_cache.size
        max_bytes = free_bytes(transformer.device) // 2 if max_bytes is None else max_bytes
        most = torch.tensor(max_bytes // transformer.bytes_per_token, device=transformer.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(most, dist.ReduceOp.MIN)
        total = int(most)
        share = min(prefixes * self.config.language.seq_length, total // 4)
        self.engine.max_prefix_tokens = share // max(prefixes, 1)
        tokens = (total - share) // 2 // LENGTH_STEP * LENGTH_STEP
        if not tokens:
            raise ValueError(
                f"the key/value cache has room for {(total - share) // 2:,} tokens, in "
                f"{max_bytes:,} bytes, but at least {LENGTH_STEP} are needed; give it more memory, "
                "or split the model with --tp and --pp"
            )
        transformer.max_cache_tokens = tokens
        self.engine.cache = transformer.new_cache()
        return tokens

    def sample_encoder(self, blank: Sequence[str] = ()) -> SampleEncoder:
        """What turns records into the model's inputs; `blank` modalities lose their content."""
        seq_length = self.config.language.seq_length
        return SampleEncoder(self.config, self.tokenizer, seq_length, blank=blank, answered=True)

    def encode(
        self, record: Record, find_file: FindFile = Path, blank: Sequence[str] = ()
    ) -> Sample:
        """Turn a record of the training data's shape into a sample to answer.

        Its `conversations` end with a prompt; files that no turn has a place for come before that
        prompt. Media are file names for `find_file`, paths, or Blobs. ValueError, one line, for a
        wrong record or whatever reading a file raises.
        """
        return self.sample_encoder(blank).encode(record, find_file)

    def scheduler(self, options: Options = DEFAULT_OPTIONS) -> Scheduler:
        """A scheduler without answers; ValueError while another one is at work.

        ValueError too if `options` ask for an output that the model lacks.
        """
        from examples.mimo.generation.scheduler import Scheduler

        check_outputs(options.outputs or (), self.config)
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
        """Answers in the samples' order; `progress` is told how many are done.

        ValueError for the first that has an error instead.
        """
        answers: dict[int, Answer] = {}
        for number, answer in self.iter_answers(iter(enumerate(samples)), options, batch_size):
            if answer.error is not None:
                raise ValueError(f"sample {samples[number].key}: {answer.error}")
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

        At most `batch_size` sequences run at once, fewer where the key/value cache holds no more;
        a sample that never fits it is answered with an error. They start in the order of their
        length, over a look-ahead of a few batches, so that prompts of one length are prefilled
        together. Sampled answers have the seed plus their number, so they do not depend on the
        batch size.
        """
        from examples.mimo.generation.engine import LENGTH
        from examples.mimo.generation.scheduler import Answer

        scheduler = self.scheduler(options)
        waiting: list[tuple[int, Sample]] = []
        try:
            while True:
                while len(waiting) < LOOKAHEAD_BATCHES * batch_size:
                    numbered_sample = next(samples, None)
                    if numbered_sample is None:
                        break
                    if error := scheduler.cache_error(numbered_sample[1], options):
                        yield numbered_sample[0], Answer("", [], LENGTH, error=error)
                    else:
                        waiting.append(numbered_sample)
                pieces: list[Piece] = []
                free = 0
                if waiting and 2 * len(scheduler) <= batch_size:
                    waiting.sort(key=lambda pair: len(pair[1].tokens.ids))
                    first = waiting[: batch_size - len(scheduler)]
                    free = scheduler.count_that_fit([(sample, options) for _, sample in first])
                if free:
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
        """Pieces of one answer as they are generated; the last one has the whole answer.

        ValueError when the model cannot go on, or the key/value cache is too small.
        """
        scheduler = self.scheduler(options)
        if error := scheduler.cache_error(sample, options):
            raise ValueError(f"sample {sample.key}: {error}")
        try:
            pieces = scheduler.start([(0, sample, options)])
            while pieces:
                for piece in pieces:
                    if piece.error is not None:
                        raise ValueError(f"sample {sample.key}: {piece.error}")
                    yield piece
                pieces = scheduler.step()
        finally:
            scheduler.cancel_all()

    def _decode(self, answer: Answer, outputs: Sequence[str]) -> Generated:
        codecs = {name: self.config.outputs[name].codec for name in outputs}
        return Generated(
            answer.text,
            {
                n: [c.decode(codes) for codes in answer.outputs.get(n, [])]
                for n, c in codecs.items()
            },
        )

    def _parse_keywords(
        self, keywords: Mapping[str, Any], outputs: Sequence[str]
    ) -> tuple[Options, dict[str, Any]]:
        """Options and media from `generate`'s keywords; ValueError for a name that is neither."""
        sampling_names = [f.name for f in dataclasses.fields(Sampling)]
        names = [*self.config.inputs, "max_new_tokens", *sampling_names, "stop"]
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
            outputs=check_outputs(outputs, self.config),
        )
        return options, {n: keywords[n] for n in self.config.inputs if keywords.get(n)}

    def _record(self, prompt: Any, media: Mapping[str, Any], key: str) -> Record:
        prompt = self.config.prompt if prompt is None else prompt
        if not isinstance(prompt, str) and not _is_parts(prompt):
            raise ValueError(f"a prompt must be a str, not {prompt!r:.60}, or a list of parts")
        sources: dict[str, list[Source]] = {}
        for name, files in media.items():
            if not isinstance(files, list | tuple):
                raise ValueError(f"{name} must be a list of files, not {files!r:.60}")
            sources[name] = [_source(file, f"{name}[{i}]") for i, file in enumerate(files)]
        if isinstance(prompt, str):
            if not prompt.strip() and not any(sources.values()):
                raise ValueError("nothing to answer: give a prompt or a file")
            prompt = prompt_content(prompt, sources, self.config)
        return {"key": key, "conversations": [{"role": "user", "content": prompt}], **sources}


def free_bytes(device: torch.device) -> int:
    """Memory that is free for a rank, on its GPU or of its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for line in Path("/proc/meminfo").read_text().splitlines() if os.name == "posix" else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // ranks
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks


def _is_parts(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)


def _source(file: object, name: str) -> Source:
    if isinstance(file, bytes):
        return Blob(name, file)
    if isinstance(file, str | Path):
        return Path(file)
    if isinstance(file, Blob):
        return file
    raise ValueError(f"{name} must be a path or the bytes of a file, not {file!r:.60}")


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
