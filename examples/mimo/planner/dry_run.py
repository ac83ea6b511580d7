"""`train.py --dry-run PROCESSES`: predict a run's memory, operations and pipeline, alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from examples.mimo.cli.arguments import (
    WITHOUT_TRANSFORMER_ENGINE,
    balance_stages,
    own_flags,
    parse_arguments,
)
from examples.mimo.cli.header import (
    aligned,
    describe_data,
    is_split,
    layout_name,
    numerics,
    parts_table,
    span,
)
from examples.mimo.planner.flops import Workload
from examples.mimo.planner.memory import StageMemory, place_memory
from examples.mimo.planner.pipeline import (
    COUNTED_SAMPLES,
    Split,
    describe_pipeline,
    predicted_split,
    workload,
)
from examples.mimo.training.layout import RankGroup, RunShape, places, run_shape
from examples.mimo.training.providers import first_batches, transformer_config

MIB = 2**20
# More micro-batches than this make a drawing that shows nothing.
DRAWN_ROUNDS = 3


def plan(argv: Sequence[str]) -> str:
    """The report on the run that `argv` describes; ValueError says why it could not run."""
    processes = own_flags(argv).dry_run
    if processes < 1:
        raise ValueError(f"--dry-run {processes}: name a number of processes, 1 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--dry-run plans any number of processes from one; start without torchrun")
    os.environ["WORLD_SIZE"] = str(processes)
    args, config = parse_arguments(argv)
    balance_stages(args, config)
    # Transformer Engine's layers hold the same, but need memory to be built.
    vars(args).update(WITHOUT_TRANSFORMER_ENGINE)
    args.perform_initialization = False
    shape = run_shape(args)
    memory = {
        place: place_memory(config, shape, transformer_config(args), place)
        for place in places(args)
    }
    work = workload(config, first_batches(args, config, COUNTED_SAMPLES))
    split = predicted_split(config, shape, transformer_config(args), work)
    return "\n".join(
        [
            f"{config.name}: {layout_name(args)} on {processes} "
            f"process{'es' * (processes > 1)}, {numerics(args)}",
            _data(describe_data(args), shape, work),
            *parts_table(config, {p.label: m.parts for p, m in memory.items()}, is_split(args)),
            "",
            "memory of a rank in MiB; activations: sequences of --seq-length, an item of each "
            "modality a sample",
            *_memory_table(memory, split),
            "",
            *_compute(split, memory),
            "",
            *_pipeline(shape, split),
        ]
    )


def _data(source: str, shape: RunShape, work: Workload) -> str:
    inputs = [
        f"{count / shape.micro_batch_size:.1f} for {name}" for name, count in work.inputs.items()
    ]
    of_a_sample = f"; encoder inputs of a sample: {', '.join(inputs)}" if inputs else ""
    return (
        f"data: {source}; {shape.global_batch_size} samples an iteration in "
        f"micro-batches of {shape.micro_batch_size}; {COUNTED_SAMPLES} samples counted: "
        f"{work.batch_size:.0f} sequences of {work.seq_length:.0f} tokens{of_a_sample}"
    )


def _memory_table(memory: Mapping[RankGroup, StageMemory], split: Split) -> list[str]:
    lines = [["held by", "ranks", "parameters", "gradients", "optimizer", "activations", "total"]]
    for place, held in memory.items():
        # All non-colocated encoders together are the timeline's first rank.
        rank = place.stage + (bool(split.cost.ahead) and place.label not in split.cost.ahead)
        kept = sum(
            activations * split.timeline.in_flight(rank, number * split.num_stages + rank)
            for number, activations in enumerate(held.activations)
        )
        counts = [held.parameters, held.gradients, held.optimizer, kept]
        numbers = [f"{count / MIB:,.1f}" for count in [*counts, sum(counts)]]
        lines.append([place.label, span(place.ranks), *numbers])
    return aligned(lines)


def _compute(split: Split, held_by: Iterable[RankGroup]) -> list[str]:
    """Floating-point operations of an iteration, and how they fall on the ranks."""
    cost, ranks = split.cost, {place.label: len(place.ranks) for place in held_by}
    ranks_per_stage = ranks[list(ranks)[-1]]
    parts = {
        "encoders and projectors": cost.first.both * ranks_per_stage
        + sum(encoder.both * ranks[name] for name, encoder in cost.ahead.items()),
        "layers": cost.layer.both * sum(split.layers) * ranks_per_stage,
        "head": cost.last.both * ranks_per_stage,
    }
    total = sum(parts.values())
    shares = ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in parts.items())
    count = total * split.num_micro_batches
    lines = [f"floating-point operations of an iteration: {count:.3g} ({shares})"]
    if len(ranks) == 1:
        return lines
    stages = [0.0] * split.num_stages
    for number, chunk in enumerate(replace(cost, ahead={}).chunks(split.layers)):
        stages[number % split.num_stages] += chunk.both
    per_rank = [*(encoder.both for encoder in cost.ahead.values()), *stages]
    most = max(per_rank)
    relative = [f"{name} {work / most:.2f}" for name, work in zip(ranks, per_rank, strict=True)]
    return [*lines, f"a rank's share, the busiest's being 1: {', '.join(relative)}"]


def _pipeline(shape: RunShape, split: Split) -> list[str]:
    if len(split.timeline.ranks) == 1:
        return ["no pipeline: every rank runs the whole model"]
    schedule = "interleaved 1F1B" if shape.virtual_stages else "1F1B"
    lines = [f"pipeline ({schedule}): {describe_pipeline(split)}"]
    drawn = split.shortened(DRAWN_ROUNDS * shape.pp).timeline.draw()
    labels = ["encoders"] * bool(split.cost.ahead) + [str(i) for i in range(split.num_stages)]
    width = max(3, *map(len, labels))
    lines += [f"  {label:>{width}} {line}" for label, line in zip(labels, drawn, strict=True)]
    lines.append(
        " " * (width + 3)
        + "digits: a micro-batch's forward pass, letters: its backward pass, .: waits"
    )
    return lines
