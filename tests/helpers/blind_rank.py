"""`evaluate.py` on ranks of which only rank 0 finds the data."""

import os
from pathlib import Path

from examples.mimo.cli import command
from examples.mimo.data import turns
from examples.mimo.evaluate import main


def finds_nothing(self: object, name: str) -> Path:
    raise ValueError(f"{name}: no such file on this machine")


if __name__ == "__main__":
    if os.environ["RANK"] != "0":
        turns.FilesInside.__call__ = finds_nothing
    command.run("evaluate.py", main)
