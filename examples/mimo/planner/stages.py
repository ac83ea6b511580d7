"""Predict the pipeline of a run, and choose the layers of each stage, from the first samples."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch, num_inputs
from examples.mimo.planner.flops import Workload, model_cost
from examples.mimo.planner.pipeline import Split, best_split
from examples.mimo.training.layout import RunShape

COUNTED_SAMPLES = 32


def workload(config: MimoConfig, batches: Sequence[Batch]) -> Workload:
    """The mean micro-batch of `batches`."""

    def mean(counts: Iterable[float]) -> float:
        return statistics.fmean(counts)

    names = config.modalities
    return Workload(
        batch_size=mean(batch.batch_size for batch in batches),
        seq_length=mean(batch.seq_length for batch in batches),
        # A batch without a modality sends one dummy input through its encoder.
        inputs={n: mean(max(1, num_inputs(batch, n)) for batch in batches) for n in names},
        media_tokens={
            n: mean(_count(batch, m.token_id) for batch in batches) for n, m in names.items()
        },
    )


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
    """`layers by stage 1, 3; 8 micro-batches; a bubble of 20 % predicted`."""
    layers = ", ".join(map(str, split.layers))
    count = split.num_micro_batches
    return (
        f"layers by stage {layers}; {count} micro-batch{'es' * (count > 1)}; "
        f"a bubble of {100 * split.timeline.bubble:.0f} % predicted"
    )
