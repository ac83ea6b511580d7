"""Pipeline schedules: 1F1B timeline, bubble, and the layer split with the shortest iteration."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch
from examples.mimo.planner.flops import Cost, ModelCost, Workload, model_cost
from examples.mimo.training.layout import RunShape

# A long run of micro-batches favours the split that its first rounds favour.
SIMULATED_ROUNDS = 4
# Training samples that are read to estimate the mean micro-batch.
COUNTED_SAMPLES = 32


@dataclass(frozen=True)
class Step:
    """One micro-batch through one chunk; chunks are numbered along the model."""

    micro_batch: int
    chunk: int
    forward: bool
    start: float = 0.0
    end: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """The steps of each rank of a pipeline, in the order they run."""

    ranks: list[list[Step]]

    @property
    def seconds(self) -> float:
        """From the first step to the end of the last one, in the unit of the costs."""
        return max(step.end for steps in self.ranks for step in steps)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait."""
        busy = sum(step.end - step.start for steps in self.ranks for step in steps)
        return 1 - busy / (self.seconds * len(self.ranks)) if self.seconds else 0.0

    def in_flight(self, rank: int, chunk: int) -> int:
        """The most micro-batches of a chunk that a rank holds for their backward pass."""
        held = most = 0
        for step in self.ranks[rank]:
            if step.chunk == chunk:
                held += 1 if step.forward else -1
                most = max(most, held)
        return most

    def draw(self, width: int = 96) -> list[str]:
        """A line a rank: a digit is a micro-batch's forward pass, a letter its backward pass."""
        return [self._draw_rank(steps, width) for steps in self.ranks]

    def _draw_rank(self, steps: list[Step], width: int) -> str:
        cells = ["."] * width
        for step in steps:
            begin = round(step.start / self.seconds * width)
            end = round(step.end / self.seconds * width)
            mark = str(step.micro_batch % 10) if step.forward else chr(97 + step.micro_batch % 26)
            cells[begin:end] = mark * (end - begin)
        return "".join(cells)


def simulate(chunks: Sequence[Cost], num_stages: int, num_micro_batches: int) -> Timeline:
    """`chunks` in the model's order; chunk i lives on rank i % num_stages."""
    chunks_per_rank = len(chunks) // num_stages
    waiting = [
        rank_order(rank, num_stages, chunks_per_rank, num_micro_batches)[::-1]
        for rank in range(num_stages)
    ]
    done: dict[tuple[int, int, bool], float] = {}
    ranks: list[list[Step]] = [[] for _ in range(num_stages)]
    while any(waiting):
        before = len(done)
        for steps, finished in zip(waiting, ranks, strict=True):
            while steps and (ready := _ready(steps[-1], done, len(chunks))) is not None:
                step = steps.pop()
                cost = chunks[step.chunk]
                start = max(ready, finished[-1].end if finished else 0.0)
                end = start + (cost.forward if step.forward else cost.backward)
                finished.append(Step(step.micro_batch, step.chunk, step.forward, start, end))
                done[step.micro_batch, step.chunk, step.forward] = end
        assert len(done) > before, "the schedule waits for itself"
    return Timeline(ranks)


