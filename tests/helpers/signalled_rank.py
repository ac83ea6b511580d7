"""A rank that torchrun ends at the moment it meets an error: whichever it notices first.

`signalled_rank.py SECONDS ERROR`: SECONDS pass between the signal and the error, the name of an
exception of Python. Reading the count of reports takes half a second.
"""

import builtins
import os
import signal
import sys
import time
from types import SimpleNamespace

from examples.mimo.cli import command
from examples.mimo.cli.observer import RunObserver
from examples.mimo.configs import get_model_config


def main() -> None:
    args = SimpleNamespace(curr_iteration=2, load=None)
    observer = RunObserver(args, get_model_config("tiny_avlm"))
    observer.report_sigterm()
    command.report_every_rank()
    observer.enter("iteration {iteration}, computing")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(sys.argv[1]))
    raise getattr(builtins, sys.argv[2])("the disk is gone")


def slow_count(more: int = 0) -> int:
    time.sleep(0.5)
    return more


if __name__ == "__main__":
    os.environ["WORLD_SIZE"] = "2"  # the other rank is the one that failed
    command.count_reports = slow_count
    command.run("train.py", main)
