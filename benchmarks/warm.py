"""Imported once by the process that ranks are forked from: what `train.py` imports."""

from __future__ import annotations

import importlib
import os

from examples.mimo import command, host

# One thread, or a fork would lose the others.
os.environ["OMP_NUM_THREADS"] = "1"
command.prepare_environment()
host.install()
for module in (
    "megatron.training",
    "megatron.training.argument_utils",
    "megatron.core.tokenizers.text",
    "examples.mimo.training.dry_run",
    "examples.mimo.training.progress",
    "examples.mimo.training.step",
    "examples.mimo.training.adam",
    "examples.mimo.training.phase",
):
    importlib.import_module(module)
