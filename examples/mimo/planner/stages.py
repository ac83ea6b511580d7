"""The layers of each pipeline stage: how many, and what pipeline they are predicted to make."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch, num_inputs
from examples.mimo.planner.costs import Workload, model_cost
from examples.mimo.planner.pipeline import Split, best_split
from examples.mimo.training.layout import language_processes, placements
from examples.mimo.training.providers import first_batches

COUNTED_SAMPLES = 32

OTHER_SPLITS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
    "num_layers_per_virtual_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def balance_stages(args: argparse.Namespace, config: MimoConfig) -> None:
    """Sets --pipeline-model-parallel-layout; for arguments that are not validated yet."""
    stages = args.pipeline_model_parallel_size
    if stages == 1:
        raise ValueError("--balance-stages needs --pipeline-model-parallel-size of 2 or more")
    for name in OTHER_SPLITS:
        if getattr(args, name):
            raise ValueError(
                f"--balance-stages and --{name.replace('_', '-')} both choose the split; drop one "
                "(virtual stages: --num-virtual-stages-per-pipeline-rank)"
            )
    chunks = stages * (args.num_virtual_stages_per_pipeline_rank or 1)
    args.num_virtual_stages_per_pipeline_rank = None
    cost = model_cost(config, args, workload(args, config), placements(args))
    split = best_split(cost, args.num_layers, stages, chunks, num_micro_batches(args))
    args.pipeline_model_parallel_layout = split.flag


def workload(args: argparse.Namespace, config: MimoConfig) -> Workload:
    """The mean micro-batch of the first samples of the training data."""
    batches = first_batches(args, config, COUNTED_SAMPLES)

    def mean(counts: Iterable[float]) -> float:
        return statistics.fmean(counts)

    names = config.modalities
    return Workload(
        batch_size=mean(batch.batch_size for batch in batches),
        seq_length=mean(batch.seq_length for batch in batches),
        # A batch without a modality sends one made-up item through its encoder.
        inputs={n: mean(max(1, num_inputs(batch, n)) for batch in batches) for n in names},
        media_tokens={
            n: mean(_count(batch, m.token_id) for batch in batches) for n, m in names.items()
        },
    )


def _count(batch: Batch, token_id: int) -> int:
    assert batch.input_ids is not None
    return int((batch.input_ids == token_id).sum())


def num_micro_batches(args: argparse.Namespace) -> int:
    """Micro-batches of an iteration on one data-parallel rank."""
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    data = language_processes(args) // (model * args.context_parallel_size)
    return max(1, (args.global_batch_size or 1) // (args.micro_batch_size * data))


def predicted_split(
    args: argparse.Namespace, config: MimoConfig, transformer: Any, work: Workload
) -> Split:
    """The split that Megatron will build, on the clock; `transformer` is the TransformerConfig."""
    return Split(
        cost=model_cost(config, args, work, placements(args)),
        layers=layers_per_chunk(transformer),
        num_stages=args.pipeline_model_parallel_size,
        num_micro_batches=num_micro_batches(args),
    )


def layers_per_chunk(transformer: Any) -> tuple[int, ...]:
    """In the model's order."""
    stages = transformer.pipeline_model_parallel_size
    virtual = transformer.virtual_pipeline_model_parallel_size
    places = [(v, p) for v in range(virtual or 1) for p in range(stages)]
    layout = transformer.pipeline_model_parallel_layout
    if layout:
        return tuple(layout.layout[p][v].count(LayerType.decoder) for v, p in places)
    return tuple(get_num_layers_to_build(transformer, v if virtual else None, p) for v, p in places)


def describe_pipeline(split: Split, args: argparse.Namespace) -> str:
    """`layers by stage 1, 3; 8 micro-batches; bubble 20 % predicted`."""
    layers = ", ".join(map(str, split.layers))
    count = num_micro_batches(args)
    return (
        f"layers by stage {layers}; {count} micro-batch{'es' * (count > 1)}; "
        f"a bubble of {100 * split.timeline.bubble:.0f} % predicted"
    )
