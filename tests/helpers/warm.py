"""Imported once by the process that ranks are forked from: what `train.py` imports."""

from __future__ import annotations

import importlib
import os

from examples.mimo import compat
from examples.mimo.cli import command

# One thread, or a fork would lose the others.
os.environ["OMP_NUM_THREADS"] = "1"
command.prepare_environment()
compat.install()
for module in (
    "megatron.training",
    "megatron.training.argument_utils",
    "megatron.core.tokenizers.text",
    "examples.mimo.planner.dry_run",
    "examples.mimo.cli.observer",
    "examples.mimo.training.pretrain",
    "examples.mimo.compat.megatron",
):
    importlib.import_module(module)
