"""A command whose model lacks memory on the last rank alone, for more than one answer at once.

`small_gpu.py COMMAND [its flags]`: COMMAND is avlm_inference or evaluate.
"""

from __future__ import annotations

import importlib
import os
import sys

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
reserve = KeyValueCache.reserve


def reserve_on_a_small_gpu(self, slots, length):
    if slots > 1 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        raise torch.OutOfMemoryError(SENTENCES)
    reserve(self, slots, length)


if __name__ == "__main__":
    KeyValueCache.reserve = reserve_on_a_small_gpu
    command.run(f"{name}.py", importlib.import_module(f"examples.mimo.{name}").main)
