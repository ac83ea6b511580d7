"""`train.py --dry-run PROCESSES`: what a run would hold and compute, from one process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.planning.balance import Split
from examples.mimo.planning.costs import Workload
from examples.mimo.training.arguments import (
    WITHOUT_TRANSFORMER_ENGINE,
    own_flags,
    parse_arguments,
)
from examples.mimo.training.header import (
    aligned,
    describe_data,
    layout_name,
    numerics,
    parts_table,
)
from examples.mimo.training.memory import StageMemory, stage_memory
from examples.mimo.training.providers import transformer_config
from examples.mimo.training.stages import (
    COUNTED_SAMPLES,
    describe_pipeline,
    num_micro_batches,
    predicted_split,
    workload,
)

MIB = 2**20
# More micro-batches than this make a drawing that shows nothing.
DRAWN_ROUNDS = 3


def plan(argv: Sequence[str]) -> str:
    """The report on the run that `argv` describes; ValueError says why it could not run."""
    processes = own_flags(argv).dry_run
    if processes < 1:
        raise ValueError(f"--dry-run {processes}: say a number of processes, 1 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--dry-run plans for any number of processes alone; leave torchrun away")
    os.environ["WORLD_SIZE"] = str(processes)
    args, config = parse_arguments(argv)
    # Transformer Engine's layers hold the same, but want memory to be built.
    vars(args).update(WITHOUT_TRANSFORMER_ENGINE)
    args.perform_initialization = False
    stages = range(args.pipeline_model_parallel_size)
    memory = [stage_memory(config, args, stage) for stage in stages]
    work = workload(args, config)
    split = predicted_split(args, config, transformer_config(args), work)
    return "\n".join(
        [
            f"{config.name}: {layout_name(args)} on {processes} "
            f"process{'es' * (processes > 1)}, {numerics(args)}",
            _data(args, config, work),
            *parts_table(config, [m.parts for m in memory], args.tensor_model_parallel_size > 1),
            "",
            "memory of a rank in MiB; activations: rows of --seq-length, an item of each modality "
            "a sample",
            *_memory_table(args, memory, split),
            "",
            *_compute(args, split),
            "",
            *_pipeline(args, split),
        ]
    )


def _data(args: argparse.Namespace, config: MimoConfig, work: Workload) -> str:
    counts = [
        f"{work.items[name] / args.micro_batch_size:.1f} {name}" for name in config.modalities
    ]
    held = f", {' and '.join(counts)} a sample" if counts else ""
    return (
        f"data: {describe_data(args)}; {args.global_batch_size} samples an iteration in "
        f"micro-batches of {args.micro_batch_size}; {COUNTED_SAMPLES} of them counted: "
        f"{work.num_rows:.0f} rows of {work.num_columns:.0f} tokens{held}"
    )


def _memory_table(args: argparse.Namespace, memory: list[StageMemory], split: Split) -> list[str]:
    rows = [["stage", "ranks", "parameters", "gradients", "optimizer", "activations", "in all"]]
    per_stage = args.world_size // len(memory)
    for stage, held in enumerate(memory):
        kept = sum(
            one * split.timeline.in_flight(stage, number * len(memory) + stage)
            for number, one in enumerate(held.activations)
        )
        counts = [held.parameters, held.gradients, held.optimizer, kept]
        first = stage * per_stage
        ranks = f"{first}-{first + per_stage - 1}" if per_stage > 1 else str(first)
        numbers = [f"{count / MIB:,.1f}" for count in [*counts, sum(counts)]]
        rows.append([str(stage), ranks, *numbers])
    return aligned(rows)


def _compute(args: argparse.Namespace, split: Split) -> list[str]:
    """Floating-point operations of an iteration, and how they fall on the stages."""
    cost = split.cost
    stages = args.pipeline_model_parallel_size
    per_rank = [0.0] * stages
    for number, chunk in enumerate(cost.chunks(split.layers)):
        per_rank[number % stages] += chunk.both
    ranks = args.world_size // stages
    total = sum(per_rank) * num_micro_batches(args) * ranks
    parts = {
        "encoders and projectors": cost.first.both,
        "layers": cost.layer.both * sum(split.layers),
        "head": cost.last.both,
    }
    shares = [f"{name} {100 * part / sum(per_rank):.0f} %" for name, part in parts.items()]
    by_stage = ", ".join(f"{100 * one / sum(per_rank):.0f} %" for one in per_rank)
    lines = [f"floating-point operations of an iteration: {total:.3g} ({', '.join(shares)})"]
    return lines + [f"by stage: {by_stage}"] * (stages > 1)


def _pipeline(args: argparse.Namespace, split: Split) -> list[str]:
    if args.pipeline_model_parallel_size == 1:
        return ["no pipeline: every rank runs the whole model"]
    schedule = "interleaved 1F1B" if args.virtual_pipeline_model_parallel_size else "1F1B"
    lines = [f"pipeline ({schedule}): {describe_pipeline(split, args)}"]
    drawn = split.shortened(DRAWN_ROUNDS * args.pipeline_model_parallel_size)
    lines += [f"  {stage:>3} {row}" for stage, row in enumerate(drawn.timeline.draw())]
    lines.append("      digits: a micro-batch's forward pass, letters: its backward pass, .: waits")
    return lines
