"""Conversations from a folder.

Sample `i` is a function of `i` and the seed alone, so a run resumes at any sample.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.mimo.data.conversation import BadSample, Sample, SampleEncoder
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
