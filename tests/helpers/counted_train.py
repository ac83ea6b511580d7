"""`counted_train.py DIR [flags of train.py]`: `train.py` that records what a rank communicates.

Every operation of `torch.distributed`, however it was imported, ends in a method of a
`ProcessGroup`: those are wrapped. Rank r writes `DIR/r.json`: of each iteration its operations and
its forward and backward steps in the order they began, from the start of one training step to that
of the next. benchmarks/communication.py reads it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from examples.mimo.cli import command

command.prepare_environment()

from examples.mimo import compat

compat.install()

from megatron.core.pipeline_parallel import schedules
from megatron.training import training

from examples.mimo.train import main

# Method of a process group -> the place of the argument that holds what this rank puts in: of a
# reduce-scatter its result, which is its part. Nothing is put into a receive or a barrier.
METHODS = {
    "allreduce": 0,
    "allreduce_coalesced": 0,
    "reduce": 0,
    "broadcast": 0,
    "allgather": 1,
    "_allgather_base": 1,
    "allgather_coalesced": 1,
    "allgather_into_tensor_coalesced": 1,
    "gather": 1,
    "scatter": 0,
    "reduce_scatter": 0,
    "_reduce_scatter_base": 0,
    "reduce_scatter_tensor_coalesced": 0,
    "alltoall": 1,
    "alltoall_base": 1,
    "send": 0,
    "recv": None,
    "barrier": None,
}
# Functions of Megatron's schedules -> the passes that they run.
PASSES = {
    "forward_step": "forward",
    "backward_step": "backward",
    "backward_step_multimodule": "backward",
}


class Recorder:
    """What this rank does, by iteration; iteration 0 is all that comes before the first."""

    def __init__(self) -> None:
        self.iterations: list[list[dict[str, Any]]] = [[]]

    def watch(self, method: str) -> None:
        """Record the calls of one method of process groups."""
        original, place = getattr(dist.ProcessGroup, method), METHODS[method]

        @functools.wraps(original)
        def recorded(group: dist.ProcessGroup, *inputs: Any, **named: Any) -> Any:
            tensors = [] if place is None else _flat(inputs[place])
            entry = {
                "operation": method.strip("_").removesuffix("_base"),
                "group": group.group_desc,
                "size": group.size(),
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                "caller": _caller(sys._getframe(1)),
            }
            if method in ("send", "recv"):
                entry["peer"] = dist.get_process_group_ranks(group)[inputs[1]]
            self.iterations[-1].append(entry)
            return original(group, *inputs, **named)

        setattr(dist.ProcessGroup, method, recorded)

    def steps(self, function: Callable[..., Any], operation: str) -> Callable[..., Any]:
        """`function`, each call of which is a pass of a micro-batch through this stage."""

        @functools.wraps(function)
        def recorded(*inputs: Any, **named: Any) -> Any:
            self.iterations[-1].append({"operation": operation})
            return function(*inputs, **named)

        return recorded

    def begins_iteration(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step`, each call of which is an iteration."""

        @functools.wraps(step)
        def recorded(*inputs: Any, **named: Any) -> Any:
            self.iterations.append([])
            return step(*inputs, **named)

        return recorded


def _flat(tensors: Any) -> list[Any]:
    if isinstance(tensors, list | tuple):
        return [tensor for part in tensors for tensor in _flat(part)]
    return [tensors]


def _caller(frame: FrameType | None) -> str:
    """The functions of Megatron and of this package that called, the innermost first."""
    names: list[str] = []
    while frame and len(names) < 3:
        file = frame.f_code.co_filename
        if "/megatron/" in file or "/examples/mimo/" in file:
            names.append(f"{Path(file).name}:{frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(names)


if __name__ == "__main__":
    folder, recorder = Path(sys.argv.pop(1)), Recorder()
    for name in METHODS:
        recorder.watch(name)
    for name, operation in PASSES.items():
        setattr(schedules, name, recorder.steps(getattr(schedules, name), operation))
    training.train_step = recorder.begins_iteration(training.train_step)
    command.run("train.py", main)
    rank = os.environ.get("RANK", "0")  # torch has forgotten it by now
    (folder / f"{rank}.json").write_text(json.dumps(recorder.iterations), encoding="utf-8")
