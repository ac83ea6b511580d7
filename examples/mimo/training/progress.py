"""What a person sees while a model trains, and a file of the same for programs.

`pretrain()` offers no callback, so `install()` wraps three of its functions:
`setup_model_and_optimizer`, `training_log` and `evaluate`. All still run, and their output goes
where Megatron's goes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training import training as megatron_training

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch
from examples.mimo.training.header import describe_run

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


@dataclass
class Counters:
    """What the micro-batches since the last line held, on this rank."""

    tokens: int = 0
    slots: int = 0
    wait_seconds: float = 0.0
    keys: list[str] = field(default_factory=list)

    def add(self, batch: Batch, wait_seconds: float) -> None:
        """Count one micro-batch and the time it was waited for."""
        self.tokens += batch.num_tokens
        self.slots += batch.num_rows * batch.num_columns
        self.wait_seconds += wait_seconds
        self.keys += batch.keys

    def reset(self) -> None:
        """Start over."""
        self.__init__()  # type: ignore[misc]


COUNTERS = Counters()


def install(config: MimoConfig) -> None:
    """Add the header, the progress lines and the held-out scores to a run of `config`."""
    megatron_training.setup_model_and_optimizer = _with_header(
        config, megatron_training.setup_model_and_optimizer
    )
    megatron_training.training_log = _with_progress(megatron_training.training_log)
    megatron_training.evaluate = _with_scores(megatron_training.evaluate)


def is_logging_rank() -> bool:
    """The last stage's first rank: the loss is there."""
    return bool(
        mpu.is_pipeline_last_stage(ignore_virtual=True)
        and mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_data_parallel_rank() == 0
    )


def _with_header(config: MimoConfig, setup: Callable[..., Any]) -> Callable[..., Any]:
    def described(*positional: Any, **named: Any) -> Any:
        model, optimizer, scheduler = setup(*positional, **named)
        args = get_args()
        text = describe_run(args, config, [unwrap_model(chunk) for chunk in model])
        if args.rank == 0:
            print(text, file=sys.stderr, flush=True)
        return model, optimizer, scheduler

    return described


def _with_progress(training_log: Callable[..., Any]) -> Callable[..., Any]:
    progress = Progress()

    def logged(loss_dict: dict, totals: dict, learning_rate: Any, iteration: int, *rest: Any,
               **named: Any) -> Any:
        answer = training_log(loss_dict, totals, learning_rate, iteration, *rest, **named)
        # The loss scale, the memory flag and the skipped flag stand before the gradient norm.
        grad_norm = rest[3] if len(rest) > 3 else named.get("grad_norm")
        progress.record(loss_dict, learning_rate, iteration, grad_norm)
        return answer

    return logged


def _with_scores(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    def scored(*positional: Any, **named: Any) -> Any:
        answer = evaluate(*positional, **named)
        scores = answer[0]
        if scores and is_logging_rank():
            found = {name: float(value) for name, value in scores.items()}
            iteration = get_args().curr_iteration + 1
            text = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            print(f"  held out after {iteration} iterations: {text}", file=sys.stderr, flush=True)
            _append_metrics({"iteration": iteration, "validation": found})
        return answer

    return scored


class Progress:
    """Prints a line every `--log-interval` iterations; the first also prints the heading."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.started = self.last = time.perf_counter()
        self.first_iteration: int | None = None
        self.printed_at = 0

    def record(
        self, loss_dict: dict[str, torch.Tensor], lr: Any, iteration: int, grad_norm: Any
    ) -> None:
        """Take in one iteration; every rank calls this, the logging rank speaks."""
        args = get_args()
        if self.first_iteration is None:
            self.first_iteration, self.printed_at = iteration - 1, iteration - 1
            self._heading()
        counted = self._sum_over_data_parallel()
        keys = list(COUNTERS.keys)
        COUNTERS.keys.clear()
        if "lm loss" in loss_dict:
            self.losses.append(float(loss_dict["lm loss"]))
        if is_logging_rank() and self.losses:
            norm = float(grad_norm) if grad_norm is not None else None
            found = {"iteration": iteration, "loss": self.losses[-1], "grad_norm": norm}
            _append_metrics({**found, "learning_rate": lr, "keys": keys})
        if iteration % args.log_interval and iteration != args.train_iters:
            return
        if is_logging_rank():
            self._line(iteration, lr, grad_norm, counted)
        self.losses.clear()
        COUNTERS.reset()
        self.last, self.printed_at = time.perf_counter(), iteration

    def _heading(self) -> None:
        if is_logging_rank():
            print(" ".join(f"{name:>{width}}" for name, width in COLUMNS), file=sys.stderr)

    def _line(self, iteration: int, lr: Any, grad_norm: Any, counted: list[float]) -> None:
        args = get_args()
        tokens, slots, waited = counted
        seconds = max(time.perf_counter() - self.last, 1e-9)
        done = iteration - self.printed_at
        left = (args.train_iters - iteration) * seconds / max(done, 1)
        cells = (
            f"{iteration}/{args.train_iters}",
            f"{sum(self.losses) / max(len(self.losses), 1):.4f}",
            f"{float(grad_norm):.3f}" if grad_norm is not None else "-",
            f"{lr:.2e}" if lr is not None else "-",
            f"{done * args.global_batch_size / seconds:.1f}",
            f"{tokens / seconds:.0f}",
            f"{100 * (1 - tokens / slots) if slots else 0:.0f} %",
            f"{100 * waited / seconds:.0f} %",
            f"{int(left // 60)}:{int(left % 60):02d} min",
        )
        row = " ".join(f"{c:>{width}}" for c, (_, width) in zip(cells, COLUMNS, strict=True))
        print(row, file=sys.stderr, flush=True)

    def _sum_over_data_parallel(self) -> list[float]:
        group = mpu.get_data_parallel_group()
        counted = torch.tensor(
            [COUNTERS.tokens, COUNTERS.slots, COUNTERS.wait_seconds / group.size()],
            dtype=torch.float64,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        dist.all_reduce(counted, group=group)
        return counted.tolist()


def _append_metrics(row: dict[str, Any]) -> None:
    path = get_args().metrics_file
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
