"""Ranks that share a batch: broadcast to them, and shards of its sequences and media items.

Sequences are cut in the order that Megatron balances: rank r of c holds the chunks r and
2c - 1 - r of 2c, so that causal attention costs every rank the same (arXiv:2407.21783, section
3.3.2, gathers keys and values as this package does). `cu_seqlens` are the starts of the samples in
a packed sequence, and its end. Media are shared out by item.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from examples.mimo.data.batch import Batch
from examples.mimo.modalities.values import is_count, upload

# Tables of rotary angles are cached by their length.
TABLE_STEP = 1024
# Samples whose attention is computed together are at least so long, as a part of the longest.
LEAST_FILLED = 0.75
# A description that is longer than this takes a second message.
DESCRIPTION_BYTES = 2**16


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
    received = _broadcast_bytes(head.ljust(8 + DESCRIPTION_BYTES, b"\0"), group, device)
    length = int.from_bytes(received[:8], "little")
    if (rest := length - DESCRIPTION_BYTES) > 0:
        tail = content[DESCRIPTION_BYTES:] or bytes(rest)
        received += _broadcast_bytes(tail, group, device)
    return message if group.rank() == 0 else pickle.loads(received[8 : 8 + length])


def _broadcast_bytes(content: bytes, group: dist.ProcessGroup, device: torch.device) -> bytes:
    """`content` of the first rank, on all; that of the others is as long."""
    flat = upload(torch.frombuffer(bytearray(content), dtype=torch.uint8), device)
    dist.broadcast(flat, group_src=0, group=group)
    return content if group.rank() == 0 else flat.cpu().numpy().tobytes()


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The numbers of a rank's two chunks, of 2 * size."""
    return rank, 2 * size - 1 - rank


def shard_sequence(
    whole: torch.Tensor, dim: int, group: dist.ProcessGroup, cu_seqlens: Sequence[int] | None = None
) -> torch.Tensor:
    """This rank's S / c of the S positions along `dim`; sample lengths are divisible by 2c."""
    if group.size() == 1:
        return whole
    return _shard(whole, dim, group.rank(), group.size(), cu_seqlens or (0, whole.shape[dim]))


def shard_targets(batch: Batch, group: dist.ProcessGroup) -> None:
    """Keep this rank's part of labels and loss mask, (B, S) -> (B, S / c), as of the outputs."""
    for name in ("labels", "loss_mask"):
        batch.tensors[name] = shard_sequence(batch.tensors[name], 1, group, batch.cu_seqlens)


def _shard(
    whole: torch.Tensor, dim: int, rank: int, size: int, cu_seqlens: Sequence[int]
) -> torch.Tensor:
    parts = []
    for start, end in pairwise(cu_seqlens):
        chunks = whole.narrow(dim, start, end - start).chunk(2 * size, dim)
        parts += [chunks[number] for number in chunks_of(rank, size)]
    return torch.cat(parts, dim)


