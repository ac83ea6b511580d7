"""`train.py --dry-run PROCESSES`: what a run would hold and compute, from one process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from examples.mimo.cli.arguments import WITHOUT_TRANSFORMER_ENGINE, own_flags, parse_arguments
from examples.mimo.cli.header import (
    aligned,
    describe_data,
    is_split,
    layout_name,
    numerics,
    parts_table,
    span,
)
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.planner.costs import Workload
from examples.mimo.planner.memory import StageMemory, place_memory
from examples.mimo.planner.pipeline import Split
from examples.mimo.planner.stages import (
    COUNTED_SAMPLES,
    describe_pipeline,
    num_micro_batches,
    predicted_split,
    workload,
)
from examples.mimo.training.layout import RankGroup, places
from examples.mimo.training.providers import transformer_config

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
    memory = {place: place_memory(config, args, place) for place in places(args)}
    work = workload(args, config)
    split = predicted_split(args, config, transformer_config(args), work)
    return "\n".join(
        [
            f"{config.name}: {layout_name(args)} on {processes} "
            f"process{'es' * (processes > 1)}, {numerics(args)}",
            _data(args, config, work),
            *parts_table(config, {p.label: m.parts for p, m in memory.items()}, is_split(args)),
            "",
            "memory of a rank in MiB; activations: rows of --seq-length, an item of each modality "
            "a sample",
            *_memory_table(memory, split),
            "",
            *_compute(args, split, memory),
            "",
            *_pipeline(args, split),
        ]
    )


def _data(args: argparse.Namespace, config: MimoConfig, work: Workload) -> str:
    counts = [
        f"{work.inputs[name] / args.micro_batch_size:.1f} for {name}" for name in config.modalities
    ]
    held = f"; encoder inputs of a sample: {', '.join(counts)}" if counts else ""
    return (
        f"data: {describe_data(args)}; {args.global_batch_size} samples an iteration in "
        f"micro-batches of {args.micro_batch_size}; {COUNTED_SAMPLES} of them counted: "
        f"{work.batch_size:.0f} rows of {work.seq_length:.0f} tokens{held}"
    )


def _memory_table(memory: Mapping[RankGroup, StageMemory], split: Split) -> list[str]:
    rows = [["held by", "ranks", "parameters", "gradients", "optimizer", "activations", "in all"]]
    for place, held in memory.items():
        # Encoders on ranks of their own are the timeline's first row, all of them.
        row = place.stage + (bool(split.cost.ahead) and place.label not in split.cost.ahead)
        kept = sum(
            one * split.timeline.in_flight(row, number * split.num_stages + row)
            for number, one in enumerate(held.activations)
        )
        counts = [held.parameters, held.gradients, held.optimizer, kept]
        numbers = [f"{count / MIB:,.1f}" for count in [*counts, sum(counts)]]
        rows.append([place.label, span(place.ranks), *numbers])
    return aligned(rows)


def _compute(args: argparse.Namespace, split: Split, held_by: Iterable[RankGroup]) -> list[str]:
    """Floating-point operations of an iteration, and how they fall on the ranks."""
    cost, ranks = split.cost, {place.label: len(place.ranks) for place in held_by}
    each = ranks[list(ranks)[-1]]
    parts = {
        "encoders and projectors": cost.first.both * each
        + sum(one.both * ranks[name] for name, one in cost.ahead.items()),
        "layers": cost.layer.both * sum(split.layers) * each,
        "head": cost.last.both * each,
    }
    total = sum(parts.values())
    shares = ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in parts.items())
    count = total * num_micro_batches(args)
    lines = [f"floating-point operations of an iteration: {count:.3g} ({shares})"]
    if len(ranks) == 1:
        return lines
    stages = [0.0] * split.num_stages
    for number, chunk in enumerate(replace(cost, ahead={}).chunks(split.layers)):
        stages[number % split.num_stages] += chunk.both
    per_rank = [*(one.both for one in cost.ahead.values()), *stages]
    most = max(per_rank)
    relative = [f"{name} {one / most:.2f}" for name, one in zip(ranks, per_rank, strict=True)]
    return [*lines, f"a rank's share, the busiest's being 1: {', '.join(relative)}"]


def _pipeline(args: argparse.Namespace, split: Split) -> list[str]:
    if len(split.timeline.ranks) == 1:
        return ["no pipeline: every rank runs the whole model"]
    schedule = "interleaved 1F1B" if args.virtual_pipeline_model_parallel_size else "1F1B"
    lines = [f"pipeline ({schedule}): {describe_pipeline(split, args)}"]
    drawn = split.shortened(DRAWN_ROUNDS * args.pipeline_model_parallel_size)
    rows = ["encoders"] * bool(split.cost.ahead) + [str(i) for i in range(split.num_stages)]
    width = max(3, *map(len, rows))
    lines += [
        f"  {name:>{width}} {row}" for name, row in zip(rows, drawn.timeline.draw(), strict=True)
    ]
    lines.append(
        " " * (width + 3)
        + "digits: a micro-batch's forward pass, letters: its backward pass, .: waits"
    )
    return lines
