"""Samples from a folder, and batches collated from them.

Sample `i` of a folder is a function of `i` and the seed alone, so a run resumes at any sample. A
`Batch` is flat, so that it travels as it is: plain values that describe it, and tensors by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from examples.mimo.data.conversation import BadSample, Sample, SampleEncoder
from examples.mimo.data.turns import FilesInside, errors_named, refuse_other_modalities
from examples.mimo.modalities.files import json_lines
from examples.mimo.modalities.values import is_count, upload

# The tensors of the text, (B, S) each; all others are encoder inputs.
TEXT = {"input_ids": torch.long, "labels": torch.long, "loss_mask": torch.float32}


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


class Placeholders(NamedTuple):
    """Where media go: `counts[modality]` placeholders in each sample, known to the host.

    `positions` (n,), on the device, of all placeholders in the flattened (S, B), a modality's after
    the other's.
    """

    counts: dict[str, list[int]]
    positions: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        token_ids: Mapping[str, int],
        cu_seqlens: Sequence[int] | None = None,
    ) -> Placeholders:
        """Look through (B, S) ids. Of ids on a GPU the host waits for each count."""
        counts, positions = {}, []
        for name, token_id in token_ids.items():
            sequence, column = (input_ids == token_id).nonzero(as_tuple=True)
            positions.append(column * len(input_ids) + sequence)
            sample, num_samples = sequence, len(input_ids)
            if cu_seqlens:
                ends = torch.tensor(cu_seqlens[1:], device=column.device)
                sample, num_samples = torch.bucketize(column, ends, right=True), len(ends)
            counts[name] = torch.bincount(sample, minlength=num_samples).tolist()
        return cls(counts, torch.cat(positions) if positions else None)


@dataclass
class Batch:
    """B sequences of S tokens with their media; a stage holds only the tensors that it needs.

    `tensors` has "input_ids", "labels" and "loss_mask" (B, S), and "MODALITY.INPUT" with the
    encoder inputs of all items, in the order of the placeholders. `items[modality]` says of each
    item its sample's key and its file. In a packed batch B is 1 and `cu_seqlens` are the starts of
    the samples and the sequence's end. `bad_samples` were skipped on the way here. `places` is
    where shards hold all these samples: folder of the mixture, and index in it. `locate` adds what
    only the host can tell without waiting: "media_positions" with `placeholder_counts` (see
    `Placeholders`), and "target_positions" (n,), those of tokens with loss in the flattened (S, B).
    Of the B * S slots `rounded_slots` come of rounding S up.
    """

    batch_size: int
    seq_length: int
    num_tokens: int
    keys: list[str]
    items: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    cu_seqlens: list[int] | None = None
    bad_samples: list[BadSample] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    placeholder_counts: dict[str, list[int]] | None = None
    rounded_slots: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def input_ids(self) -> torch.Tensor | None:
        """(B, S), on the first pipeline stage."""
        return self.tensors.get("input_ids")

    @property
    def labels(self) -> torch.Tensor | None:
        """(B, S), on the last pipeline stage."""
        return self.tensors.get("labels")

    @property
    def loss_mask(self) -> torch.Tensor | None:
        """(B, S), 1 for targets, on the last pipeline stage."""
        return self.tensors.get("loss_mask")

    @property
    def placeholders(self) -> Placeholders | None:
        """Where media go in the sequences."""
        if self.placeholder_counts is None:
            return None
        return Placeholders(self.placeholder_counts, self.tensors.get("media_positions"))

    @property
    def modality_inputs(self) -> dict[str, dict[str, torch.Tensor]]:
        """Modality -> input name -> tensor; modalities come in the samples' order."""
        nested: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            modality, dot, key = name.partition(".")
            if dot:
                nested.setdefault(modality, {})[key] = tensor
        return nested