def gather_sequence(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(S / c, ...) -> (S, ...) in order; gradients are summed over the ranks that used them."""
    blocks = gather_from_sequence_parallel_region(local, group=group).chunk(group.size())
    halves = [block.chunk(2) for block in blocks]
    return torch.cat([front for front, _ in halves] + [back for _, back in reversed(halves)])


@dataclass
class PackedSequence(PackedSeqParams):
    """A packed sequence, as rotary positions and core attention of this package read it.

    On this rank it is cut into connected pieces: the samples, or under context parallelism two
    chunks of each. A piece's queries attend to the keys of its sample up to its own end. Lengths
    are on the host, as reading them from a GPU would make it wait.
    `positions` (S / c,) are those of this rank's tokens in their samples. `key_rows` are the keys
    of all pieces, one piece after the other, as rows of the ranks' keys one after another; None
    where these are the same.
    """

    query_lengths: list[int] = field(default_factory=list)
    key_lengths: list[int] = field(default_factory=list)
    positions: torch.Tensor | None = None
    key_rows: torch.Tensor | None = None

    def gather_keys(self, local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """This rank's keys or values (S / c, ...) -> those of all pieces (K, ...)."""
        if self.key_rows is None:
            return local
        return gather_from_sequence_parallel_region(local, group=group).index_select(
            0, self.key_rows
        )

    def split(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(S / c, 1, ...), (K, 1, ...) twice -> the three of each piece.

        Samples that are whole come in batches instead, (length, samples, ...). Padding stands
        behind a sample, so that under a causal mask none of its tokens sees it.
        """
        if self.batches is not None:
            return zip(*map(self.batches.split, (query, key, value)), strict=True)
        keys, values = (tokens.split(self.key_lengths) for tokens in (key, value))
        return zip(query.split(self.query_lengths), keys, values, strict=True)

    def join(self, contexts: list[torch.Tensor]) -> torch.Tensor:
        """What came of each piece or batch -> (S / c, 1, ...)."""
        return torch.cat(contexts) if self.batches is None else self.batches.join(contexts)

    @functools.cached_property
    def batches(self) -> PaddedBatches | None:
        """The samples by length; None under context parallelism, where they are cut."""
        if self.key_rows is not None or self.positions is None:
            return None
        return pad_batches(self.query_lengths, self.positions.device)

    @property
    def table_length(self) -> int:
        """Rotary angles of so many positions are enough."""
        return -(-self.max_seqlen_kv // TABLE_STEP) * TABLE_STEP


@dataclass(frozen=True)
class PaddedBatches:
    """A packed sequence's samples of similar lengths side by side, so that one call takes many.

    `shapes` are (length, samples) of each batch. `tokens` (N,) says which token of the sequence
    stands in each place of all batches, any one in the places `padding`; `places` (S,) says where
    each token of the sequence stands.
    """

    shapes: list[tuple[int, int]]
    tokens: torch.Tensor
    places: torch.Tensor
    padding: torch.Tensor

    def split(self, sequence: torch.Tensor) -> list[torch.Tensor]:
        """(S, 1, ...) -> (length, samples, ...) of each batch, zeros for padding."""
        flat = Rearrange.apply(sequence.squeeze(1), self.tokens, self.places, self.padding)
        parts = flat.split([length * samples for length, samples in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, batches: list[torch.Tensor]) -> torch.Tensor:
        """(length, samples, ...) of each batch -> (S, 1, ...)."""
        flat = torch.cat([batch.flatten(0, 1) for batch in batches])
        return Rearrange.apply(flat, self.places, self.tokens, self.padding)[:, None]


def pad_batches(lengths: Sequence[int], device: torch.device) -> PaddedBatches:
    """Batches of samples that follow one another in a sequence, the longest ones first."""
    starts = [0, *accumulate(lengths)]
    left = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    shapes, in_batches = [], []
    while left:
        longest = lengths[left[0]]
        batch = [sample for sample in left if lengths[sample] >= LEAST_FILLED * longest]
        left = left[len(batch) :]
        first = torch.tensor([starts[sample] for sample in batch])
        ends = torch.tensor([starts[sample + 1] for sample in batch])
        tokens = first + torch.arange(longest)[:, None]
        shapes.append((longest, len(batch)))
        in_batches.append(tokens.where(tokens < ends, starts[-1]).flatten())
    flat = torch.cat(in_batches)
    places, padding = flat.argsort().tensor_split([starts[-1]])
    tensors = flat.clamp(max=starts[-1] - 1), places, padding
    return PaddedBatches(shapes, *(upload(tensor, device) for tensor in tensors))


class Rearrange(torch.autograd.Function):
    """A tensor's entries along dim 0 in another order, with zeros at `padding` where they are more.

    Each is taken once, so its gradient is that of the place it went to, which `inverse` says, and
    nothing is added up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        whole: torch.Tensor,
        indices: torch.Tensor,
        inverse: torch.Tensor,
        padding: torch.Tensor,
    ) -> torch.Tensor:
        ctx.inverse, ctx.padding = inverse, padding
        return _take(whole, indices, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _take(gradients[0], ctx.inverse, ctx.padding), None, None, None


def _take(whole: torch.Tensor, indices: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    taken = whole.index_select(0, indices)
    return taken.index_fill_(0, padding, 0) if len(indices) > len(whole) else taken


def pack_sequence(
    cu_seqlens: Sequence[int], group: dist.ProcessGroup, device: torch.device
) -> PackedSequence:
    """`cu_seqlens` as a `PackedSequence`, on this rank of a context-parallel group."""
    rank, size = group.rank(), group.size()
    numbers, chunks = (chunks_of(rank, size), 2 * size) if size > 1 else ((0,), 1)
    query_lengths, key_lengths, positions, key_rows = [], [], [], []
    # The ranks' shards one after another hold the positions `order`, so position p is in row
    # `rows[p]`.
    whole = torch.arange(cu_seqlens[-1])
    order = [_shard(whole, 0, other, size, cu_seqlens) for other in range(size) if size > 1]
    rows = torch.cat(order).argsort() if order else whole
    for start, end in pairwise(cu_seqlens):
        length = (end - start) // chunks
        for number in numbers:
            query_lengths.append(length)
            key_lengths.append((number + 1) * length)
            positions.append(torch.arange(number * length, (number + 1) * length))
            key_rows.append(rows[start : start + (number + 1) * length])
    return PackedSequence(
        # The layout whose rotary angles come position by position.
        qkv_format="sbhd",
        cu_seqlens_q=upload(_ends(query_lengths), device),
        cu_seqlens_kv=upload(_ends(key_lengths), device),
        max_seqlen_q=max(query_lengths),
        max_seqlen_kv=max(key_lengths),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        positions=upload(torch.cat(positions), device),
        key_rows=upload(torch.cat(key_rows), device) if size > 1 else None,
    )


def _ends(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def pack_for_engine(
    cu_seqlens: Sequence[int], group: dist.ProcessGroup, device: torch.device
) -> PackedSeqParams:
    """`cu_seqlens` as Transformer Engine's kernels read them, which shard samples themselves."""
    starts = upload(torch.tensor(cu_seqlens, dtype=torch.int32), device)
    longest = max(end - start for start, end in pairwise(cu_seqlens))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def share_of(count: int, number: int, shares: int) -> slice:
    """Run `number` of `count` items in `shares` runs, which differ by one item at most."""
    return slice(count * number // shares, count * (number + 1) // shares)


def share_inputs(
    inputs: dict[str, torch.Tensor], number: int, shares: int
) -> dict[str, torch.Tensor]:
    """Share `number` of the N inputs of an encoder."""
    share = share_of(len(next(iter(inputs.values()))), number, shares)
    return {name: tensor[share] for name, tensor in inputs.items()}


def encode_shares(
    encode: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    num_tokens: Callable[[dict[str, torch.Tensor]], int],
    inputs: dict[str, torch.Tensor],
    groups: Sequence[dist.ProcessGroup],
    sum_gradients_over: dist.ProcessGroup,
) -> torch.Tensor:
    """(N, ...) inputs -> (tokens, H) on every rank, each of which encodes a share of the N.

    All ranks of `groups` have the same inputs and the same weights of `encode`. Every rank then
    holds the gradients of the weights for its share alone; who sums those is said in
    model/mimo.py. `num_tokens` says what any inputs become.
    """
    counts, groups = [], [group for group in groups if group.size() > 1]
    for group in groups:
        shares = [share_inputs(inputs, number, group.size()) for number in range(group.size())]
        counts.append([num_tokens(share) for share in shares])
        inputs = shares[group.rank()]
    embeddings = encode(inputs)
    for group, lengths in zip(reversed(groups), reversed(counts), strict=True):
        embeddings = gather_embeddings(embeddings, lengths, group, group is sum_gradients_over)
    return embeddings


def gather_embeddings(
    local: torch.Tensor, lengths: Sequence[int], group: dist.ProcessGroup, sum_gradients: bool
) -> torch.Tensor:
    """(n_r, H) -> (sum of n_r, H) in the order of ranks, whose n_r are `lengths`.

    The backward pass sums the ranks' gradients where each rank works on a part of the sequence, as
    under context parallelism: its loss depends on items that others encoded. Ranks that compute
    the same all have the same gradients, and each takes those of its own embeddings.
    """
    padded = torch.nn.functional.pad(local, (0, 0, 0, max(lengths) - len(local)))
    whole = gather_from_sequence_parallel_region(padded, sum_gradients, group=group)
    parts = whole.chunk(group.size())
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def parallel_argmax(logits: torch.Tensor) -> torch.Tensor:
    """(..., V / TP) -> (...): the best token over all tensor-parallel ranks' vocabularies."""
    values, indices = logits.float().max(dim=-1)
    indices = indices + mpu.get_tensor_model_parallel_rank() * logits.shape[-1]
    group = mpu.get_tensor_model_parallel_group()
    if group.size() == 1:
        return indices
    all_values = [torch.empty_like(values) for _ in range(group.size())]
    all_indices = [torch.empty_like(indices) for _ in range(group.size())]
    dist.all_gather(all_values, values.contiguous(), group=group)
    dist.all_gather(all_indices, indices.contiguous(), group=group)
    winner = torch.stack(all_values).argmax(dim=0, keepdim=True)
    return torch.stack(all_indices).gather(0, winner).squeeze(0)
