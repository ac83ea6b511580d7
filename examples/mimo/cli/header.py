"""Header of a run: layout, data, and for each part its size and the ranks that hold it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu

from examples.mimo.checkpoint.description import FILE_NAME, open_checkpoint
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.model.mimo import StageMimoModel
from examples.mimo.model.parts import part_names, parts
from examples.mimo.parallel.placement import Placement
from examples.mimo.planner.pipeline import (
    COUNTED_SAMPLES,
    describe_pipeline,
    predicted_split,
    workload,
)
from examples.mimo.training.inputs import fresh_parts, starting_point
from examples.mimo.training.layout import (
    colocated_encoder_tp,
    module_of_rank,
    placements,
    rank_groups,
    run_shape,
)
from examples.mimo.training.pretrain import first_batches


@dataclass(frozen=True)
class PartSize:
    """Parameters of a part: those tensor parallelism splits, and those each of its ranks copies.

    `split` counts the shares of all ranks; `here` is what this rank holds: its share and copies.
    """

    split: int
    copied: int
    here: int
    here_bytes: int
    trains: bool


def part_sizes(
    model: StageMimoModel, tp: int, encoder_tp: Mapping[str, int]
) -> dict[str, PartSize]:
    """Sizes of the parts that this stage holds; works on meta tensors too."""
    sizes = {"language": tp, **encoder_tp}
    return {
        name: _size(list(module.parameters()), sizes[name.split(".")[0]])
        for name, module in parts(model).items()
    }


def _size(parameters: list[torch.nn.Parameter], tensor_parallel_size: int) -> PartSize:
    share = sum(p.numel() for p in parameters if getattr(p, "tensor_model_parallel", False))
    here = sum(p.numel() for p in parameters)
    return PartSize(
        split=share * tensor_parallel_size,
        copied=here - share,
        here=here,
        here_bytes=sum(p.numel() * p.element_size() for p in parameters),
        trains=any(p.requires_grad for p in parameters),
    )


def describe_run(args: argparse.Namespace, config: MimoConfig, chunks: list[StageMimoModel]) -> str:
    """The text of the header; every rank must call it, rank 0 gets all of it.

    `chunks` are this rank's part of the model, one per virtual pipeline stage.
    """
    sizes_here: dict[str, list[PartSize]] = {}
    for chunk in chunks:
        sizes = part_sizes(
            chunk, args.tensor_model_parallel_size, args.encoder_tensor_model_parallel_size
        )
        for name, size in sizes.items():
            sizes_here.setdefault(name, []).append(size)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    stage = mpu.get_pipeline_model_parallel_rank()
    dist.all_gather_object(of_ranks, (module_of_rank(args), stage, sizes_here))
    # Ranks of one group hold the same.
    held = {(module, stage): sizes for module, stage, sizes in of_ranks}
    by_group = {group.label: held[group.module, group.stage] for group in rank_groups(args)}
    lines = [
        f"{config.name}: {layout_name(args)} on {_device()}, {numerics(args)}",
        f"data: {describe_data(args)}; {args.global_batch_size} samples an iteration in "
        f"micro-batches of {args.micro_batch_size}; {args.train_iters} iterations",
        *parts_table(config, by_group, is_split(args)),
        *describe_fresh(args),
    ]
    if len(by_group) > 1 and args.rank == 0:
        work = workload(config, first_batches(args, config, COUNTED_SAMPLES))
        split = predicted_split(config, run_shape(args), chunks[0].config, work)
        lines.append(f"pipeline: {describe_pipeline(split)}")
    return "\n".join(lines)


def describe_fresh(args: argparse.Namespace) -> list[str]:
    """A line for each part of `--fresh`, and whether the checkpoint's weights go unused."""
    start = starting_point(args)
    if start is None or not fresh_parts(args):
        return []
    described = (start / FILE_NAME).is_file()
    stored = part_names(open_checkpoint(start).config) if described else []
    return [
        f"fresh: {part} starts with random weights"
        + (f", although {start} has it" if part in stored else "")
        for part in fresh_parts(args)
    ]