def collate(samples: Sequence[Sample], multiple: int = 1) -> Batch:
    """One sequence per sample, padded with id 0, label 0 and no loss to one length.

    That is the longest sample's, rounded up to `multiple`.
    """
    longest = max(len(sample.tokens.ids) for sample in samples)
    seq_length = -(-longest // multiple) * multiple
    starts = [number * seq_length for number in range(len(samples))]
    batch = _collate(samples, starts, (len(samples), seq_length))
    return dataclasses.replace(batch, rounded_slots=(seq_length - longest) * len(samples))


def collate_packed(samples: Sequence[Sample], multiple: int = 1, sample_multiple: int = 1) -> Batch:
    """All samples in one sequence, padded each to `sample_multiple`, together to `multiple`."""
    lengths = [-(-len(s.tokens.ids) // sample_multiple) * sample_multiple for s in samples]
    ends = list(accumulate(lengths))
    rounded_slots = -ends[-1] % multiple
    ends[-1] += rounded_slots  # the last sample takes the padding
    batch = _collate(samples, [0, *ends[:-1]], (1, ends[-1]), [0, *ends])
    return dataclasses.replace(batch, rounded_slots=rounded_slots)


def _collate(
    samples: Sequence[Sample],
    starts: Sequence[int],
    shape: tuple[int, int],
    cu_seqlens: list[int] | None = None,
) -> Batch:
    """`starts` are the samples' offsets in the flattened (B, S) = `shape`."""
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, dtype in TEXT.items()}
    media: dict[str, list[torch.Tensor]] = {}
    items: dict[str, list[tuple[str, str]]] = {}
    for start, sample in zip(starts, samples, strict=True):
        sequences = (sample.tokens.ids, sample.tokens.labels, sample.tokens.loss_mask)
        for tensor, values in zip(tensors.values(), sequences, strict=True):
            end = start + len(values)
            tensor.view(-1)[start:end] = torch.tensor(values, dtype=tensor.dtype)
        for modality, inputs_of_items in sample.media.items():
            items.setdefault(modality, []).extend((sample.key, s) for s in sample.sources[modality])
            for inputs in inputs_of_items:
                for name, tensor in inputs.items():
                    media.setdefault(f"{modality}.{name}", []).append(tensor)
    return Batch(
        *shape,
        num_tokens=sum(len(sample.tokens.ids) for sample in samples),
        keys=[sample.key for sample in samples],
        items=items,
        cu_seqlens=cu_seqlens,
        bad_samples=[bad for sample in samples for bad in sample.skipped],
        tensors=tensors | {name: _concatenate(name, media[name], items) for name in media},
    )


def _concatenate(
    name: str, inputs: Sequence[torch.Tensor], items: dict[str, list[tuple[str, str]]]
) -> torch.Tensor:
    """All items' inputs along dim 0; ValueError, naming both items, where the rest differs."""
    owners = items[name.partition(".")[0]]
    if len(inputs) != len(owners):
        raise ValueError(f"{name}: {len(inputs)} of {len(owners)} items of this batch have it")
    for tensor, (key, file) in zip(inputs, owners, strict=True):
        if tensor.shape[1:] != inputs[0].shape[1:]:
            raise ValueError(
                f"sample {key}, {file}: its {name} has the shape {tuple(tensor.shape)}, but that "
                f"of sample {owners[0][0]}, {owners[0][1]}, in the same batch is "
                f"{tuple(inputs[0].shape)}; make preprocess return one shape beyond dim 0"
            )
    return torch.cat(list(inputs))


def locate(batch: Batch, token_ids: Mapping[str, int]) -> None:
    """Add the positions of placeholders and targets to a batch on the host.

    Of labels and loss mask those of the targets stay, (1, n).
    """
    assert batch.input_ids is not None
    assert batch.loss_mask is not None
    batch.placeholder_counts, positions = Placeholders.of(
        batch.input_ids, token_ids, batch.cu_seqlens
    )
    sequence, column = batch.loss_mask.nonzero(as_tuple=True)
    batch.tensors["target_positions"] = column * batch.batch_size + sequence
    for name in ("labels", "loss_mask"):
        batch.tensors[name] = batch.tensors[name][None, sequence, column]
    if positions is not None:
        batch.tensors["media_positions"] = positions


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device` that need not stay on the host."""
    tensors = {
        name: tensor if is_count(name.partition(".")[2]) else upload(tensor, device)
        for name, tensor in batch.tensors.items()
    }
    return dataclasses.replace(batch, tensors=tensors)
