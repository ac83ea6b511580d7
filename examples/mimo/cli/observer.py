"""Run observer: phase of each rank, counts, bad samples, and what ended a run."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from torch.distributed.checkpoint.api import CheckpointException

from examples.mimo.checkpoint.description import TRACKER
from examples.mimo.checkpoint.loading import CHECKPOINT_ERRORS, reason, schedule_mismatch
from examples.mimo.cli import command
from examples.mimo.cli.command import RunError
from examples.mimo.cli.output import (
    IterationTotals,
    ProgressTable,
    describe_run,
    remove_incomplete,
    tracked_values,
)
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch
from examples.mimo.data.conversation import BadSample, BadSampleCount
from examples.mimo.parallel.placement import LANGUAGE
from examples.mimo.training.layout import data_share, module_of_rank, rank_groups

BAD_SAMPLES_FILE = "bad_samples.jsonl"
# What gloo and NCCL say when the other side of a connection is gone.
LOST_RANK_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited",
)
STARTING = "starting"
SAVING = "saving a checkpoint"
# What torch says when a process of a DataLoader is killed, as where /dev/shm is full.
READER_DIED = "DataLoader worker"
# What torch says of a file that did not take all bytes; it hides the system's reason.
STREAM_BROKE = "inline_container.cc"


@dataclass
class BatchCounts:
    """What the micro-batches of the current iteration held on this rank."""

    tokens: int = 0
    slots: int = 0
    rounded_slots: int = 0
    items: Counter[str] = field(default_factory=Counter)
    wait_seconds: float = 0.0
    keys: list[str] = field(default_factory=list)


class RunObserver:
    """Follows one run on this rank: prints the header and the table, explains errors.

    `bad_samples` is the count that checkpoints of shards save and restore.
    """

    def __init__(self, args: argparse.Namespace, config: MimoConfig) -> None:
        self.args, self.config = args, config
        self.phase = STARTING
        self.bad_samples = BadSampleCount()
        self.counts = BatchCounts()
        self.table = ProgressTable(args)
        # The summed loss of each micro-batch of this iteration, on the device, and its samples.
        self.losses: list[tuple[torch.Tensor, Sequence[str]]] = []
        self.iteration_ended = time.perf_counter()
        self.model_is_built = self.has_saved = False
        self.bad_samples_reported = 0
        # Megatron logs why a writer of a checkpoint failed, and raises an error that does not say.
        self.writer_errors: list[str] = []
        logging.getLogger(filesystem_async.__name__).addFilter(self._keep_writer_error)
        # What a thread of TensorBoard met is raised again when the next value is written.
        threading.excepthook = lambda failed: (
            None if isinstance(failed.exc_value, OSError) else threading.__excepthook__(failed)
        )

    def enter(self, phase: str) -> None:
        """From here on this rank does `phase`, in which {iteration} stands for the current one."""
        self.phase = phase.format(iteration=getattr(self.args, "curr_iteration", 0) + 1)
        self.has_saved |= SAVING in phase

    def add_batch(self, batch: Batch, wait_seconds: float) -> None:
        """Count one micro-batch of training, and the time that reading it took."""
        self.counts.tokens += batch.num_tokens
        self.counts.slots += batch.batch_size * batch.seq_length
        self.counts.rounded_slots += batch.rounded_slots
        self.counts.items.update({name: len(files) for name, files in batch.items.items()})
        self.counts.wait_seconds += wait_seconds
        self.counts.keys += batch.keys
        if batch.bad_samples:
            self.bad_samples.count += len(batch.bad_samples)
            self.bad_samples.last = batch.bad_samples[-1]
            # Of the ranks that read the same data one writes.
            if self.args.save and self._has_the_loss() and mpu.get_context_parallel_rank() == 0:
                self._write_bad_samples(batch.bad_samples)

    def add_loss(self, loss: torch.Tensor, keys: Sequence[str]) -> None:
        """Keep a micro-batch's loss for `check_losses`."""
        if self.args.check_for_nan_in_loss_and_grad:
            self.losses.append((loss, keys))

    def check_losses(self) -> None:
        """ValueError, naming the samples, for a loss of this iteration that is not finite.

        Called when all gradients are there and none has reached the weights. pretrain_gpt.py asks
        after each micro-batch, which makes the host wait, and knows no names.
        """
        losses, self.losses = self.losses, []
        values = torch.stack([loss for loss, _ in losses]).tolist() if losses else []
        for value, (_, keys) in zip(values, losses, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss of iteration {self.args.curr_iteration + 1} is {value}; its samples "
                    f"are {', '.join(keys)}; lower --lr or look at these samples"
                )

    def model_built(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        """Print the header; every rank must call this, with its chunks of the model."""
        self.model_is_built = True
        config = get_model_config(model_chunks[0])
        finalize = config.finalize_model_grads_func or finalize_model_grads
        config.finalize_model_grads_func = self._after_check(finalize)
        header = describe_run(
            self.args, self.config, [unwrap_model(chunk) for chunk in model_chunks]
        )
        if self.args.rank == 0:
            print(header, file=sys.stderr, flush=True)

    def _after_check(self, finalize: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(finalize)
        def checked(*args: Any, **kwargs: Any) -> None:
            self.check_losses()
            finalize(*args, **kwargs)

        return checked

    def iteration_done(
        self, loss_dict: dict[str, torch.Tensor], lr: Any, iteration: int, grad_norm: Any
    ) -> None:
        """Show one iteration; every rank must call this, one of them prints.

        ValueError when all ranks together could not read more than `--max-bad-samples`, or when
        ranks that work on the same samples did not read the same.
        """
        totals, keys, digest = self._take_totals()
        last = f"; the last: {self.bad_samples.last.reason}" if self.bad_samples.last else ""
        if not _is_alike(digest):
            raise ValueError(
                f"iteration {iteration}: ranks that must read the same samples read others, as "
                f"where a file can be read on one machine only{last}; see that --data-path is the "
                "same for all, and resume from the last checkpoint"
            )
        if totals.bad_samples > self.args.max_bad_samples:
            raise ValueError(
                f"--data-path {self.args.data_path[0]}: {totals.bad_samples} samples could not be "
                f"read, more than --max-bad-samples {self.args.max_bad_samples}{last}"
            )
        self._track(
            iteration, tracked_values(self.args, loss_dict, lr, grad_norm, totals), loss_dict
        )
        if not self._is_logging_rank():
            return
        if totals.bad_samples > self.bad_samples_reported:
            self.bad_samples_reported = totals.bad_samples
            command.log_line(f"  {totals.bad_samples} samples could not be read so far{last}")
        has_cuda = torch.cuda.is_available()
        self.table.add(
            iteration,
            float(loss_dict["lm loss"]) if "lm loss" in loss_dict else None,
            None if grad_norm is None else float(grad_norm),
            lr,
            totals,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if has_cuda else None,
            keys=keys,
        )

    def evaluated(self, scores: dict[str, Any] | None) -> None:
        """Show the scores on held-out samples; the ranks without the loss have none."""
        values = {name: float(score) for name, score in (scores or {}).items()}
        # The evaluation after the last iteration comes when Megatron has left its loop.
        iteration = max(self.args.curr_iteration + 1, self.args.iteration)
        self._track(iteration, {f"held out/{name}": value for name, value in values.items()})
        if not values or not self._is_logging_rank():
            return
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        command.log_line(f"  held out after {iteration} iterations: {text}")
        self.table.append_metrics({"iteration": iteration, "validation": values})

    def _track(
        self, iteration: int, values: dict[str, float], megatrons: Collection[str] = ()
    ) -> None:
        """Write `values` to TensorBoard and to Weights & Biases, whichever is asked for.

        Megatron opens both on the last rank, and with TensorBoard writes some values itself: the
        losses `megatrons`, learning rate and gradient norm. Every rank must call this.
        """
        args = self.args
        if not (args.tensorboard_dir or args.wandb_project):
            return
        if module_of_rank(args) is not None:
            # The last rank may hold an encoder, and then knows neither losses nor scores.
            held = [values]
            dist.broadcast_object_list(held, src=rank_groups(args)[-1].ranks[0])
            values = held[0]
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer:
            written = {*megatrons, "learning-rate", "grad-norm"}
            values = {name: value for name, value in values.items() if name not in written}
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
        if wandb:
            wandb.log(values, iteration)

    @contextlib.contextmanager
    def explains_errors(self) -> Iterator[None]:
        """Turn errors that the input, the system or another rank caused into a line of its own."""
        try:
            yield
        except (
            ImportError,
            AssertionError,
            MemoryError,
            RuntimeError,
            OSError,
            *CHECKPOINT_ERRORS,
        ) as error:
            lost = self.lost_rank(error) if isinstance(error, RuntimeError) else None
            if lost is None and self._is_saving(error):
                self._give_up_saving(error)
            explanation = lost or self._explain(error)
            if explanation is None:
                raise
            # A full disk, say, ends every rank, and one says so.
            is_shared = isinstance(error, OSError) or command.is_out_of_memory(error)
            kind = RunError if is_shared else ValueError
            raise kind(explanation) from None

    def _explain(self, error: BaseException) -> str | None:
        if isinstance(error, CHECKPOINT_ERRORS) and not self.model_is_built:
            start = self.args.load or self.args.pretrained_checkpoint
            return f"--load {start}: damaged or unfit ({reason(error)})"
        if isinstance(error, ImportError):
            return f"Megatron needs a package for these flags: {error}"
        if isinstance(error, AssertionError):
            mismatch = schedule_mismatch(error)
            return mismatch and f"--load {self.args.load}: {mismatch}"
        if command.is_out_of_memory(error):
            return f"{command.one_line(error)}; in: {self.phase}; {self._kept()}"
        if isinstance(error, OSError):
            # TensorBoard writes in a thread, and its errors name no file.
            frames = traceback.extract_tb(error.__traceback__)
            if not error.filename and any("tensorboard" in frame.filename for frame in frames):
                error.filename = f"--tensorboard-dir {self.args.tensorboard_dir}"
            line = command.one_line(error)
            return line and f"{line} in: {self.phase}; {self._kept()}"
        if READER_DIED in str(error):
            return (
                f"a process that reads data ended in: {self.phase} ({str(error).splitlines()[0]}); "
                f"lower --num-workers, or give it more memory or space in /dev/shm; {self._kept()}"
            )
        return None

    def _is_saving(self, error: BaseException) -> bool:
        """Whether `error` is of a checkpoint that is written, now or in the background."""
        return SAVING in self.phase or (self.has_saved and isinstance(error, CHECKPOINT_ERRORS))

    def _give_up_saving(self, error: BaseException) -> NoReturn:
        """RunError that says what is kept; removes what was written of the new checkpoint."""
        if isinstance(error, CheckpointException) and not error.failures:
            raise RunError("") from None  # torch tells rank 0 why
        remove_incomplete(Path(self.args.save))
        why = self.writer_errors[0] if self.writer_errors else reason(error)
        if STREAM_BROKE in why:
            why = "a file could not be written to its end; is the disk, a quota or a limit full?"
        why = re.sub(r".*\[Errno \d+\] ", "", why)
        raise RunError(f"--save {self.args.save}: {why} in: {self.phase}; {self._kept()}") from None

    def _keep_writer_error(self, record: logging.LogRecord) -> bool:
        """Keep what Megatron would print; the run's last line says it."""
        self.writer_errors.append(record.getMessage())
        return False

    def _kept(self) -> str:
        """Which checkpoint of this run is whole, and how to go on."""
        if not self.args.save:
            return "nothing of this run is kept, for lack of --save"
        tracker = Path(self.args.save) / TRACKER
        if not tracker.is_file():
            return "no checkpoint of this run was finished"
        iteration = tracker.read_text().strip()
        return (
            f"the checkpoint of iteration {iteration} is whole, and --load {self.args.save} goes "
            "on from it"
        )

    def lost_rank(self, error: RuntimeError) -> str | None:
        """One line for an error that means that another rank is gone; None for any other error."""
        message = next((text for text in LOST_RANK_MESSAGES if text in str(error)), None)
        if message is None:
            return None
        return f"lost another rank in: {self.phase} ({message}); the rank that ended first says why"

    def report_sigterm(self) -> None:
        """From here on a rank that is ended from outside says what it was doing.

        A rank that waits for another one sits in a call that Python cannot interrupt. Python
        writes the signal to a pipe the moment it arrives, and that wakes a thread.
        """

        def wait_for_sigterm() -> None:
            while signal.SIGTERM not in os.read(reading, 1):
                pass
            # While ranks start, and where a rank has said why the run ends, this says nothing new.
            tells = self.phase != STARTING and not command.count_reports()
            if not command.last_word.acquire(blocking=False):
                return  # the main thread met an error, says it, and ends the process
            if tells:
                rank = os.environ.get("RANK", "0")
                command.log_line(f"train.py [rank {rank}]: ended from outside in: {self.phase}")
            os._exit(128 + signal.SIGTERM)

        def restore_in_child() -> None:
            """Forked readers of data and writers of checkpoints end on the signal, silently."""
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        signal.signal(signal.SIGTERM, lambda number, frame: None)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=restore_in_child)
        threading.Thread(target=wait_for_sigterm, daemon=True).start()

    def leave_signal_to_parent(self) -> None:
        """From here on a forked process does not notice the signal of --exit-signal-handler.

        A scheduler sends it to all processes of a run. The rank saves a checkpoint and ends, and
        until then it needs its readers of data and the helper of its checkpoint writers.
        """
        blocked = {self.args.exit_signal}
        os.register_at_fork(
            after_in_child=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        )

    def _take_totals(self) -> tuple[IterationTotals, list[str], float | None]:
        """Sum the counts over the data-parallel group, gather its samples' keys, and start over.

        Last comes a number that depends on which samples the group read; None when it needs none.
        """
        group, counts, self.counts = mpu.get_data_parallel_group(), self.counts, BatchCounts()
        names = sorted(self.config.inputs)
        values = torch.tensor(
            [
                counts.tokens,
                counts.slots,
                counts.rounded_slots,
                counts.wait_seconds / group.size(),
                self.bad_samples.count,
                # Not `hash`, which differs from process to process; exact up to 2**21 samples.
                sum(zlib.crc32(key.encode()) for key in counts.keys),
                *(counts.items[name] for name in names),
            ],
            dtype=torch.float64,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        dist.all_reduce(values, group=group)
        tokens, slots, rounded, wait_seconds, bad_samples, digest, *items = values.tolist()
        # Replicas of an encoder may share the media of the same samples.
        digest /= data_share(self.args.data_parallel_size).shares
        now = time.perf_counter()
        seconds, self.iteration_ended = now - self.iteration_ended, now
        keys: list[Any] = [None] * group.size()
        if self.args.metrics_file:
            dist.all_gather_object(keys, counts.keys, group=group)
        totals = IterationTotals(
            seconds,
            int(tokens),
            int(slots),
            int(rounded),
            wait_seconds,
            dict(zip(names, map(int, items), strict=True)),
            int(bad_samples),
        )
        return (
            totals,
            [key for of_rank in keys for key in of_rank or []],
            digest if counts.keys else None,
        )

    def _is_logging_rank(self) -> bool:
        """The first data-parallel rank of those that know the loss."""
        return self._has_the_loss() and mpu.get_data_parallel_rank(with_context_parallel=True) == 0

    def _has_the_loss(self) -> bool:
        """The first tensor-parallel rank of the language model's last stage."""
        return module_of_rank(self.args) in (None, LANGUAGE) and bool(
            mpu.is_pipeline_last_stage(ignore_virtual=True)
            and mpu.get_tensor_model_parallel_rank() == 0
        )

    def _write_bad_samples(self, bad_samples: Sequence[BadSample]) -> None:
        file = Path(self.args.save) / BAD_SAMPLES_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        iteration = self.args.curr_iteration + 1
        with file.open("a", encoding="utf-8") as stream:
            for bad in bad_samples:
                stream.write(json.dumps({"iteration": iteration, **asdict(bad)}) + "\n")


def _is_alike(number: float | None) -> bool:
    """Whether it is one number on all ranks that have one; every rank must call this."""
    bounds = [-math.inf, -math.inf] if number is None else [number, -number]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    highest = torch.tensor(bounds, dtype=torch.float64, device=device)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    most, least = highest.tolist()
    return most == -least
