"""What every rank says when a codec's own code fails in an answer, and of the same prompt before
and after.

`failing_codec.py CHECKPOINT TP PP`; a line of JSON a rank.
"""

import json
import os
import sys

import numpy as np

from examples.mimo import Mimo
from tests.helpers.outputs import LevelCodec

stdout = sys.stdout
model = Mimo.load(sys.argv[1], tp=int(sys.argv[2]), pp=int(sys.argv[3]))


def ask():
    try:
        answer = model.generate("Which digit is this?", outputs=["speech"])
    except (ValueError, RuntimeError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return answer.text, np.concatenate(answer.speech).tolist()


def fails(error, first=0):
    """A method that fails from position `first` on."""

    def method(self, position):
        if first and position < first:
            return allowed(self, position)
        raise error

    return method


allowed = LevelCodec.allowed
said = [ask()]
for name, method in (
    ("allowed", fails(ValueError("no levels"), first=1)),
    ("allowed", fails(IndexError("list index out of range"), first=1)),
    ("allowed", lambda self, position: range(3, 40)),
    ("decode", fails(ValueError("no such level"))),
    ("decode", fails(RuntimeError("out of memory"))),
):
    kept = getattr(LevelCodec, name)
    setattr(LevelCodec, name, method)
    said.append(ask())
    setattr(LevelCodec, name, kept)
said.append(ask())
stdout.write(json.dumps([int(os.environ["RANK"]), said]) + "\n")
