"""Samples -> a padded batch -> the ranks that need it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from examples.mimo.data.conversation import Sample


@dataclass
class Batch:
    """B rows of S tokens; a stage holds what it needs, and None for the rest.

    `modality_inputs[modality][name]` has the rows of all items, in the order of the placeholders,
    and its modalities come in the order of the samples, so ranks' orders differ;
    `items[modality]` says of each item its sample's key and its file. In a packed batch the one
    row holds all samples, and `bounds` are their starts and the row's end. `bad_samples` are
    samples that were skipped on the way here.
    """

    batch_size: int
    seq_length: int
    num_tokens: int
    keys: list[str]
    items: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    cu_seqlens: list[int] | None = None
    bad_samples: list[BadSample] = field(default_factory=list)
    input_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    modality_inputs: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read, and why."""

    key: str
    reason: str


@dataclass
class BadSampleCount:
    """How many samples a data-parallel rank could not read since training began, and the last."""

    count: int = 0
    last: BadSample | None = None


def num_inputs(batch: Batch, modality: str) -> int:
    """How many inputs the encoder of `modality` has to work on."""
    inputs = batch.modality_inputs.get(modality)
    return len(next(iter(inputs.values()))) if inputs else 0


@dataclass(frozen=True)
class Needs:
    """The tensors of a batch that a rank's part of the model works on."""

    ids: bool = False
    labels: bool = False
    modalities: frozenset[str] = frozenset()


def collate(samples: Sequence[Sample], multiple: int = 1) -> Batch:
    """Rows padded with id 0, label 0 and no loss to the longest, rounded up to `multiple`."""
    columns = _round_up(max(len(sample.tokens.ids) for sample in samples), multiple)
    return _batch(
        samples,
        input_ids=_pad([s.tokens.ids for s in samples], columns, torch.long),
        labels=_pad([s.tokens.labels for s in samples], columns, torch.long),
        loss_mask=_pad([s.tokens.loss_mask for s in samples], columns, torch.float32),
    )


def collate_packed(samples: Sequence[Sample], multiple: int = 1, sample_multiple: int = 1) -> Batch:
    """All samples in one row, padded each to `sample_multiple` and together to `multiple`."""
    ends = list(accumulate(_round_up(len(s.tokens.ids), sample_multiple) for s in samples))
    ends[-1] = _round_up(ends[-1], multiple)
    cu_seqlens = [0, *ends]
    return _batch(
        samples,
        input_ids=_pack([s.tokens.ids for s in samples], cu_seqlens, torch.long),
        labels=_pack([s.tokens.labels for s in samples], cu_seqlens, torch.long),
        loss_mask=_pack([s.tokens.loss_mask for s in samples], cu_seqlens, torch.float32),
        cu_seqlens=cu_seqlens,
    )


def _batch(samples: Sequence[Sample], input_ids: torch.Tensor, **fields: Any) -> Batch:
    media: dict[str, list[dict[str, torch.Tensor]]] = {}
    items: dict[str, list[tuple[str, str]]] = {}
    for sample in samples:
        for name, inputs in sample.media.items():
            media.setdefault(name, []).extend(inputs)
            items.setdefault(name, []).extend((sample.key, s) for s in sample.sources[name])
    return Batch(
        batch_size=input_ids.shape[0],
        seq_length=input_ids.shape[1],
        num_tokens=sum(len(sample.tokens.ids) for sample in samples),
        keys=[sample.key for sample in samples],
        items=items,
        input_ids=input_ids,
        modality_inputs={
            name: {key: torch.cat([item[key] for item in inputs]) for key in inputs[0]}
            for name, inputs in media.items()
        },
        **fields,
    )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _pack(rows: list[list[int]], cu_seqlens: list[int], dtype: torch.dtype) -> torch.Tensor:
    packed = torch.zeros(1, cu_seqlens[-1], dtype=dtype)
    for start, values in zip(cu_seqlens, rows, strict=False):
        packed[0, start : start + len(values)] = torch.tensor(values, dtype=dtype)
    return packed


