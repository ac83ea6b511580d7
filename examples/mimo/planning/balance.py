"""Which stage gets how many layers, when the first also holds encoders and the last the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from examples.mimo.planning.schedule import Cost, Timeline, simulate

# A long run of micro-batches favours the split that its first rounds favour.
SIMULATED_ROUNDS = 4


@dataclass(frozen=True)
class ModelCost:
    """One micro-batch through a layer of the language model, and through what is not a layer.

    `first` is what the first chunk holds besides layers, `last` what the last one does.
    `ahead` are modules on ranks of their own, which run side by side before the first chunk.
    """

    layer: Cost
    first: Cost
    last: Cost
    ahead: Mapping[str, Cost] = field(default_factory=dict)

    def chunks(self, layers: tuple[int, ...]) -> list[Cost]:
        """The cost of each chunk, which holds so many layers, after the slowest module ahead."""
        costs = [self.layer * count for count in layers]
        costs[0] += self.first
        costs[-1] += self.last
        slowest = sorted(self.ahead.values(), key=lambda cost: cost.both)[-1:]
        return slowest + costs


@dataclass(frozen=True)
class Split:
    """Layers per chunk, and the pipeline they are predicted to make."""

    cost: ModelCost
    layers: tuple[int, ...]
    num_stages: int
    num_micro_batches: int

    @cached_property
    def timeline(self) -> Timeline:
        """The steps of an iteration; modules that run ahead are its first rank."""
        stages = self.num_stages + bool(self.cost.ahead)
        return simulate(self.cost.chunks(self.layers), stages, self.num_micro_batches)

    def shortened(self, num_micro_batches: int) -> Split:
        """The same with no more micro-batches than these."""
        return replace(self, num_micro_batches=min(self.num_micro_batches, num_micro_batches))

    @property
    def flag(self) -> str:
        """The split as Megatron's --pipeline-model-parallel-layout takes it."""
        stages = ["t" * count for count in self.layers]
        stages[0] = "E" + stages[0]
        stages[-1] += "L"
        return "|".join(stages)


def best_split(
    cost: ModelCost, num_layers: int, num_stages: int, num_chunks: int, num_micro_batches: int
) -> Split:
    """The split with the shortest iteration; among equals the one nearest to even."""
    candidates = [
        Split(cost, layers, num_stages, num_micro_batches).shortened(SIMULATED_ROUNDS * num_stages)
        for layers in _splits(num_layers, num_chunks)
    ]
    shortest = min(split.timeline.seconds for split in candidates)
    best = min(
        (split for split in candidates if split.timeline.seconds <= shortest * (1 + 1e-9)),
        key=lambda split: max(split.layers) - min(split.layers),
    )
    return replace(best, num_micro_batches=num_micro_batches)


def _splits(num_layers: int, num_chunks: int) -> list[tuple[int, ...]]:
    """Any number of layers on the first and the last chunk, the rest as even as they go."""
    middle = num_chunks - 2
    splits = []
    for first in range(num_layers + 1):
        lasts = range(num_layers - first + 1) if middle else [num_layers - first]
        for last in lasts:
            rest = num_layers - first - last
            if rest < middle:
                continue
            between = [(rest + i) // middle for i in range(middle)]
            splits.append((first, *between, last))
    return splits
