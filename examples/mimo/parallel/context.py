"""Context parallelism: sharding of sequences, and of media items, over ranks.

Sequences are cut in the order that Megatron balances: rank r of c holds the chunks r and
2c - 1 - r of 2c, so that causal attention costs every rank the same (arXiv:2407.21783, section
3.3.2, gathers keys and values as this package does). `cu_seqlens` are the starts of the samples in
a packed sequence, and its end. Media are shared out by item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The numbers of a rank's two chunks, of 2 * size."""
    return rank, 2 * size - 1 - rank


def shard_sequence(
    whole: torch.Tensor, dim: int, group: dist.ProcessGroup, cu_seqlens: Sequence[int] | None = None
) -> torch.Tensor:
    """This rank's S / c of the S positions along `dim`; sample lengths are divisible by 2c."""
    if group.size() == 1:
        return whole
    parts = []
    for start, end in pairwise(cu_seqlens or (0, whole.shape[dim])):
        chunks = whole.narrow(dim, start, end - start).chunk(2 * group.size(), dim)
        parts += [chunks[number] for number in chunks_of(group.rank(), group.size())]
    return torch.cat(parts, dim)


def gather_sequence(
    local: torch.Tensor, group: dist.ProcessGroup, cu_seqlens: Sequence[int]
) -> torch.Tensor:
    """(S / c, ...) -> (S, ...) in order; gradients are summed over the ranks that used them."""
    size = group.size()
    blocks = gather_from_sequence_parallel_region(local, group=group).chunk(size)
    parts: list[torch.Tensor] = []
    for start, end in pairwise(cu_seqlens):
        halves = [block[start // size : end // size].chunk(2) for block in blocks]
        parts += [front for front, _ in halves]
        parts += [back for _, back in reversed(halves)]
    return torch.cat(parts)


def share_of(count: int, number: int, shares: int) -> slice:
    """Run `number` of `count` items in `shares` runs, which differ by one item at most."""
    return slice(count * number // shares, count * (number + 1) // shares)


def encode_shares(
    encode: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    inputs: dict[str, torch.Tensor],
    groups: Sequence[dist.ProcessGroup],
    sum_gradients_over: dist.ProcessGroup,
) -> torch.Tensor:
    """(N, ...) inputs -> (tokens, H) on every rank, each of which encodes a share of the N.

    All ranks of `groups` have the same inputs and the same weights of `encode`. Every rank then
    holds the gradients of the weights for its share alone; who sums those is said in
    model/mimo.py.
    """
    groups = [group for group in groups if group.size() > 1]
    for group in groups:
        share = share_of(len(next(iter(inputs.values()))), group.rank(), group.size())
        inputs = {name: tensor[share] for name, tensor in inputs.items()}
    embeddings = encode(inputs)
    for group in reversed(groups):
        embeddings = gather_embeddings(embeddings, group, group is sum_gradients_over)
    return embeddings


def gather_embeddings(
    local: torch.Tensor, group: dist.ProcessGroup, sum_gradients: bool
) -> torch.Tensor:
    """(n_r, H) -> (sum of n_r, H) in the order of ranks.

    The backward pass sums the ranks' gradients where each rank works on a part of the sequence, as
    under context parallelism: its loss depends on items that others encoded. Ranks that compute
    the same all have the same gradients, and each takes those of its own embeddings.
    """
    count = torch.tensor([len(local)], device=local.device)
    counts = [torch.empty_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    lengths = [int(length) for length in counts]
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
