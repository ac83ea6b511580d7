"""Context parallelism: a row of sequences over ranks, in the order that Megatron balances.

Of each sequence rank r of c holds the chunks r and 2c - 1 - r of 2c, so that causal attention
costs every rank the same (arXiv:2407.21783, section 3.3.2, gathers keys and values as this package
does). `bounds` are the starts of the sequences in the whole row, and its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The numbers of a rank's two chunks, of 2 * size."""
    return rank, 2 * size - 1 - rank


def shard_sequence(
    whole: torch.Tensor, dim: int, group: dist.ProcessGroup, cu_seqlens: Sequence[int] | None = None
) -> torch.Tensor:
    """This rank's part of a row along `dim`; every sequence's length divides by 2c."""
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


def gather_rows(
    local: torch.Tensor, group: dist.ProcessGroup, partial_gradients: bool
) -> torch.Tensor:
    """(n_r, H) -> (sum of n_r, H) in the order of ranks.

    The ranks' gradients are summed where each rank uses the rows for a part of the work, as under
    context parallelism; else all ranks have the same, and each takes its own rows.
    """
    mine = torch.tensor([len(local)], device=local.device)
    lengths = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(lengths, mine, group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.nn.functional.pad(local, (0, 0, 0, longest - len(local)))
    whole = gather_from_sequence_parallel_region(padded, partial_gradients, group=group)
    parts = whole.chunk(group.size())
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])
