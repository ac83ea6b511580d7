"""`train.py` on mock data, of which rank 1 cannot read all.

`failing_rank.py ERROR [flags of train.py]`: from the fifth sample on, rank 1 meets ERROR, the name
of an exception of Python or torch. `other`: it gets another sample instead, of the same sizes, as
if the right one could not be read.
"""

import builtins
import dataclasses
import os
import sys
import threading
import time

import torch

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment()
compat.install()

from examples.mimo.train import main
from examples.mimo.training.inputs import MockDataset

error = sys.argv.pop(1)
read = MockDataset.__getitem__


def read_on_rank_1(self, index):
    if index < 4:
        return read(self, index)
    if error == "other":
        return dataclasses.replace(read(self, index), key="another")
    raise (getattr(builtins, error, None) or getattr(torch, error))("the disk is gone")


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        # As of a library: an interpreter that ends in the usual way waits for it.
        threading.Thread(target=time.sleep, args=(3600,)).start()
        MockDataset.__getitem__ = read_on_rank_1
    command.run("train.py", main)
