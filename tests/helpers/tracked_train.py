"""`tracked_train.py FILE [flags of train.py]`: `train.py` with a wandb that writes calls to FILE.

It has the functions of wandb that Megatron and this package call; each call is a line of JSON.
"""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

from examples.mimo.cli import command

command.prepare_environment()

from examples.mimo import compat

compat.install()

from examples.mimo.train import main


def init(**kwargs):
    _write({"project": kwargs["project"], "name": kwargs["name"]})


def log(values, step):
    _write({"step": step, **values})


def finish():
    pass


def _write(line):
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    file = Path(sys.argv.pop(1))
    wandb = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)  # by which it counts as installed
    wandb.init, wandb.log, wandb.finish = init, log, finish
    wandb.config = SimpleNamespace(update=lambda values, **kwargs: None)
    sys.modules["wandb"] = wandb
    command.run("train.py", main)
