"""Samples of the shards that could not be read: counted, named in a file, bounded.

What a person sees while a model trains, and a file of the same for programs.

`pretrain()` offers no callback, so `install()` wraps three of its functions:
`setup_model_and_optimizer`, `training_log` and `evaluate`. All still run, and their output goes
where Megatron's goes.

Where a rank is in a run, for the line it leaves when the run breaks under it.

A rank that waits for another one sits in a call that Python cannot interrupt. Signals therefore
wake a thread, through the pipe that Python writes to the moment one arrives.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training import training as megatron_training

from examples.mimo.checkpoint.resuming import CHECKPOINT_ERRORS, reason
from examples.mimo.cli import command
from examples.mimo.cli.header import describe_run
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch
from examples.mimo.data.conversation import BadSample
from examples.mimo.parallel.placement import LANGUAGE
from examples.mimo.training.layout import module_of_rank

FILE_NAME = "bad_samples.jsonl"


class BadSamples:
    """Those of this data-parallel rank since training began; a checkpoint remembers the count."""

    def __init__(self) -> None:
        self.count = 0
        self.last: BadSample | None = None

    def add(self, args: argparse.Namespace, found: Sequence[BadSample]) -> None:
        """Count them; of the ranks that read the same data one writes them to `--save`."""
        if not found:
            return
        self.count += len(found)
        self.last = found[-1]
        if args.save and _is_writer(args):
            file = Path(args.save) / FILE_NAME
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"iteration": args.curr_iteration + 1, **asdict(bad)} for bad in found]
            with file.open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(row) + "\n" for row in rows))

    def check(self, args: argparse.Namespace, total: int) -> None:
        """ValueError when all ranks together have met more than `--max-bad-samples`."""
        if total > args.max_bad_samples:
            last = f"; the last: {self.last.reason}" if self.last else ""
            raise ValueError(
                f"--data-path {args.data_path[0]}: {total} samples could not be read, more than "
                f"--max-bad-samples {args.max_bad_samples}{last}"
            )


BAD_SAMPLES = BadSamples()


def _is_writer(args: argparse.Namespace) -> bool:
    return module_of_rank(args) in (None, LANGUAGE) and bool(
        mpu.is_pipeline_last_stage(ignore_virtual=True)
        and mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_context_parallel_rank() == 0
    )


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
        self.slots += batch.batch_size * batch.seq_length
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


def add_batch(batch: Batch, wait_seconds: float) -> None:
    """Count a micro-batch of training and its bad samples."""
    BAD_SAMPLES.add(get_args(), batch.bad_samples)
    COUNTERS.add(batch, wait_seconds)


def install_progress(config: MimoConfig) -> None:
    """Add the header, the progress lines and the held-out scores to a run of `config`."""
    megatron_training.setup_model_and_optimizer = _with_header(
        config, megatron_training.setup_model_and_optimizer
    )
    megatron_training.training_log = _with_progress(config, megatron_training.training_log)
    megatron_training.evaluate = _with_scores(megatron_training.evaluate)


def is_logging_rank() -> bool:
    """The last stage's first rank: the loss is there."""
    return module_of_rank(get_args()) in (None, LANGUAGE) and bool(
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


# Functions of Megatron's training loop, and what a rank is doing while in them.
PHASES = {
    "setup_model_and_optimizer": "building the model and loading weights",
    "build_train_valid_test_data_iterators": "opening the data",
    "train_step": "iteration {iteration}, computing",
    "save_checkpoint_and_time": "iteration {iteration}, saving a checkpoint",
    "evaluate": "evaluation after iteration {iteration}",
}
# What gloo and NCCL say when the other side of a connection is gone.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited",
)

_phase = "starting"


def follow(args: argparse.Namespace) -> None:
    """Follow the run; a rank that is ended from outside says where it was."""
    for name, words in PHASES.items():
        setattr(megatron_training, name, _within(words, getattr(megatron_training, name)))
    if not args.exit_signal_handler:
        _speak_on_sigterm()


def enter(words: str) -> None:
    """From here on this rank does this."""
    global _phase
    iteration = getattr(get_args(), "curr_iteration", 0) + 1
    _phase = words.format(iteration=iteration)


def lost_rank(error: RuntimeError) -> str | None:
    """One line for an error that means that another rank is gone; None for any other error."""
    found = next((words for words in LOST if words in str(error)), None)
    if found is None:
        return None
    return f"lost another rank in: {_phase} ({found}); the rank that ended first says why"


def _within(words: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def followed(*positional: Any, **named: Any) -> Any:
        enter(words)
        answer = function(*positional, **named)
        enter("after iteration {iteration}")
        return answer

    return followed


def _speak_on_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_as_before)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def _as_before() -> None:
    """A child's signals are its own."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(pipe: int) -> None:
    while signal.SIGTERM not in os.read(pipe, 1):
        pass
    rank = os.environ.get("RANK", "0")
    command.say(f"train.py [rank {rank}]: ended from outside in: {_phase}")
    os._exit(128 + signal.SIGTERM)
