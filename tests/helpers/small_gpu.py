"""A command whose model lacks memory on the last rank alone, for more than one answer at once.

That rank is slow to report it, and no launcher ends it meanwhile, as if it were on another machine:
rank 0 learns of the lack from it, and may be the first to report.

`small_gpu.py COMMAND [its flags]`: COMMAND is avlm_inference or evaluate.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time

from examples.mimo import compat
from examples.mimo.cli import command

name = sys.argv.pop(1)
command.prepare_environment()
compat.install()

import torch

from examples.mimo.generation.transformer import KeyValueCache

SENTENCES = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.20 GiB is free. Including non-PyTorch memory, this process has 77.00 GiB in use."
)
reserve, count_reports = KeyValueCache.reserve, command.count_reports


def is_last() -> bool:
    return os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)


def reserve_on_a_small_gpu(self, slots, length):
    if slots > 1 and is_last():
        raise torch.OutOfMemoryError(SENTENCES)
    reserve(self, slots, length)


def count_late(more: int = 0) -> int:
    if more and is_last():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(0.5)
    return count_reports(more)


if __name__ == "__main__":
    KeyValueCache.reserve = reserve_on_a_small_gpu
    command.count_reports = count_late
    command.run(f"{name}.py", importlib.import_module(f"examples.mimo.{name}").main)
