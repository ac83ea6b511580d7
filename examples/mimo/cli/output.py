"""What a run prints and writes: its header, the progress table, metrics, output folders."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu

from examples.mimo.checkpoint.description import (
    FILE_NAME,
    TRACKER,
    open_checkpoint,
    save_description,
)
from examples.mimo.cli import command
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
from examples.mimo.training import inputs
from examples.mimo.training.inputs import fresh_parts, starting_point, tokenizer_path
from examples.mimo.training.layout import (
    colocated_encoder_tp,
    module_of_rank,
    placements,
    rank_groups,
    run_shape,
)

# A file that a checkpoint has before it is whole: weights, their index, positions in the data.
# What an iteration's folder may hold before it is whole.
PART_OF_CHECKPOINT = re.compile(
    r".*\.distcp|\.metadata(\.tmp)?|train_dataloader_dprank\d+\.pt|\.sha256\.json\..+"
)

# Name and width of each column of the progress table.
COLUMNS = (
    ("iteration", 15),
    ("loss", 9),
    ("grad norm", 10),
    ("lr", 9),
    ("samples/s", 10),
    ("tokens/s", 9),
    ("padding", 8),
    ("data wait", 10),
    ("left", 9),
)


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
        work = workload(config, inputs.first_batches(args, config, COUNTED_SAMPLES))
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


@dataclass(frozen=True)
class IterationTotals:
    """What one iteration's batches held on all ranks, and how long it took.

    `slots` counts positions with padding, `tokens` those without, `rounded_slots` those that come
    of --pad-to-multiple-of; `items` counts media files.
    `wait_seconds` is the mean over ranks, and `bad_samples` those that could not be read since
    training began.
    """

    seconds: float
    tokens: int
    slots: int
    rounded_slots: int
    wait_seconds: float
    items: dict[str, int]
    bad_samples: int


class ProgressTable:
    """Prints a line every `--log-interval` iterations, and writes each one to `--metrics-file`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.losses: list[float] = []
        self.window: list[IterationTotals] = []
        self.has_heading = False

    def add(
        self,
        iteration: int,
        loss: float | None,
        grad_norm: float | None,
        lr: float | None,
        totals: IterationTotals,
        **metrics: Any,
    ) -> None:
        """Take in one iteration; `metrics` go to the file only. No loss: the update was skipped."""
        self.window.append(totals)
        if loss is not None:
            self.losses.append(loss)
        self.append_metrics(
            {
                "iteration": iteration,
                "loss": self.losses[-1] if self.losses else None,
                "grad_norm": grad_norm,
                "learning_rate": lr,
                **asdict(totals),
                **metrics,
            }
        )
        if iteration % self.args.log_interval and iteration != self.args.train_iters:
            return
        if not self.has_heading:
            self.has_heading = True
            self._print_row([name for name, _ in COLUMNS])
        self._print_row(self._cells(iteration, grad_norm, lr))
        self.losses.clear()
        self.window.clear()

    def append_metrics(self, record: dict[str, Any]) -> None:
        """A line of JSON in `--metrics-file`, if there is one."""
        if not self.args.metrics_file:
            return
        try:
            with open(self.args.metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            # An error of writing does not know the file.
            raise OSError(error.errno, error.strerror, self.args.metrics_file) from None

    def _cells(self, iteration: int, grad_norm: float | None, lr: float | None) -> list[str]:
        """Means over the iterations since the last line; gradient norm and lr of the last one."""
        seconds = max(sum(totals.seconds for totals in self.window), 1e-9)
        tokens = sum(totals.tokens for totals in self.window)
        slots = sum(totals.slots for totals in self.window)
        waited = sum(totals.wait_seconds for totals in self.window)
        left = (self.args.train_iters - iteration) * seconds / len(self.window)
        return [
            f"{iteration}/{self.args.train_iters}",
            f"{sum(self.losses) / max(len(self.losses), 1):.4f}",
            "-" if grad_norm is None else f"{grad_norm:.3f}",
            "-" if lr is None else f"{lr:.2e}",
            f"{len(self.window) * self.args.global_batch_size / seconds:.1f}",
            f"{tokens / seconds:.0f}",
            padding_cell(tokens, slots, sum(totals.rounded_slots for totals in self.window)),
            f"{100 * waited / seconds:.0f} %",
            f"{int(left // 60)}:{int(left % 60):02d} min",
        ]

    def _print_row(self, cells: list[str]) -> None:
        padded = (f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))
        print(" ".join(padded), file=sys.stderr, flush=True)


