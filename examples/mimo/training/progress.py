"""What a person sees while a model trains, and a file of the same for programs.

`pretrain()` offers no callback, so `install()` wraps three of its functions:
`setup_model_and_optimizer`, `training_log` and `evaluate`. All still run, and their output goes
where Megatron's goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training import training as megatron_training

from examples.mimo.checkpoint.errors import CHECKPOINT_ERRORS, reason
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch
from examples.mimo.models.placement import LANGUAGE
from examples.mimo.training.bad_samples import BAD_SAMPLES
from examples.mimo.training.header import describe_run
from examples.mimo.training.layout import own_module

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
    """What an iteration's micro-batches held on this rank; `items` counts media."""

    tokens: int = 0
    slots: int = 0
    items: Counter[str] = field(default_factory=Counter)
    wait_seconds: float = 0.0
    keys: list[str] = field(default_factory=list)

    def add(self, batch: Batch, wait_seconds: float) -> None:
        """Count one micro-batch and the time it was waited for."""
        self.tokens += batch.num_tokens
        self.slots += batch.num_rows * batch.num_columns
        self.items.update({name: len(sources) for name, sources in batch.items.items()})
        self.wait_seconds += wait_seconds
        self.keys += batch.keys


@dataclass(frozen=True)
class Iteration:
    """What one iteration held on all ranks, and how long it took; the wait is the mean one.

    `bad_samples` counts those that could not be read since training began.
    """

    seconds: float
    tokens: int
    slots: int
    wait_seconds: float
    items: dict[str, int]
    bad_samples: int


COUNTERS = Counters()


def install(config: MimoConfig) -> None:
    """Add the header, the progress lines and the held-out scores to a run of `config`."""
    megatron_training.setup_model_and_optimizer = _with_header(
        config, megatron_training.setup_model_and_optimizer
    )
    megatron_training.training_log = _with_progress(config, megatron_training.training_log)
    megatron_training.evaluate = _with_scores(megatron_training.evaluate)


def is_logging_rank() -> bool:
    """The last stage's first rank: the loss is there."""
    return own_module(get_args()) in (None, LANGUAGE) and bool(
        mpu.is_pipeline_last_stage(ignore_virtual=True)
        and mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def _with_header(config: MimoConfig, setup: Callable[..., Any]) -> Callable[..., Any]:
    def described(*positional: Any, **named: Any) -> Any:
        args = get_args()
        try:
            model, optimizer, scheduler = setup(*positional, **named)
        except CHECKPOINT_ERRORS as error:
            start = args.load or args.pretrained_checkpoint
            raise ValueError(f"--load {start}: damaged or unfit ({reason(error)})") from None
        text = describe_run(args, config, [unwrap_model(chunk) for chunk in model])
        if args.rank == 0:
            print(text, file=sys.stderr, flush=True)
        return model, optimizer, scheduler

    return described


def _with_progress(config: MimoConfig, training_log: Callable[..., Any]) -> Callable[..., Any]:
    progress = Progress(config)

    def logged(
        loss_dict: dict, totals: dict, learning_rate: Any, iteration: int, *rest: Any, **named: Any
    ) -> Any:
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
            iteration = max(get_args().curr_iteration + 1, get_args().iteration)
            text = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            print(f"  held out after {iteration} iterations: {text}", file=sys.stderr, flush=True)
            _append_metrics({"iteration": iteration, "validation": found})
        return answer

    return scored


class Progress:
    """Prints a line every `--log-interval` iterations; the first also prints the heading."""

    def __init__(self, config: MimoConfig) -> None:
        self.config = config
        self.keys: list[str] = []
        self.losses: list[float] = []
        self.window: list[Iteration] = []
        self.last = time.perf_counter()
        self.begun = False
        self.bad_samples = 0

    def record(
        self, loss_dict: dict[str, torch.Tensor], lr: Any, iteration: int, grad_norm: Any
    ) -> None:
        """Take in one iteration; every rank calls this, the logging rank speaks."""
        args = get_args()
        self.window.append(self._take_counters())
        bad = self.window[-1].bad_samples
        BAD_SAMPLES.check(args, bad)
        if not is_logging_rank():
            return
        if bad > self.bad_samples:
            self.bad_samples = bad
            last = f"; the last: {BAD_SAMPLES.last.reason}" if BAD_SAMPLES.last else ""
            print(f"  {bad} samples could not be read so far{last}", file=sys.stderr, flush=True)
        if "lm loss" in loss_dict:
            self.losses.append(float(loss_dict["lm loss"]))
        norm = None if grad_norm is None else float(grad_norm)
        _append_metrics(
            {
                "iteration": iteration,
                "loss": self.losses[-1] if self.losses else None,
                "grad_norm": norm,
                "learning_rate": lr,
                **dataclasses.asdict(self.window[-1]),
                "peak_memory_bytes": torch.cuda.max_memory_allocated()
                if torch.cuda.is_available()
                else None,
                "keys": self.keys,
            }
        )
        if iteration % args.log_interval and iteration != args.train_iters:
            return
        if not self.begun:
            self.begun = True
            print(" ".join(f"{name:>{width}}" for name, width in COLUMNS), file=sys.stderr)
        self._line(args, iteration, lr, norm)
        self.losses.clear()
        self.window.clear()

    def _line(
        self, args: argparse.Namespace, iteration: int, lr: float | None, norm: float | None
    ) -> None:
        seconds = max(sum(i.seconds for i in self.window), 1e-9)
        tokens, slots = sum(i.tokens for i in self.window), sum(i.slots for i in self.window)
        waited = sum(i.wait_seconds for i in self.window)
        left = (args.train_iters - iteration) * seconds / len(self.window)
        cells = (
            f"{iteration}/{args.train_iters}",
            f"{sum(self.losses) / max(len(self.losses), 1):.4f}",
            "-" if norm is None else f"{norm:.3f}",
            "-" if lr is None else f"{lr:.2e}",
            f"{len(self.window) * args.global_batch_size / seconds:.1f}",
            f"{tokens / seconds:.0f}",
            f"{100 * (1 - tokens / slots) if slots else 0:.0f} %",
            f"{100 * waited / seconds:.0f} %",
            f"{int(left // 60)}:{int(left % 60):02d} min",
        )
        row = " ".join(f"{c:>{width}}" for c, (_, width) in zip(cells, COLUMNS, strict=True))
        print(row, file=sys.stderr, flush=True)

    def _take_counters(self) -> Iteration:
        """This iteration's counts summed over the data-parallel group; they start over."""
        group = mpu.get_data_parallel_group()
        names = sorted(self.config.modalities)
        here = [COUNTERS.tokens, COUNTERS.slots, COUNTERS.wait_seconds / group.size()]
        here.append(BAD_SAMPLES.count)
        here += [COUNTERS.items[name] for name in names]
        where = "cuda" if torch.cuda.is_available() else "cpu"
        counted = torch.tensor(here, dtype=torch.float64, device=where)
        dist.all_reduce(counted, group=group)
        tokens, slots, waited, bad, *items = counted.tolist()
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.keys = _keys_of_all(group) if get_args().metrics_file else []
        COUNTERS.__init__()  # type: ignore[misc]
        return Iteration(
            seconds,
            int(tokens),
            int(slots),
            waited,
            dict(zip(names, map(int, items), strict=True)),
            int(bad),
        )


def _keys_of_all(group: dist.ProcessGroup) -> list[str]:
    """The iteration's sample keys, data-parallel rank by rank."""
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, COUNTERS.keys, group=group)
    return [key for keys in found for key in keys]


def _append_metrics(row: dict[str, Any]) -> None:
    path = get_args().metrics_file
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
