"""Weight mappings between Hugging Face's tensors and Megatron's, with the layout of each."""

from __future__ import annotations

import importlib
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
    """One tensor, the same on both sides."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = theirs
        return tensor

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        return [ours]


SAME = Same()


@dataclass(frozen=True)
class View:
    """One tensor whose dimensions of size one differ."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = theirs
        return tensor.reshape(self.ours)

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        return [ours.reshape(self.theirs)]


@dataclass(frozen=True)
class Qkv:
    """Queries, keys and values <-> for each group its queries, its key and its value.

    Heads are the first dimension of a weight (heads * head_dim, H) or a bias (heads * head_dim).
    """

    num_heads: int
    num_groups: int

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """(q, k, v) -> (groups * (heads / groups + 2) * head_dim, ...)."""
        groups = [tensor.unflatten(0, (self.num_groups, -1)) for tensor in theirs]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        head_dim = ours.shape[0] // (self.num_heads + 2 * self.num_groups)
        queries = self.num_heads // self.num_groups * head_dim
        groups = ours.unflatten(0, (self.num_groups, -1))
        return [part.flatten(0, 1) for part in groups.split([queries, head_dim, head_dim], 1)]


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
        query, _, value = Qkv(self.num_heads, self.num_heads).split(ours)
        return [query, value]


class GateUp:
    """The gate projection's weights above the up projection's."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """(gate, up) -> (2 * ffn, H)."""
        return torch.cat(list(theirs))

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        return list(ours.chunk(2))


@dataclass(frozen=True)
class Vocabulary:
    """A table with an entry per token; entries beyond theirs start as the mean of theirs."""

    theirs: int
    ours: int

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """(V, H) -> (padded V, H)."""
        (table,) = theirs
        mean = table.mean(dim=0, dtype=torch.float32).to(table.dtype)
        return torch.cat([table, mean.expand(self.ours - self.theirs, -1)])

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        return [ours[: self.theirs]]


@dataclass(frozen=True)
class WeightMapping:
    """Our checkpoint key, the names of their tensors, and the layout between them.

    Names with `{i}` stand for every layer; our checkpoint keeps all layers under one key.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME

    @property
    def layered(self) -> bool:
        """Whether this maps a tensor of every layer."""
        return "{i}" in self.theirs[0]


def renamed(ours: str, theirs: str, *suffixes: str) -> list[WeightMapping]:
    """Mappings of tensors that differ by name alone: `renamed("a.", "b.", "weight", "bias")`."""
    return [WeightMapping(f"{ours}{suffix}", (f"{theirs}{suffix}",)) for suffix in suffixes]


@dataclass(frozen=True)
class Family:
    """One kind of Hugging Face model and its weight mappings, which serve both directions.

    `sections` maps a config.json's model type to where this family's part of it lies ("" for all
    of it). `roots` are the prefixes its tensors may have, told apart by the tensor `anchor`, and
    `spellings` replace names that versions of transformers write differently. `required` are the
    config values this package computes with; `fields` are those that must equal our config's.
    `unused` names their tensors that have no place here; `fixed` makes those that are computed
    here instead of trained. `config` writes a config.json, for a family that transformers can load.
    `describes` says whether a config of ours can be of this family at all.
    """

    name: str
    sections: dict[str, str]
    roots: tuple[str, ...]
    anchor: str
    required: dict[str, Any]
    fields: Callable[[Any], dict[str, Any]]
    num_layers: Callable[[Any], int]
    mappings: Callable[[Any, Any], list[WeightMapping]]
    unused: tuple[str, ...]
    config: Callable[[Any], Any] | None
    describes: Callable[[Any], bool] = lambda config: True
    spellings: tuple[tuple[str, str], ...] = ()
    fixed: Callable[[Any], dict[str, torch.Tensor]] = lambda config: {}


def families_for(config: Any) -> list[Family]:
    """The families whose weights the config of an encoder, projector or language model takes."""
    if config.hf_families is None:
        return []
    module, _, name = config.hf_families.partition(":")
    families = getattr(importlib.import_module(module), name)
    return [family for family in families if family.describes(config)]


def family_of(model_type: str, config: Any, where: str) -> Family:
    """The family a folder's `model_type` belongs to; ValueError when `config` takes no such."""
    families = families_for(config)
    if not families:
        raise ValueError(f"{where}: no weights of Hugging Face fit a {type(config).__name__}")
    for family in families:
        if model_type in family.sections:
            return family
    known = ", ".join(name for family in families for name in family.sections)
    raise ValueError(f"{where}: model type {model_type!r} is none of {known}")


def family_for_export(config: Any) -> Family | None:
    """The family to write `config` as when it came from no folder; None where there is none."""
    return next(iter(families_for(config)), None)
