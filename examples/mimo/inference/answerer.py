"""A loaded model that answers requests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from examples.mimo.checkpoint.description import Checkpoint
from examples.mimo.checkpoint.loading import load_model
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import collate, to_device
from examples.mimo.data.conversation import Turn, to_pieces
from examples.mimo.data.samples import Sample, SampleReader
from examples.mimo.data.tokenizer import Tokenizer, load_tokenizer
from examples.mimo.inference.generate import generate
from examples.mimo.training.providers import device


@dataclass(frozen=True)
class Request:
    """A prompt and its files: `files[modality]`, in the order of the placeholders."""

    prompt: str
    files: dict[str, list[Path]] = field(default_factory=dict)
    key: str = "prompt"


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    text: str
    tokens: list[int]


class Answerer:
    """Answers requests with the model in a checkpoint; `blank` wipes out modalities' content.

    On several ranks every rank must make the same calls; all get the same answers.
    """

    def __init__(self, checkpoint: Checkpoint, tp: int = 1, pp: int = 1) -> None:
        self.config: MimoConfig = checkpoint.config
        self.tokenizer = load_tokenizer(checkpoint.tokenizer)
        # Loading is slow and wrong files are common, so the tokenizer is checked first.
        self.reader()
        self.model = load_model(checkpoint, tp, pp)

    def reader(self, blank: Sequence[str] = ()) -> SampleReader:
        """What turns files and prompts into the model's inputs."""
        seq_length = self.config.language.seq_length
        return SampleReader(self.config, self.tokenizer, seq_length, blank=blank)

    def read(self, request: Request, blank: Sequence[str] = ()) -> Sample:
        """The request as a sample; ValueError for a file or a placeholder that is wrong.

        Files whose placeholder the prompt does not name are put in front of it.
        """
        prompt = request.prompt
        if not any(m.placeholder in prompt for m in self.config.modalities.values()):
            prompt = self._placeholders(request) + prompt
        pieces = to_pieces([Turn(is_answer=False, text=prompt)], self.config)
        return self.reader(blank).from_pieces(pieces, request.files, request.key)

    def answer(
        self,
        samples: Sequence[Sample],
        max_new_tokens: int = 64,
        batch_size: int = 64,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Answer]:
        """Greedy answers in the samples' order; equally long prompts share a batch."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            by_length[len(sample.row.ids)].append(index)
        rows: dict[int, list[int]] = {}
        for length in sorted(by_length):
            for chunk in _chunks(by_length[length], batch_size):
                budget = min(max_new_tokens, self.config.language.seq_length - length)
                rows |= zip(chunk, self._generate([samples[i] for i in chunk], budget), strict=True)
                progress(len(rows))
        return [Answer(self.tokenizer.decode(rows[i]), rows[i]) for i in range(len(samples))]

    def _generate(self, samples: list[Sample], max_new_tokens: int) -> list[list[int]]:
        prompts = to_device(collate(samples), device())
        forbidden = forbidden_tokens(self.tokenizer, self.config)
        return generate(self.model, prompts, max_new_tokens, self.tokenizer.eos_id, forbidden)

    def _placeholders(self, request: Request) -> str:
        return "".join(
            modality.placeholder * len(request.files.get(name, ()))
            for name, modality in self.config.modalities.items()
        )


def forbidden_tokens(tokenizer: Tokenizer, config: MimoConfig) -> set[int]:
    """Rows of the table that are no words: beyond the tokenizer's, placeholders, padding.

    Many tokenizers pad with the end-of-text token, which must stay.
    """
    beyond = range(tokenizer.size, config.language.vocab_size)
    placeholders = (modality.token_id for modality in config.modalities.values())
    return {*beyond, *placeholders, tokenizer.pad_id} - {tokenizer.eos_id}


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
