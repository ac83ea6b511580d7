"""What a weight table is made of: rows of names, and how tensors are laid out on each side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Layout(Protocol):
    """A reversible change between Hugging Face's tensors and this package's one."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Their tensors -> ours."""

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """Ours -> theirs, in the same order."""


class Same:
    """One tensor, as it is."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor."""
        (tensor,) = theirs
        return tensor

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The tensor."""
        return [ours]


SAME = Same()


@dataclass(frozen=True)
class View:
    """One tensor whose dimensions of size one differ."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """In our shape."""
        (tensor,) = theirs
        return tensor.reshape(self.ours)

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """In their shape."""
        return [ours.reshape(self.theirs)]


@dataclass(frozen=True)
class Qkv:
    """Queries, keys and values <-> per group its queries, its key and its value.

    Heads are the first dimension of a weight (heads * head_dim, H) or a bias (heads * head_dim).
    """

    num_heads: int
    num_groups: int

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """(q, k, v) -> (groups * (heads / groups + 2) * head_dim, ...)."""
        rows = [tensor.unflatten(0, (self.num_groups, -1)) for tensor in theirs]
        return torch.cat(rows, dim=1).flatten(0, 1)

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The reverse."""
        head_dim = ours.shape[0] // (self.num_heads + 2 * self.num_groups)
        queries = self.num_heads // self.num_groups * head_dim
        rows = ours.unflatten(0, (self.num_groups, -1)).split([queries, head_dim, head_dim], 1)
        return [part.flatten(0, 1) for part in rows]


@dataclass(frozen=True)
class QkvWithoutKeyBias:
    """The bias of queries and values; Whisper's keys have none.

    A bias of the keys moves all scores of a query alike, which softmax does not see, so ours is
    zero on the way in and dropped on the way out.
    """

    num_heads: int

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """(q, v) -> (3 * H,)."""
        query, value = theirs
        return Qkv(self.num_heads, self.num_heads).join([query, torch.zeros_like(query), value])

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The reverse."""
        query, _, value = Qkv(self.num_heads, self.num_heads).split(ours)
        return [query, value]


class GateUp:
    """The gate's rows above the up projection's."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """(gate, up) -> (2 * ffn, H)."""
        return torch.cat(list(theirs))

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The reverse."""
        return list(ours.chunk(2))


@dataclass(frozen=True)
class Vocabulary:
    """A table with a row per token; rows beyond theirs are ours, and start as their mean."""

    theirs: int
    ours: int

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """(V, H) -> (padded V, H)."""
        (table,) = theirs
        mean = table.mean(dim=0, dtype=torch.float32).to(table.dtype)
        return torch.cat([table, mean.expand(self.ours - self.theirs, -1)])

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """The reverse."""
        return [ours[: self.theirs]]


@dataclass(frozen=True)
class Row:
    """Our checkpoint key, their tensors' names, and the layout between them.

    Names with `{i}` stand for every layer; our checkpoint keeps all layers under one key.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME

    @property
    def layered(self) -> bool:
        """Whether it stands for every layer."""
        return "{i}" in self.theirs[0]


def rows(ours: str, theirs: str, *suffixes: str) -> list[Row]:
    """A row for each suffix of a pair of names: `rows("a.", "b.", "weight", "bias")`."""
    return [Row(f"{ours}{suffix}", (f"{theirs}{suffix}",)) for suffix in suffixes]


@dataclass(frozen=True)
class Family:
    """One kind of Hugging Face model, and its table, read in both directions.

    `sections` maps a config.json's model type to where this family's part of it lies ("" for all
    of it). `roots` are the prefixes its tensors may have, told apart by the tensor `anchor`, and
    `spellings` replace names that versions of transformers write differently. `required` are the
    config values this package computes with; `fields` are those that must equal our config's.
    `unused` names their tensors that have no place here; `fixed` makes those that are computed
    here, not learned. `config` writes a config.json, for a family
    that transformers knows alone. `describes` says whether one of our configs
    can be of this family at all.
    """

    name: str
    sections: dict[str, str]
    roots: tuple[str, ...]
    anchor: str
    required: dict[str, Any]
    fields: Callable[[Any], dict[str, Any]]
    num_layers: Callable[[Any], int]
    table: Callable[[Any, Any], list[Row]]
    unused: tuple[str, ...]
    config: Callable[[Any], Any] | None
    describes: Callable[[Any], bool] = lambda config: True
    spellings: tuple[tuple[str, str], ...] = ()
    fixed: Callable[[Any], dict[str, torch.Tensor]] = lambda config: {}
