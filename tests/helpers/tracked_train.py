"""`tracked_train.py FOLDER [flags of train.py]`: `train.py` that can import what is in FOLDER."""

import sys

from examples.mimo.cli import command

command.prepare_environment()

from examples.mimo import compat

compat.install()

from examples.mimo.train import main

if __name__ == "__main__":
    sys.path.insert(0, sys.argv.pop(1))
    command.run("train.py", main)
