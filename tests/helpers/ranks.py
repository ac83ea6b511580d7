"""Runs scripts in processes that are forked from interpreters which have imported Megatron.

Its imports take a process longer than ten iterations of a tiny model, and longer than most tests.
What a user types is still tested once for each command, with `python` and under torchrun; tests
of what commands do, and comparisons of many layouts, start here.

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
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
WARM = "tests.helpers.warm"
# Ranks that wait for one another for ever are ended after so many seconds.
PATIENCE_SECONDS = 600
# A rank that its launcher ends may say first what it was doing.
GRACE_SECONDS = 10
# Between two looks at whether it is time to kill a rank.
POLL_SECONDS = 0.001
# Commands are forked from the first interpreter, which imports what those beside train.py use.
OF_COMMANDS = (
    "examples.mimo.generation.api",
    "examples.mimo.generation.sessions",
    "examples.mimo.hf.from_hf",
    "examples.mimo.shards.show",
    "examples.mimo.shards.write",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.whisper.modeling_whisper",
)
# Forked processes, and CPU seconds of those that have ended, by kind.
started: Counter[str] = Counter()
spent: Counter[str] = Counter()
interpreters: list[WarmInterpreter] = []


class WarmInterpreter:
    """A process that forks others; see warm.py."""

    def __init__(self, number: int) -> None:
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        seeded = {"PYTHONPATH": python_path, "PYTHONHASHSEED": str(number)}
        # A message is one request, whoever sends at the same time.
        self.requests, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with control:
            self.process = subprocess.Popen(
                [sys.executable, "-m", WARM, str(control.fileno()), *OF_COMMANDS * (number == 0)],
                cwd=ROOT,
                env={**os.environ, **seeded},
                stdin=subprocess.DEVNULL,
                pass_fds=[control.fileno()],
            )
        atexit.register(self.process.kill)
        interpreters.append(self)

    def fork(self, request: Mapping[str, object], streams: Sequence[int]) -> IO[bytes]:
        """Ask for a process; where its id and then its exit status will be read."""
        reports, report = os.pipe()
        socket.send_fds(self.requests, [json.dumps(request).encode()], [*streams, report])
        os.close(report)
        return os.fdopen(reports, "rb", buffering=0)

    def seconds(self) -> float:
        """The CPU time of the interpreter itself so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


@functools.cache
def warm_interpreter(number: int) -> WarmInterpreter:
    """The one that all runs of this process fork their rank `number` from."""
    return WarmInterpreter(number)


class Forked:
    """A script's process, with what tests use of `subprocess.Popen`.

    `stdout` and `stderr` are files that are open for writing; without one it is dropped.
    """

    def __init__(
        self,
        argv: Sequence[str],
        number: int = 0,
        variables: Mapping[str, str] | None = None,
        stdin: IO[Any] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        start_new_session: bool = False,
        kind: str = "commands",
    ) -> None:
        request = {
            "argv": argv,
            "variables": dict(os.environ if variables is None else variables),
            "folder": str(ROOT),
            "session": start_new_session,
        }
        self.args, self.kind = argv, kind
        self.returncode: int | None = None
        with open(os.devnull, "r+") as null:
            streams = [(stream or null).fileno() for stream in (stdin, stdout, stderr)]
            self.reports = warm_interpreter(number).fork(request, streams)
        started[kind] += 1
        self._pid = 0

    @property
    def pid(self) -> int:
        """The process id; the first process waits for Megatron's imports."""
        if not self._pid:
            line = self.reports.readline()
            assert line, "the interpreter that forks has ended"
            self._pid = int(line)
        return self._pid

    def poll(self) -> int | None:
        """The exit status, or None while the process runs."""
        return self._ended_within(0)

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        """The exit status, when the process has ended."""
        status = self._ended_within(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def _ended_within(self, seconds: float) -> int | None:
        if self.returncode is None and self.pid and _readable([self.reports], seconds):
            line = self.reports.readline().split()
            assert line, "the interpreter that forks has ended"
            self.returncode = int(line[0])
            spent[self.kind] += float(line[1])
            self.reports.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send the process a signal, unless it has ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Launched:
    """The ranks of a script, which end together, as under torchrun.

    With `processes` 0 it is one process without a launcher, as `python script` starts it.
    """

    def __init__(
        self,
        script: str,
        *flags: str,
        processes: int = 1,
        kind: str = "ranks",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        port = free_port()
        self.args = [script, *flags]
        self.files = [tempfile.NamedTemporaryFile("ab") for _ in ("stdout", "stderr")]  # noqa: SIM115
        self.processes = [
            Forked(
                [str(ROOT / script), *flags],
                number=rank,
                variables={**(environment or os.environ), **variables(rank, processes, port)},
                stdout=self.files[0],
                stderr=self.files[1],
                kind=kind,
            )
            for rank in range(max(1, processes))
        ]

    def poll(self) -> int | None:
        """The first exit status, if any rank has ended."""
        ended = (process.poll() for process in self.processes)
        return next((status for status in ended if status is not None), None)

    def wait(
        self,
        timeout: float = PATIENCE_SECONDS,
        kill_when: Callable[[], Collection[int]] = tuple,
    ) -> int:
        """The first exit status that is not 0, or 0, when all ranks have ended.

        The other ranks are ended then, or when so many seconds are over. The ranks that `kill_when`
        returns, which is called all the time, get SIGKILL.
        """
        polls = kill_when is not tuple
        assert all(process.pid for process in self.processes)
        running = {p.reports: p for p in self.processes if p.poll() is None}
        statuses = [p.returncode for p in self.processes if p.returncode is not None]
        deadline = time.monotonic() + timeout
        while running and not any(statuses):
            left = max(0, deadline - time.monotonic())
            ended = _readable(list(running), POLL_SECONDS if polls else left)
            if not ended and not left:
                break
            for rank in kill_when() if polls else ():
                polls = False
                self.processes[rank].kill()
            statuses += [running.pop(reports).wait() for reports in ended]
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            statuses.append(process.wait())
        return next((status for status in statuses if status), 0)

    def send_signal(self, number: int) -> None:
        """Send all ranks a signal."""
        for process in self.processes:
            process.send_signal(number)

    def said(self) -> list[str]:
        """What the ranks have printed on stdout and on stderr so far."""
        return [Path(file.name).read_text(encoding="utf-8") for file in self.files]


def run(
    script: str,
    *flags: str,
    processes: int = 1,
    kill_when: Callable[[], Collection[int]] = tuple,
    kind: str = "ranks",
) -> subprocess.CompletedProcess[str]:
    """What `script`, a path from the root of the repository, did on all its ranks; see above."""
    ranks = Launched(script, *flags, processes=processes, kind=kind)
    status = ranks.wait(kill_when=kill_when)
    said = ranks.said()
    for file in ranks.files:
        file.close()
    return subprocess.CompletedProcess(ranks.args, status, *said)


def _readable(files: list[IO[bytes]], seconds: float) -> list[IO[bytes]]:
    """Those of `files` that have something to read within so many seconds."""
    return select.select(files, [], [], seconds)[0]


def variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank."""
    # Ranks on the cores of one machine.
    threads = {"OMP_NUM_THREADS": "1"}
    if not processes:
        return threads
    return {
        **threads,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
