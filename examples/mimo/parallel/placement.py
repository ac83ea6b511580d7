"""Which ranks hold which module, when encoders have ranks of their own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY

LANGUAGE = MIMO_LANGUAGE_MODULE_KEY


@dataclass(frozen=True)
class Placement:
    """A module on a run of ranks: split over tp x cp x pp of them, and copied to the others."""

    name: str
    ranks: range
    tp: int = 1
    cp: int = 1
    pp: int = 1

    @property
    def dp(self) -> int:
        """Copies that see different samples."""
        return len(self.ranks) // (self.tp * self.cp * self.pp)

    def grid(self) -> HyperCommGrid:
        """The ranks in Megatron's order, for the bridges between modules.

        To a bridge context-parallel ranks are tensor-parallel ones: all get the same rows.
        """
        shape = [self.tp * self.cp, 1, self.dp, self.pp]
        return HyperCommGrid(shape, ["tp", "cp", "dp", "pp"], rank_offset=self.ranks.start)


def parse_ranks(words: Sequence[str], names: Collection[str], num_ranks: int) -> dict[str, range]:
    """`images=0 audios=1-2` -> modality -> its ranks; ValueError unless each has its own."""
    found: dict[str, range] = {}
    for word in words:
        match = re.fullmatch(r"([^=]+)=(\d+)(?:-(\d+))?", word)
        if not match:
            raise ValueError(f"--encoder-ranks {word}: write NAME=RANK or NAME=FIRST-LAST")
        name, first, last = match[1], int(match[2]), int(match[3] or match[2])
        if name not in names:
            raise ValueError(
                f"--encoder-ranks {word}: the model has the modalities {', '.join(names)}"
            )
        if name in found:
            raise ValueError(f"--encoder-ranks {word}: {name} has ranks already")
        if last < first or last >= num_ranks:
            raise ValueError(
                f"--encoder-ranks {word}: {num_ranks} processes have the ranks 0 to {num_ranks - 1}"
            )
        found[name] = range(first, last + 1)
    for name in names:
        if name not in found:
            raise ValueError(
                f"--encoder-ranks says nothing of {name}; name ranks for {', '.join(names)}"
            )
    return found


def language_ranks(encoders: Mapping[str, range], num_ranks: int) -> range:
    """The one run of ranks that no encoder has; ValueError when there is none."""
    holders: dict[int, str] = {}
    for name, ranks in encoders.items():
        for rank in ranks:
            if rank in holders:
                raise ValueError(
                    f"--encoder-ranks: {holders[rank]} and {name} both have rank {rank}; a rank "
                    "holds one module"
                )
            holders[rank] = name
    left = [rank for rank in range(num_ranks) if rank not in holders]
    if not left:
        raise ValueError(
            f"--encoder-ranks takes all {num_ranks} processes and leaves none for the language "
            "model; start more"
        )
    if left != list(range(left[0], left[-1] + 1)):
        raise ValueError(
            f"--encoder-ranks leaves the language model the ranks {', '.join(map(str, left))}, "
            "which do not follow one another; move the encoders to one end"
        )
    return range(left[0], left[-1] + 1)


def encoder_placements(
    encoders: Mapping[str, range], tensor_parallel: Mapping[str, int], language_dp: int
) -> list[Placement]:
    """ValueError unless each encoder's ranks divide as its flags say and pair up with the others.

    Copies of an encoder and of the language model exchange whole shares of a batch.
    """
    placed = []
    for name, ranks in encoders.items():
        tp = tensor_parallel[name]
        if tp < 1 or len(ranks) % tp:
            raise ValueError(
                f"--encoder-ranks gives {name} {len(ranks)} ranks, which do not divide by its "
                f"--encoder-tensor-model-parallel-size {tp}"
            )
        placement = Placement(name, ranks, tp)
        if placement.dp % language_dp and language_dp % placement.dp:
            raise ValueError(
                f"--encoder-ranks makes {placement.dp} copies of {name}'s encoder for "
                f"{language_dp} of the language model; one must be a multiple of the other"
            )
        placed.append(placement)
    return placed


def create_grids(placements: Sequence[Placement]) -> dict[str, HyperCommGrid]:
    """Module -> its grid, with groups of its pipeline stages; every rank must call this."""
    grids = {placement.name: placement.grid() for placement in placements}
    for grid in grids.values():
        grid.create_pg("pp")
    return grids


def here(placements: Sequence[Placement], rank: int) -> Placement:
    """The module that `rank` holds."""
    return next(placement for placement in placements if rank in placement.ranks)
