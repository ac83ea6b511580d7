"""Where a rank is in a run, for the line it leaves when the run breaks under it.

A rank that waits for another one sits in a call that Python cannot interrupt. Signals therefore
wake a thread, through the pipe that Python writes to the moment one arrives.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from megatron.training import get_args
from megatron.training import training as megatron_training

from examples.mimo import command

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


def install(args: argparse.Namespace) -> None:
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