def _pad(rows: list[list[int]], columns: int, dtype: torch.dtype) -> torch.Tensor:
    padded = torch.zeros(len(rows), columns, dtype=dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=dtype)
    return padded


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Several batches as one, in their order: rows below one another, packed rows end to end."""
    first = batches[0]
    if len(batches) == 1:
        return first
    packed = first.cu_seqlens is not None
    columns = max(batch.seq_length for batch in batches)
    cu_seqlens: list[int] | None = None
    if packed:
        columns = sum(batch.seq_length for batch in batches)
        cu_seqlens = [0]
        for batch in batches:
            assert batch.cu_seqlens is not None
            cu_seqlens += [cu_seqlens[-1] + end for end in batch.cu_seqlens[1:]]

    def joined(field_name: str) -> torch.Tensor:
        tensors = [getattr(batch, field_name) for batch in batches]
        if packed:
            return torch.cat(tensors, dim=1)
        return torch.cat([functional.pad(t, (0, columns - t.shape[1])) for t in tensors])

    names = dict.fromkeys(name for batch in batches for name in batch.modality_inputs)
    having = {n: [b.modality_inputs[n] for b in batches if n in b.modality_inputs] for n in names}
    return Batch(
        batch_size=1 if packed else sum(batch.batch_size for batch in batches),
        seq_length=columns,
        num_tokens=sum(batch.num_tokens for batch in batches),
        keys=[key for batch in batches for key in batch.keys],
        items={n: [item for b in batches for item in b.items.get(n, [])] for n in names},
        cu_seqlens=cu_seqlens,
        bad_samples=[bad for batch in batches for bad in batch.bad_samples],
        input_ids=joined("input_ids"),
        labels=joined("labels"),
        loss_mask=joined("loss_mask"),
        modality_inputs={
            name: {key: torch.cat([i[key] for i in inputs]) for key in inputs[0]}
            for name, inputs in having.items()
        },
    )


def share_of(count: int, number: int, shares: int) -> slice:
    """Run `number` of `count` items in `shares` runs, which differ by one item at most."""
    return slice(count * number // shares, count * (number + 1) // shares)


def take_share(batch: Batch, number: int, shares: int) -> Batch:
    """The batch with one share of the encoder inputs of each modality."""

    def mine(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        share = share_of(len(next(iter(inputs.values()))), number, shares)
        return {name: tensor[share] for name, tensor in inputs.items()}

    shared = {modality: mine(inputs) for modality, inputs in batch.modality_inputs.items()}
    # One share counts what was skipped on the way.
    bad_samples = batch.bad_samples if number == 0 else []
    return dataclasses.replace(batch, modality_inputs=shared, bad_samples=bad_samples)


def share_batch(
    batch: Batch | None, group: dist.ProcessGroup, device: torch.device, needs: Needs
) -> Batch:
    """The batch on every rank of a tensor-parallel group, from the one rank that read it.

    Only what they need travels. One message describes the batch; one flat tensor per dtype
    carries it.
    """
    tensors = _flatten(batch, needs) if batch is not None else {}
    description: list[Any] = [None]
    if batch is not None:
        shapes = [(path, tuple(t.shape), t.dtype) for path, t in tensors.items()]
        description = [(_without_tensors(batch), shapes)]
    if group.size() > 1:
        dist.broadcast_object_list(description, group_src=0, group=group, device=device)
    shared, shapes = description[0]
    for dtype in dict.fromkeys(dtype for _, _, dtype in shapes):
        chosen = [(path, shape) for path, shape, kind in shapes if kind == dtype]
        flat = _broadcast_flat(tensors, chosen, dtype, group, device)
        _unflatten(shared, flat, chosen)
    return shared


def _without_tensors(batch: Batch) -> Batch:
    return dataclasses.replace(
        batch, input_ids=None, labels=None, loss_mask=None, modality_inputs={}
    )


def _flatten(batch: Batch, needs: Needs) -> dict[tuple[str, ...], torch.Tensor]:
    tensors: dict[tuple[str, ...], torch.Tensor] = {}
    if needs.ids:
        assert batch.input_ids is not None
        tensors["input_ids",] = batch.input_ids
    for modality, inputs in batch.modality_inputs.items():
        if modality in needs.modalities:
            for name, tensor in inputs.items():
                tensors["modality_inputs", modality, name] = tensor
    if needs.labels:
        assert batch.labels is not None
        assert batch.loss_mask is not None
        tensors["labels",] = batch.labels
        tensors["loss_mask",] = batch.loss_mask
    return tensors


def _broadcast_flat(
    tensors: dict[tuple[str, ...], torch.Tensor],
    chosen: list[tuple[tuple[str, ...], tuple[int, ...]]],
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    device: torch.device,
) -> torch.Tensor:
    if tensors:
        flat = torch.cat([tensors[path].flatten() for path, _ in chosen]).to(device)
    else:
        size = sum(torch.Size(shape).numel() for _, shape in chosen)
        flat = torch.empty(size, dtype=dtype, device=device)
    if group.size() > 1:
        dist.broadcast(flat, group_src=0, group=group)
    return flat


def _unflatten(
    batch: Batch, flat: torch.Tensor, chosen: list[tuple[tuple[str, ...], tuple[int, ...]]]
) -> None:
    sizes = [torch.Size(shape).numel() for _, shape in chosen]
    for (path, shape), part in zip(chosen, flat.split(sizes), strict=True):
        tensor = part.view(shape)
        if path[0] == "modality_inputs":
            batch.modality_inputs.setdefault(path[1], {})[path[2]] = tensor
        else:
            setattr(batch, path[0], tensor)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""
    return dataclasses.replace(
        batch,
        input_ids=None if batch.input_ids is None else batch.input_ids.to(device),
        labels=None if batch.labels is None else batch.labels.to(device),
        loss_mask=None if batch.loss_mask is None else batch.loss_mask.to(device),
        modality_inputs={
            modality: {name: tensor.to(device) for name, tensor in inputs.items()}
            for modality, inputs in batch.modality_inputs.items()
        },
    )
