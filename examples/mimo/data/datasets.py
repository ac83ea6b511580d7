"""Datasets: conversations from a folder, and mock conversations without files.

Sample `i` is a function of `i` and the seed alone, so a run resumes at any sample.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import BadSample, Sample, SampleEncoder, TokenSequence
from examples.mimo.data.turns import FilesInside, errors_named, refuse_other_modalities
from examples.mimo.modalities.files import json_lines


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of `path`; ValueError names the line that is not an object."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; prepare_data.py makes a data folder")
    records = []
    for number, record in json_lines(path):
        if isinstance(record, ValueError):
            raise ValueError(f"{path}, line {number}: {record}")
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: a sample must be a JSON object")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: no samples in this file")
    return records


class ConversationDataset(torch.utils.data.Dataset[Sample]):
    """Conversations from `root/split.jsonl`, in a new order every epoch when `shuffle`.

    `num_samples` may exceed the file: index i is in epoch i // lines. A sample that cannot be read
    is skipped, and the next of its epoch stands in for it; ValueError when more than
    `max_bad_samples` follow one another.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        encoder: SampleEncoder,
        num_samples: int | None = None,
        seed: int = 0,
        shuffle: bool = False,
        max_bad_samples: int = 0,
    ) -> None:
        if not root.is_dir():
            raise ValueError(f"--data-path {root}: no such folder; prepare_data.py makes one")
        self.file = root / f"{split}.jsonl"
        self.find_file = FilesInside(root)
        self.encoder = encoder
        self.records = read_records(self.file)
        for line, record in enumerate(self.records, start=1):
            with errors_named(f"sample {record.get('key', f'{self.file.name}, line {line}')}"):
                refuse_other_modalities(record, encoder.config)
        self.num_samples = len(self.records) if num_samples is None else num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.max_bad_samples = max_bad_samples
        self._epoch = -1
        self._order = np.arange(len(self.records))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        generator = np.random.default_rng([self.seed, index])  # augments alike when resumed
        skipped: list[BadSample] = []
        while True:
            line = self.line(index, offset=len(skipped))
            record, name = self.records[line], f"{self.file.name}, line {line + 1}"
            try:
                sample = self.encoder.encode(record, self.find_file, generator, name)
            except ValueError as error:
                skipped.append(BadSample(str(record.get("key", name)), str(error)))
                # A file without a good sample must not be read in circles.
                if len(skipped) > min(self.max_bad_samples, len(self.records) - 1):
                    raise ValueError(
                        f"{error}; with it {len(skipped)} samples of {self.file} in a row could "
                        f"not be read (--max-bad-samples {self.max_bad_samples})"
                    ) from None
            else:
                return dataclasses.replace(sample, skipped=tuple(skipped))

    def line(self, index: int, offset: int = 0) -> int:
        """Where sample `index` stands in the file, or the sample `offset` after it in its epoch."""
        epoch, position = divmod(index, len(self.records))
        if self.shuffle and epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch, 1])  # 1: no sample's seed
            self._epoch, self._order = epoch, order.permutation(len(self.records))
        return int(self._order[(position + offset) % len(self.records)])


class MockDataset(torch.utils.data.Dataset[Sample]):
    """Random conversations of any size without files.

    A sample holds zero, one or two items of each modality as far as they fit, at random positions
    in random text; the second half of its text carries loss.
    """

    def __init__(self, config: MimoConfig, seq_length: int, num_samples: int, seed: int) -> None:
        self.config = config
        self.seq_length = seq_length
        self.num_samples = num_samples
        self.seed = seed
        special = {m.token_id for m in config.modalities.values()}
        self.words = [i for i in range(1, config.language.vocab_size) if i not in special]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        numbers = np.random.default_rng([self.seed, index, 2])
        noise = torch.Generator().manual_seed(int(numbers.integers(2**62)))
        length = int(numbers.integers(self.seq_length // 2, self.seq_length + 1))
        media: dict[str, list[dict[str, torch.Tensor]]] = {}
        spans: list[list[int]] = []
        room = length // 2  # for media; the other half is text
        for name, modality in self.config.modalities.items():
            for _ in range(numbers.integers(3)):
                item = modality.encoder.mock_inputs(noise)
                count = modality.encoder.num_tokens(item)
                if count <= room:
                    room -= count
                    media.setdefault(name, []).append(item)
                    spans.append([modality.token_id] * count)
        text = numbers.choice(self.words, length - sum(map(len, spans))).tolist()
        question = len(text) // 2
        cuts = sorted(numbers.integers(0, question + 1, len(spans)).tolist())
        ids: list[int] = []
        for start, stop, span in zip([0, *cuts], [*cuts, question], [*spans, []], strict=True):
            ids += text[start:stop] + span
        is_target = [0] * len(ids) + [1] * (len(text) - question)
        ids += text[question:]
        tokens = TokenSequence(ids, [*ids[1:], 0], [*is_target[1:], 0])
        sources = {name: ["mock"] * len(items) for name, items in media.items()}
        return Sample(f"mock-{index}", tokens, media, sources)
