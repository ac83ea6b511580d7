"""A run's first screen: what the model is made of, where its parts live, what trains."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.model.mimo import StageMimoModel, part_names, parts
from examples.mimo.parallel.placement import Placement
from examples.mimo.planner.stages import (
    COUNTED_SAMPLES,
    describe_pipeline,
    predicted_split,
    workload,
)
from examples.mimo.training.layout import (
    colocated_encoder_tp,
    module_of_rank,
    placements,
    places,
    run_shape,
)
from examples.mimo.training.providers import first_batches


@dataclass(frozen=True)
class PartSize:
    """Parameters: `split` over the tensor-parallel ranks (all shares), `copied` to each of them.

    `here` is what this rank holds: its share and the copies.
    """

    split: int
    copied: int
    here: int
    here_bytes: int
    trains: bool


def part_sizes(
    model: StageMimoModel, tp: int, encoder_tp: Mapping[str, int]
) -> dict[str, PartSize]:
    """The sizes of the parts this stage holds; works on meta tensors too."""
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
    """The header, on rank 0; every rank must call it."""
    mine: dict[str, list[PartSize]] = {}
    for chunk in chunks:
        sizes = part_sizes(
            chunk, args.tensor_model_parallel_size, args.encoder_tensor_model_parallel_size
        )
        for name, size in sizes.items():
            mine.setdefault(name, []).append(size)
    everyone: list[Any] = [None] * dist.get_world_size()
    stage = mpu.get_pipeline_model_parallel_rank()
    dist.all_gather_object(everyone, (module_of_rank(args), stage, mine))
    held = {(module, stage): sizes for module, stage, sizes in everyone}
    found = {place.label: held[place.module, place.stage] for place in places(args)}
    lines = [
        f"{config.name}: {layout_name(args)} on {_device()}, {numerics(args)}",
        f"data: {describe_data(args)}; {args.global_batch_size} samples an iteration in "
        f"micro-batches of {args.micro_batch_size}; {args.train_iters} iterations",
        *parts_table(config, found, is_split(args)),
    ]
    if len(found) > 1 and args.rank == 0:
        work = workload(config, first_batches(args, config, COUNTED_SAMPLES))
        split = predicted_split(config, run_shape(args), chunks[0].config, work)
        lines.append(f"pipeline: {describe_pipeline(split)}")
    return "\n".join(lines)


def is_split(args: argparse.Namespace) -> bool:
    """Whether tensor parallelism splits any part."""
    sizes = args.encoder_tensor_model_parallel_size.values()
    return max(args.tensor_model_parallel_size, *sizes, 1) > 1


def layout_name(args: argparse.Namespace) -> str:
    """`TP 2 x PP 2 + sequence parallel`."""
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
    """What is different about the encoders: ` on ranks 2-5, images TP 2 on ranks 0-1`."""
    placed = placements(args)
    if placed:
        described = [f"; {one.name}{_sizes(one)}{_on_ranks(one)}" for one in placed[:-1]]
        return _on_ranks(placed[-1]) + "".join(described) + ";"
    tp = colocated_encoder_tp(args)
    if tp == args.tensor_model_parallel_size:
        return ""
    copies = args.world_size // (args.pipeline_model_parallel_size * tp)
    return f", encoders TP {tp} x DP {copies}"


def _sizes(placement: Placement) -> str:
    sizes = {"TP": placement.tp, "DP": placement.dp}
    split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return f" {split}" if split else ""


def _on_ranks(placement: Placement) -> str:
    return f" on rank{'s' * (len(placement.ranks) > 1)} {span(placement.ranks)}"


def span(ranks: range) -> str:
    """`4` or `4-7`."""
    return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])


def numerics(args: argparse.Namespace) -> str:
    """`float32, local layers`."""
    kind = str(args.params_dtype).removeprefix("torch.")
    return f"{kind}, {args.transformer_impl.replace('_', ' ')} layers"


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (gloo)"


def describe_data(args: argparse.Namespace) -> str:
    """Where samples come from."""
    if args.dataset_provider == "mock":
        return "mock (random)"
    packed = f", packed into rows of {args.total_seq_length}" if args.packing_buffer_size else ""
    return f"{args.data_path[0]}, split {args.train_split}{packed}"


def parts_table(
    config: MimoConfig, places: Mapping[str, dict[str, list[PartSize]]], tp: bool
) -> list[str]:
    """A row a part: parameters, whether it trains, and what a rank of each place holds."""
    headings = ["part", "trains", "parameters"]
    headings += ["split by TP", "copied"] if tp else []
    headings += [f"{label} rank" for label in places] if len(places) > 1 else ["per rank"]
    rows = [headings]
    stages = list(places.values())
    by_part = {name: [stage.get(name, []) for stage in stages] for name in part_names(config)}
    for name, found in by_part.items():
        trains = any(size.trains for sizes in found for size in sizes)
        rows.append([name, "yes" if trains else "frozen", *_counts(found, tp)])
    everything = [[s for sizes in stage.values() for s in sizes] for stage in stages]
    rows.append(["total", "", *_counts(everything, tp)])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of as many cells each; the first column starts left, the others end right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + _row(row, widths) for row in rows]


def _counts(stages: list[list[PartSize]], tp: bool) -> list[str]:
    """The cells of sizes that lie on each stage."""
    split = sum(size.split for sizes in stages for size in sizes)
    copied = sum(size.copied for sizes in stages for size in sizes)
    cells = [f"{split + copied:,}", *([f"{split:,}", f"{copied:,}"] if tp else [])]
    return cells + [_bytes(sum(size.here_bytes for size in sizes)) for sizes in stages]


def _row(cells: list[str], widths: list[int]) -> str:
    first = f"{cells[0]:<{widths[0]}}"
    rest = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([first, *rest]).rstrip()


def _bytes(count: int) -> str:
    return f"{count:,} B" if count else "-"
