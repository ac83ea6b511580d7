"""An interpreter that has imported Megatron, and forks ranks that run a script.

`python -m tests.helpers.warm`: a line of JSON on stdin starts a rank, which is answered with its
process id, and when it has ended with its exit status. See ranks.py.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys

from examples.mimo import compat
from examples.mimo.cli import command


def warm_up() -> None:
    """Import what `train.py` imports."""
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


def start_ranks() -> None:
    """Fork a rank for every request; returns when there are no more, and in every rank."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            answers.close()
            become_rank(**json.loads(line))
            return
        print(pid, file=answers)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers)


def become_rank(
    script: str, flags: list[str], variables: dict[str, str], printed: list[str]
) -> None:
    """Run `script` as `python script flags` would, with stdout and stderr in the files `printed`.

    The interpreter then ends as it does behind any script, with its exit status.
    """
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, file in enumerate(printed, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(variables)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    warm_up()
    start_ranks()
