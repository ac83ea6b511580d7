"""A run's first screen: what the model is made of, where its parts live, what trains."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import mpu

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.models.mimo import StageMimoModel
from examples.mimo.training.freezing import part_names, parts


@dataclass(frozen=True)
class PartSize:
    """`whole` counts all tensor-parallel ranks' parameters once; `here` what this rank holds."""

    whole: int
    here: int
    here_bytes: int
    trains: bool


def part_sizes(model: StageMimoModel, tensor_parallel_size: int) -> dict[str, PartSize]:
    """The sizes of the parts this stage holds; works on meta tensors too."""
    return {
        name: _size(list(module.parameters()), tensor_parallel_size)
        for name, module in parts(model).items()
    }


def _size(parameters: list[torch.nn.Parameter], tensor_parallel_size: int) -> PartSize:
    def whole(parameter: torch.nn.Parameter) -> int:
        sharded = getattr(parameter, "tensor_model_parallel", False)
        return parameter.numel() * (tensor_parallel_size if sharded else 1)

    return PartSize(
        whole=sum(map(whole, parameters)),
        here=sum(p.numel() for p in parameters),
        here_bytes=sum(p.numel() * p.element_size() for p in parameters),
        trains=any(p.requires_grad for p in parameters),
    )


def describe_run(args: argparse.Namespace, config: MimoConfig, chunks: list[StageMimoModel]) -> str:
    """The header, on rank 0; every rank must call it."""
    mine: dict[str, list[PartSize]] = {}
    for chunk in chunks:
        for name, size in part_sizes(chunk, args.tensor_model_parallel_size).items():
            mine.setdefault(name, []).append(size)
    stages: list[dict[str, list[PartSize]]] = [{}] * mpu.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, mine, group=mpu.get_pipeline_model_parallel_group())
    lines = [
        f"{config.name}: {_layout(args)}",
        f"data: {_data(args)}; {args.global_batch_size} samples an iteration in micro-batches "
        f"of {args.micro_batch_size}; {args.train_iters} iterations",
        *_table(config, stages),
    ]
    return "\n".join(lines)


def _layout(args: argparse.Namespace) -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (gloo)"
    sizes = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "VPP": args.virtual_pipeline_model_parallel_size or 1,
        "DP": args.data_parallel_size,
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 process"
    extras = [" + sequence parallel"] * args.sequence_parallel
    extras += [" + distributed optimizer"] * args.use_distributed_optimizer
    kind = str(args.params_dtype).removeprefix("torch.")
    impl = args.transformer_impl.replace("_", " ")
    return f"{layout}{''.join(extras)} on {where}, {kind}, {impl} layers"


def _data(args: argparse.Namespace) -> str:
    if args.dataset_provider == "mock":
        return "mock (random)"
    return f"{args.data_path[0]}, split {args.train_split}"


def _table(config: MimoConfig, stages: list[dict[str, list[PartSize]]]) -> list[str]:
    """A row a part: parameters, whether it trains, and what one rank of each stage holds."""
    headings = ["part", "parameters", "trains"]
    headings += [f"stage {i} rank" for i in range(len(stages))] if len(stages) > 1 else ["per rank"]
    rows = [headings]
    for name in part_names(config):
        sizes = [size for stage in stages for size in stage.get(name, [])]
        trains = "yes" if any(size.trains for size in sizes) else "frozen"
        row = [name, f"{sum(size.whole for size in sizes):,}", trains]
        row += [_bytes(sum(s.here_bytes for s in stage.get(name, []))) for stage in stages]
        rows.append(row)
    total = sum(s.whole for stage in stages for sizes in stage.values() for s in sizes)
    per_stage = [sum(s.here_bytes for sizes in stage.values() for s in sizes) for stage in stages]
    rows.append(["in all", f"{total:,}", "", *map(_bytes, per_stage)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    return ["  " + _row(row, widths) for row in rows]


def _row(cells: list[str], widths: list[int]) -> str:
    first = f"{cells[0]:<{widths[0]}}"
    rest = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([first, *rest]).rstrip()


def _bytes(count: int) -> str:
    return f"{count:,} B" if count else "-"
