"""Runs a script on several ranks, forked from a process that has imported Megatron once.

Its imports take a rank longer than ten iterations of a tiny model, and torchrun pays them on
every rank of every launch. What a user types is still tested under torchrun; comparisons of
many layouts start here.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

ROOT = Path(__file__).resolve().parent.parent
WARM = "benchmarks.warm"


def run(script: str, *flags: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """What `script`, a path from the root of the repository, did on all its ranks."""
    multiprocessing.set_forkserver_preload([WARM])
    returncode, traceback = 0, ""
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "stdout"), Path(folder, "stderr")
        for file in printed:
            file.touch()
        try:
            torch.multiprocessing.start_processes(
                _rank,
                (processes, _free_port(), script, flags, printed),
                nprocs=processes,
                start_method="forkserver",
            )
        except ProcessExitedException as failed:
            returncode = failed.exit_code
        except ProcessRaisedException as failed:
            returncode, traceback = 1, str(failed)
        out, err = (file.read_text(encoding="utf-8") for file in printed)
    return subprocess.CompletedProcess([script, *flags], returncode, out, err + traceback)


def _rank(
    rank: int,
    processes: int,
    port: int,
    script: str,
    flags: tuple[str, ...],
    printed: tuple[Path, Path],
) -> None:
    for descriptor, file in enumerate(printed, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
