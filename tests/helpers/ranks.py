"""Runs a script on several ranks, each forked from an interpreter that has imported Megatron.

Its imports take a rank longer than ten iterations of a tiny model, and torchrun pays them on
every rank of every launch. What a user types is still tested under torchrun; comparisons of
many layouts start here.

Rank r is always forked from the r-th interpreter, whose hash seed is r: no two ranks of a run need
have the same order of a set, just as under torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WARM = "tests.helpers.warm"
# Ranks that wait for one another for ever are ended after so many seconds.
PATIENCE_SECONDS = 600
# A rank that its launcher ends may say first what it was doing.
GRACE_SECONDS = 10
# Between two looks at whether it is time to kill a rank.
POLL_SECONDS = 0.001


class WarmInterpreter:
    """A process that forks one rank at a time; see warm.py."""

    def __init__(self, hash_seed: int) -> None:
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        seeded = {"PYTHONPATH": python_path, "PYTHONHASHSEED": str(hash_seed)}
        # Unbuffered: `select` sees only what no buffer has taken already.
        self.process = subprocess.Popen(
            [sys.executable, "-m", WARM],
            cwd=ROOT,
            env={**os.environ, **seeded},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        atexit.register(self.process.kill)
        assert self.process.stdin
        assert self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.rank_pid = 0

    def start(self, **request: object) -> None:
        """Ask for a rank; `wait_until_started` must follow."""
        self.requests.write(json.dumps(request).encode() + b"\n")

    def wait_until_started(self) -> None:
        """Until the rank runs; the first one waits for Megatron's imports."""
        self.rank_pid = self._answer()

    def end(self, signal_number: int) -> None:
        """Send the rank a signal, unless it has ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.rank_pid, signal_number)

    def status(self) -> int:
        """The exit status of the rank, when it has ended."""
        return self._answer()

    def has_ended(self, seconds: float) -> bool:
        """Whether the rank ends within so many seconds."""
        return bool(select.select([self.answers], [], [], seconds)[0])

    def _answer(self) -> int:
        line = self.answers.readline()
        assert line, f"the interpreter of a rank ended with status {self.process.wait()}"
        return int(line)


@functools.cache
def warm_interpreter(rank: int) -> WarmInterpreter:
    """The one that all runs of this process fork their rank `rank` from."""
    return WarmInterpreter(hash_seed=rank)


def run(
    script: str, *flags: str, processes: int = 1, kill_when: Callable[[], Collection[int]] = tuple
) -> subprocess.CompletedProcess[str]:
    """What `script`, a path from the root of the repository, did on all its ranks.

    The first exit status that is not 0 is the returned one; the other ranks are ended then. The
    ranks that `kill_when` returns, which is called all the time, get SIGKILL.
    """
    interpreters = [warm_interpreter(rank) for rank in range(processes)]
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        printed = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        for rank, interpreter in enumerate(interpreters):
            interpreter.start(
                script=str(ROOT / script),
                flags=flags,
                variables=_variables(rank, processes, port),
                printed=printed,
            )
        for interpreter in interpreters:
            interpreter.wait_until_started()
        status = _wait(interpreters, kill_when)
        out, err = (Path(file).read_text(encoding="utf-8") for file in printed)
    return subprocess.CompletedProcess([script, *flags], status, out, err)


def _wait(interpreters: Sequence[WarmInterpreter], kill_when: Callable[[], Collection[int]]) -> int:
    """The first exit status that is not 0, or 0, when all ranks have ended."""
    polls = kill_when is not tuple
    running = {interpreter.answers: interpreter for interpreter in interpreters}
    statuses: list[int] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while running and not any(statuses):
        left = max(0, deadline - time.monotonic())
        ended, _, _ = select.select(list(running), [], [], POLL_SECONDS if polls else left)
        if not ended and not left:
            break
        for rank in kill_when() if polls else ():
            polls = False
            interpreters[rank].end(signal.SIGKILL)
        statuses += [running.pop(answers).status() for answers in ended]
    for interpreter in running.values():
        interpreter.end(signal.SIGTERM)
    for interpreter in running.values():
        if not interpreter.has_ended(GRACE_SECONDS):
            interpreter.end(signal.SIGKILL)
        statuses.append(interpreter.status())
    return next((status for status in statuses if status), 0)


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


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
