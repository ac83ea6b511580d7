"""Samples -> a padded batch -> the ranks that need it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from examples.mimo.data.samples import Sample


@dataclass
class Batch:
    """B rows of S tokens; a stage holds what it needs, and None for the rest.

    `modality_inputs[modality][name]` has a row per item, in the order of the placeholders;
    `items[modality]` says of each item its sample's key and its file.
    """

    num_rows: int
    num_columns: int
    num_tokens: int
    keys: list[str]
    items: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    input_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    modality_inputs: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def collate(samples: Sequence[Sample], multiple: int = 1) -> Batch:
    """Rows padded with id 0, label 0 and no loss to the longest, rounded up to `multiple`."""
    longest = max(len(sample.row.ids) for sample in samples)
    columns = -(-longest // multiple) * multiple
    media: dict[str, list[dict[str, torch.Tensor]]] = {}
    items: dict[str, list[tuple[str, str]]] = {}
    for sample in samples:
        for name, inputs in sample.media.items():
            media.setdefault(name, []).extend(inputs)
            items.setdefault(name, []).extend((sample.key, s) for s in sample.sources[name])
    return Batch(
        num_rows=len(samples),
        num_columns=columns,
        num_tokens=sum(len(sample.row.ids) for sample in samples),
        keys=[sample.key for sample in samples],
        items=items,
        input_ids=_pad([s.row.ids for s in samples], columns, torch.long),
        labels=_pad([s.row.labels for s in samples], columns, torch.long),
        loss_mask=_pad([s.row.loss_mask for s in samples], columns, torch.float32),
        modality_inputs={
            name: {key: torch.stack([item[key] for item in inputs]) for key in inputs[0]}
            for name, inputs in media.items()
        },
    )


def _pad(rows: list[list[int]], columns: int, dtype: torch.dtype) -> torch.Tensor:
    padded = torch.zeros(len(rows), columns, dtype=dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=dtype)
    return padded


def share_batch(
    batch: Batch | None, group: dist.ProcessGroup, device: torch.device, first: bool, last: bool
) -> Batch:
    """The batch on every rank of a tensor-parallel group, from the one rank that read it.

    Only what the stage needs travels: ids and media to the first, labels to the last. One
    message describes the batch; one flat tensor per dtype carries it.
    """
    tensors = _flatten(batch, first, last) if batch is not None else {}
    description: list[Any] = [None]
    if batch is not None:
        shapes = [(path, tuple(t.shape), t.dtype) for path, t in tensors.items()]
        about = (batch.num_rows, batch.num_columns, batch.num_tokens, batch.keys, batch.items)
        description = [(about, shapes)]
    if group.size() > 1:
        dist.broadcast_object_list(description, group_src=0, group=group, device=device)
    about, shapes = description[0]
    shared = Batch(*about)
    for dtype in dict.fromkeys(dtype for _, _, dtype in shapes):
        chosen = [(path, shape) for path, shape, kind in shapes if kind == dtype]
        flat = _broadcast_flat(tensors, chosen, dtype, group, device)
        _unflatten(shared, flat, chosen)
    return shared


def _flatten(batch: Batch, first: bool, last: bool) -> dict[tuple[str, ...], torch.Tensor]:
    tensors: dict[tuple[str, ...], torch.Tensor] = {}
    if first:
        assert batch.input_ids is not None
        tensors["input_ids",] = batch.input_ids
        for modality, inputs in batch.modality_inputs.items():
            for name, tensor in inputs.items():
                tensors["modality_inputs", modality, name] = tensor
    if last:
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
