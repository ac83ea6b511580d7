"""Run by layouts.py on every rank: `train.py` that saves after the first iteration alone."""

from __future__ import annotations

import functools
from typing import Any

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment()
compat.install()

from megatron.training import training

from examples.mimo.train import main

save = training.save_checkpoint_and_time


@functools.wraps(save)
def save_first(iteration: int, *positional: Any, **named: Any) -> None:
    """Saving costs more than an iteration, and the comparison reads one checkpoint."""
    if iteration == 1:
        save(iteration, *positional, **named)


if __name__ == "__main__":
    training.save_checkpoint_and_time = save_first
    command.run("train.py", main)
