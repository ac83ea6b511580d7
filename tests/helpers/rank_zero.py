"""Every rank's answers of `on_rank_zero`, as lines of JSON: of functions that fail, then of one."""

import json
import sys

import torch.distributed as dist

from examples.mimo.generation.api import on_rank_zero


def fails(error):
    raise error


dist.init_process_group("gloo")
answers = []
for error in (
    ValueError("no such file"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid"),
    OSError(28, "No space left on device"),
    KeyError("images"),
    RuntimeError("out of memory"),
):
    try:
        on_rank_zero(lambda error=error: fails(error))
    except Exception as raised:
        answers.append([isinstance(raised, ValueError), type(raised).__name__, str(raised)])
# What follows still meets its own answer on every rank.
answers.append(on_rank_zero(lambda: ["still", "together"]))
sys.stdout.write(json.dumps([dist.get_rank(), answers]) + "\n")
dist.destroy_process_group()
