"""Runs a script on several ranks, forked from a process that has imported Megatron once.

Its imports take a rank longer than ten iterations of a tiny model, and torchrun pays them on
every rank of every launch. What a user types is still tested under torchrun; comparisons of
many layouts start here. Such ranks share the hash seed of the process they are forked from, and
with it the order of every set; `run_apart` starts ranks that do not.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

ROOT = Path(__file__).resolve().parents[2]
WARM = "tests.helpers.warm"
# Ranks that wait for one another for ever are ended after so many seconds.
PATIENCE_SECONDS = 240


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
                (processes, free_port(), script, flags, printed),
                nprocs=processes,
                start_method="forkserver",
            )
        except ProcessExitedException as failed:
            returncode = failed.exit_code
        except ProcessRaisedException as failed:
            returncode, traceback = 1, str(failed)
        out, err = (file.read_text(encoding="utf-8") for file in printed)
    return subprocess.CompletedProcess([script, *flags], returncode, out, err + traceback)


def run_apart(
    script: str, *flags: str, hash_seeds: Sequence[int]
) -> subprocess.CompletedProcess[str]:
    """What `script` did on ranks that are interpreters of their own, each with its hash seed.

    The first code that is not 0 is the returned one; the ranks' output stands rank after rank.
    """
    port, started = free_port(), []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank, seed in enumerate(hash_seeds):
                variables = _variables(rank, len(hash_seeds), port)
                with (
                    Path(folder, f"{rank}.stdout").open("w") as out,
                    Path(folder, f"{rank}.stderr").open("w") as err,
                ):
                    rank_process = subprocess.Popen(
                        [sys.executable, str(ROOT / script), *flags],
                        cwd=ROOT,
                        env={**os.environ, **variables, "PYTHONHASHSEED": str(seed)},
                        stdout=out,
                        stderr=err,
                    )
                started.append(rank_process)
            codes = [process.wait(timeout=PATIENCE_SECONDS) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        printed = [
            "".join(
                Path(folder, f"{rank}.{stream}").read_text(encoding="utf-8", errors="replace")
                for rank in range(len(hash_seeds))
            )
            for stream in ("stdout", "stderr")
        ]
    code = next((code for code in codes if code), 0)
    return subprocess.CompletedProcess([script, *flags], code, *printed)


def _variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Ranks on the cores of one machine.
        "OMP_NUM_THREADS": "1",
    }


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
    os.environ.update(_variables(rank, processes, port))
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