def is_split(args: argparse.Namespace) -> bool:
    """Whether tensor parallelism splits any part."""
    sizes = args.encoder_tensor_model_parallel_size.values()
    return max(args.tensor_model_parallel_size, *sizes, 1) > 1


def layout_name(args: argparse.Namespace) -> str:
    """The layout in one line: `TP 2 x PP 2 + sequence parallel`."""
    sizes = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "VPP": args.virtual_pipeline_model_parallel_size or 1,
        "CP": args.context_parallel_size,
        "DP": args.data_parallel_size,
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 process"
    extras = [" + sequence parallel"] * args.sequence_parallel
    extras += [" + distributed optimizer"] * args.use_distributed_optimizer
    return layout + "".join(extras) + _encoders_layout(args)


def _encoders_layout(args: argparse.Namespace) -> str:
    """Where encoders differ from the language model: ` on ranks 2-5; images TP 2 on ranks 0-1;`."""
    placed = placements(args)
    if placed:
        *encoders, language = placed
        described = [f"; {e.name}{_parallel_sizes(e)}{_on_ranks(e)}" for e in encoders]
        return _on_ranks(language) + "".join(described) + ";"
    tp = colocated_encoder_tp(args)
    if tp == args.tensor_model_parallel_size:
        return ""
    replicas = args.world_size // (args.pipeline_model_parallel_size * tp)
    return f", encoders TP {tp} x DP {replicas}"


def _parallel_sizes(placement: Placement) -> str:
    sizes = {"TP": placement.tp, "DP": placement.dp}
    split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return f" {split}" if split else ""


def _on_ranks(placement: Placement) -> str:
    return f" on rank{'s' * (len(placement.ranks) > 1)} {span(placement.ranks)}"


def span(ranks: range) -> str:
    """Ranks as text: `4` or `4-7`."""
    return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])


def numerics(args: argparse.Namespace) -> str:
    """Data type and layer implementation: `float32, local layers`."""
    kind = str(args.params_dtype).removeprefix("torch.")
    return f"{kind}, {args.transformer_impl.replace('_', ' ')} layers"


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (gloo)"


def describe_data(args: argparse.Namespace) -> str:
    """Where samples come from: folder, split, packing."""
    if args.dataset_provider == "mock":
        return "mock (random)"
    packed = (
        f", packed into sequences of {args.total_seq_length}" if args.packing_buffer_size else ""
    )
    return f"{args.data_path[0]}, split {args.train_split}{packed}"


def parts_table(
    config: MimoConfig, groups: Mapping[str, dict[str, list[PartSize]]], tp: bool
) -> list[str]:
    """One line per part: parameters, whether it trains, and bytes on a rank of each group."""
    headings = ["part", "trains", "parameters"]
    headings += ["split by TP", "copied"] if tp else []
    headings += [f"{label} rank" for label in groups] if len(groups) > 1 else ["per rank"]
    rows = [headings]
    stages = list(groups.values())
    by_part = {name: [stage.get(name, []) for stage in stages] for name in part_names(config)}
    for name, by_stage in by_part.items():
        trains = any(size.trains for sizes in by_stage for size in sizes)
        rows.append([name, "yes" if trains else "frozen", *_counts(by_stage, tp)])
    everything = [[s for sizes in stage.values() for s in sizes] for stage in stages]
    rows.append(["total", "", *_counts(everything, tp)])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table with as many cells each: the first column left-aligned, others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            f"{cell:>{width}}" if column else f"{cell:<{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _counts(stages: list[list[PartSize]], tp: bool) -> list[str]:
    """Cells for the parts' sizes on each stage: parameters in total, bytes by stage."""
    split = sum(size.split for sizes in stages for size in sizes)
    copied = sum(size.copied for sizes in stages for size in sizes)
    cells = [f"{split + copied:,}", *([f"{split:,}", f"{copied:,}"] if tp else [])]
    stage_bytes = [sum(size.here_bytes for size in sizes) for sizes in stages]
    return cells + [f"{count:,} B" if count else "-" for count in stage_bytes]