def padding_cell(tokens: int, slots: int, rounded_slots: int) -> str:
    """The share of slots without a token; with `+`, that of --pad-to-multiple-of apart."""
    padding, rounding = 100 * (slots - tokens) / max(slots, 1), 100 * rounded_slots / max(slots, 1)
    return f"{padding - rounding:.0f}{f'+{rounding:.0f}' * (rounding >= 0.5)} %"


def tracked_values(
    args: argparse.Namespace,
    loss_dict: dict[str, torch.Tensor],
    lr: float | None,
    grad_norm: Any,
    totals: IterationTotals,
) -> dict[str, float]:
    """What the progress table shows of one iteration, by the names that trackers give it."""
    if not (args.tensorboard_dir or args.wandb_project):
        return {}  # a loss on the GPU is not waited for without need
    seconds = max(totals.seconds, 1e-9)
    values = {name: float(loss) for name, loss in loss_dict.items()}
    values |= {} if lr is None else {"learning-rate": float(lr)}
    values |= {} if grad_norm is None else {"grad-norm": float(grad_norm)}
    return values | {
        "samples per second": args.global_batch_size / seconds,
        "tokens per second": totals.tokens / seconds,
        "padding": 1 - totals.tokens / totals.slots if totals.slots else 0.0,
        "data wait": totals.wait_seconds / seconds,
        "bad samples": float(totals.bad_samples),
        **{f"items/{name}": float(count) for name, count in totals.items.items()},
    }


def prepare_outputs(args: argparse.Namespace, config: MimoConfig) -> None:
    """Make the folders that the run writes to, and describe the model in --save.

    ValueError, alike on every rank, for what cannot be written, and for a --save that another run
    writes to.
    """
    for name in ("save", "tensorboard_dir", "wandb_save_dir"):
        if folder := getattr(args, name):
            with _names(f"--{name.replace('_', '-')} {folder}"):
                os.makedirs(folder, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "this folder cannot be written")
    if args.metrics_file:
        with _names(f"--metrics-file {args.metrics_file}"), open(args.metrics_file, "a"):
            if args.rank == 0:
                end_last_line(Path(args.metrics_file))
    if not args.save or args.rank != 0:
        return
    save = Path(args.save)
    with _names(f"--save {save}"):
        command.hold_folder("--save", save)
        remove_incomplete(save)  # of a run that was killed
        # Before any weights: from the first checkpoint on, even of a run that breaks, the folder
        # can be answered from and resumed.
        start = starting_point(args)
        sources = open_checkpoint(start).sources if start and (start / FILE_NAME).is_file() else {}
        for part in fresh_parts(args):
            sources.pop(part, None)
        save_description(save, config, tokenizer_path(args), sources)


def end_last_line(file: Path) -> None:
    """End the last line of a file where a kill has cut it off, so that the next is a line."""
    if not file.is_file() or not file.stat().st_size:
        return
    with file.open("rb+") as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read() != b"\n":
            stream.write(b"\n")


@contextlib.contextmanager
def _names(output: str) -> Iterator[None]:
    """Name the `output` in errors of the system."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{output}: {error.strerror or error}") from None


def remove_incomplete(save: Path) -> None:
    """Remove what was written of checkpoints newer than the last whole one; it takes space.

    Megatron writes metadata.json when all else is written, and then the tracker. Ranks of another
    layout would leave files of it among their own.
    """
    tracker = save / TRACKER
    last = tracker.read_text().strip() if tracker.is_file() else "0"
    for folder in save.glob("iter_*"):
        files = [file for file in folder.rglob("*") if file.is_file()]
        number = folder.name.removeprefix("iter_")
        is_newer = last.isdecimal() and number.isdecimal() and int(number) > int(last)
        if is_newer and all(PART_OF_CHECKPOINT.fullmatch(file.name) for file in files):
            shutil.rmtree(folder, ignore_errors=True)
