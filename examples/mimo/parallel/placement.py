"""Which ranks hold which module, where encoders are not colocated with the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY

LANGUAGE = MIMO_LANGUAGE_MODULE_KEY


@dataclass(frozen=True)
class Placement:
    """A module on consecutive ranks: split over tp x cp x pp of them, dp replicas of that."""

    name: str
    ranks: range
    tp: int = 1
    cp: int = 1
    pp: int = 1

    @property
    def dp(self) -> int:
        """Data-parallel replicas, which see different samples."""
        return len(self.ranks) // (self.tp * self.cp * self.pp)

    def grid(self) -> HyperCommGrid:
        """The ranks in Megatron's order, for the bridges between modules.

        To a bridge context-parallel ranks are tensor-parallel ones: all get the same embeddings.
        """
        shape = [self.tp * self.cp, 1, self.dp, self.pp]
        return HyperCommGrid(shape, ["tp", "cp", "dp", "pp"], rank_offset=self.ranks.start)


def create_grids(placements: Sequence[Placement]) -> dict[str, HyperCommGrid]:
    """Module -> its grid, with groups of its pipeline stages; every rank must call this."""
    grids = {placement.name: placement.grid() for placement in placements}
    for grid in grids.values():
        grid.create_pg("pp")
    return grids


def here(placements: Sequence[Placement], rank: int) -> Placement:
    """The module that `rank` holds."""
    return next(placement for placement in placements if rank in placement.ranks)