def rank_order(
    rank: int, num_stages: int, chunks_per_rank: int, num_micro_batches: int
) -> list[Step]:
    """A rank's steps: forward passes to warm up, then one forward, one backward, then the rest."""
    forward, backward = [], []
    for group in range(0, num_micro_batches, num_stages):
        micro_batches = range(group, min(group + num_stages, num_micro_batches))
        for number in range(chunks_per_rank):
            there, back = number, chunks_per_rank - 1 - number
            forward += [Step(m, there * num_stages + rank, True) for m in micro_batches]
            backward += [Step(m, back * num_stages + rank, False) for m in micro_batches]
    warmup = num_stages - rank - 1
    if chunks_per_rank > 1:
        warmup = 2 * warmup + (chunks_per_rank - 1) * num_stages
    steady = [step for pair in zip(forward[warmup:], backward, strict=False) for step in pair]
    return forward[:warmup] + steady + backward[len(steady) // 2 :]


def _ready(step: Step, done: dict[tuple[int, int, bool], float], num_chunks: int) -> float | None:
    """When a step's input is there; None while it is not."""
    if step.forward:
        return done.get((step.micro_batch, step.chunk - 1, True)) if step.chunk else 0.0
    if step.chunk == num_chunks - 1:
        return done.get((step.micro_batch, step.chunk, True))
    return done.get((step.micro_batch, step.chunk + 1, False))


@dataclass(frozen=True)
class Split:
    """Layers per chunk, and the pipeline they are predicted to make."""

    cost: ModelCost
    layers: tuple[int, ...]
    num_stages: int
    num_micro_batches: int

    @cached_property
    def timeline(self) -> Timeline:
        """The steps of an iteration; non-colocated encoders are its first rank."""
        stages = self.num_stages + bool(self.cost.ahead)
        return simulate(self.cost.chunks(self.layers), stages, self.num_micro_batches)

    def shortened(self, num_micro_batches: int) -> Split:
        """The same with no more micro-batches than these."""
        return replace(self, num_micro_batches=min(self.num_micro_batches, num_micro_batches))


def layout_flag(layers: Sequence[int]) -> str:
    """Layers per chunk as Megatron's --pipeline-model-parallel-layout takes them: `Et|tttL`."""
    chunks = ["t" * count for count in layers]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "L"
    return "|".join(chunks)


def even_split(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Layers per chunk, at most one apart."""
    return tuple((num_layers + i) // num_chunks for i in range(num_chunks))


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
    """Any number of layers on the first and the last chunk, the others split evenly."""
    middle = num_chunks - 2
    splits = []
    for first in range(num_layers + 1):
        lasts = range(num_layers - first + 1) if middle else [num_layers - first]
        for last in lasts:
            rest = num_layers - first - last
            if rest < middle:
                continue
            between = even_split(rest, middle) if middle else ()
            splits.append((first, *between, last))
    return splits


def workload(config: MimoConfig, batches: Sequence[Batch]) -> Workload:
    """The mean micro-batch of `batches`."""

    def mean(counts: Iterable[float]) -> float:
        return statistics.fmean(counts)

    names = config.inputs
    return Workload(
        batch_size=mean(batch.batch_size for batch in batches),
        seq_length=mean(batch.seq_length for batch in batches),
        # A batch without a modality sends one dummy input through its encoder.
        inputs={n: mean(max(1, num_inputs(batch, n)) for batch in batches) for n in names},
        media_tokens={
            n: mean(_count(batch, m.token_id) for batch in batches) for n, m in names.items()
        },
        target_share=mean(_target_share(batch) for batch in batches),
    )


def num_inputs(batch: Batch, modality: str) -> int:
    """How many inputs the encoder of `modality` has to work on."""
    inputs = batch.modality_inputs.get(modality)
    return len(next(iter(inputs.values()))) if inputs else 0


def _target_share(batch: Batch) -> float:
    assert batch.loss_mask is not None
    return float(batch.loss_mask.mean())


def _count(batch: Batch, token_id: int) -> int:
    assert batch.input_ids is not None
    return int((batch.input_ids == token_id).sum())


def balanced_split(config: MimoConfig, shape: RunShape, work: Workload) -> Split:
    """The layers per chunk with the shortest predicted iteration."""
    return best_split(
        model_cost(config, shape, work),
        config.language.num_layers,
        shape.pp,
        shape.pp * (shape.virtual_stages or 1),
        shape.num_micro_batches,
    )


def predicted_split(
    config: MimoConfig, shape: RunShape, transformer_config: TransformerConfig, work: Workload
) -> Split:
    """The split that Megatron will build, with its predicted timeline."""
    return Split(
        cost=model_cost(config, shape, work),
        layers=layers_per_chunk(transformer_config),
        num_stages=shape.pp,
        num_micro_batches=shape.num_micro_batches,
    )


def layers_per_chunk(transformer_config: TransformerConfig) -> tuple[int, ...]:
    """Layers of each chunk that Megatron builds, in the model's order."""
    stages = transformer_config.pipeline_model_parallel_size
    virtual = transformer_config.virtual_pipeline_model_parallel_size
    chunks = [(v, p) for v in range(virtual or 1) for p in range(stages)]
    layout = transformer_config.pipeline_model_parallel_layout
    if layout:
        return tuple(layout.layout[p][v].count(LayerType.decoder) for v, p in chunks)
    return tuple(
        get_num_layers_to_build(transformer_config, v if virtual else None, p) for v, p in chunks
    )


def describe_pipeline(split: Split) -> str:
    """One line: `layers by stage 1, 3; 8 micro-batches; a bubble of 20 % predicted`."""
    layers = ", ".join(map(str, split.layers))
    count = split.num_micro_batches
    return (
        f"layers by stage {layers}; {count} micro-batch{'es' * (count > 1)}; "
        f"a bubble of {100 * split.timeline.bubble:.0f} % predicted"
    )
