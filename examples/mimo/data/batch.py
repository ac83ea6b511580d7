"""Batches: collated from samples, and broadcast over tensor-parallel ranks.

A `Batch` is flat, so that it travels as it is: plain values that describe it, and tensors by name.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from examples.mimo.data.conversation import BadSample, Sample
from examples.mimo.modalities.base import is_count, upload

# The tensors of the text, (B, S) each; all others are encoder inputs.
TEXT = {"input_ids": torch.long, "labels": torch.long, "loss_mask": torch.float32}
# A description that is longer than this takes a second message.
DESCRIPTION_BYTES = 2**16


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
    return _collate(samples, starts, (len(samples), seq_length))


def collate_packed(samples: Sequence[Sample], multiple: int = 1, sample_multiple: int = 1) -> Batch:
    """All samples in one sequence, padded each to `sample_multiple`, together to `multiple`."""
    lengths = [-(-len(s.tokens.ids) // sample_multiple) * sample_multiple for s in samples]
    ends = list(accumulate(lengths))
    ends[-1] = -(-ends[-1] // multiple) * multiple  # the last sample takes the padding
    cu_seqlens = [0, *ends]
    return _collate(samples, cu_seqlens[:-1], (1, ends[-1]), cu_seqlens)


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
    """Add the positions of placeholders and targets to a batch on the host."""
    assert batch.input_ids is not None
    assert batch.loss_mask is not None
    batch.placeholder_counts, positions = Placeholders.of(
        batch.input_ids, token_ids, batch.cu_seqlens
    )
    sequence, column = batch.loss_mask.nonzero(as_tuple=True)
    batch.tensors["target_positions"] = column * batch.batch_size + sequence
    if positions is not None:
        batch.tensors["media_positions"] = positions


def broadcast_batch(
    batch: Batch | None, group: dist.ProcessGroup, device: torch.device, needs: Collection[str]
) -> Batch:
    """The batch on every rank of a tensor-parallel group, from the first, which read it.

    `needs` are names of text tensors and of modalities; only those travel. One message describes
    the batch, with the tensors that stay on the host, and one flat tensor per dtype carries it.
    """
    message: Any = None
    if batch is not None:
        chosen = {n: t for n, t in batch.tensors.items() if n.partition(".")[0] in needs}
        stays = {name: t for name, t in chosen.items() if is_count(name.partition(".")[2])}
        layout = [(name, t.shape, t.dtype) for name, t in chosen.items() if name not in stays]
        message = dataclasses.replace(batch, tensors=stays), layout
    received, layout = _broadcast_description(message, group, device)
    for dtype in dict.fromkeys(dtype for _, _, dtype in layout):  # ordered alike on every rank
        parts = [(name, shape) for name, shape, kind in layout if kind == dtype]
        sizes = [math.prod(shape) for _, shape in parts]
        if batch is not None:
            flat = upload(torch.cat([batch.tensors[name].flatten() for name, _ in parts]), device)
        else:
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        if group.size() > 1:
            dist.broadcast(flat, group_src=0, group=group)
        for (name, shape), part in zip(parts, flat.split(sizes), strict=True):
            received.tensors[name] = part.view(shape)
    return received


def _broadcast_description(message: Any, group: dist.ProcessGroup, device: torch.device) -> Any:
    """A picklable object of the group's first rank; the others wait for the device once.

    torch's `broadcast_object_list` waits four times, as it sends the length first.
    """
    if group.size() == 1:
        return message
    content = pickle.dumps(message) if group.rank() == 0 else b""
    head = len(content).to_bytes(8, "little") + content[:DESCRIPTION_BYTES]
    content = _broadcast_bytes(head.ljust(8 + DESCRIPTION_BYTES, b"\0"), group, device)
    length, content = int.from_bytes(content[:8], "little"), content[8:]
    if length > DESCRIPTION_BYTES:
        tail = pickle.dumps(message)[DESCRIPTION_BYTES:] if group.rank() == 0 else None
        content += _broadcast_bytes(tail or bytes(length - DESCRIPTION_BYTES), group, device)
    return message if group.rank() == 0 else pickle.loads(content[:length])


def _broadcast_bytes(content: bytes, group: dist.ProcessGroup, device: torch.device) -> bytes:
    flat = upload(torch.frombuffer(bytearray(content), dtype=torch.uint8), device)
    dist.broadcast(flat, group_src=0, group=group)
    return content if group.rank() == 0 else flat.cpu().numpy().tobytes()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device` that need not stay on the host."""
    tensors = {
        name: tensor if is_count(name.partition(".")[2]) else upload(tensor, device)
        for name, tensor in batch.tensors.items()
    }
    return dataclasses.replace(batch, tensors=tensors)
