"""The package's commands as tests run them, and flags and texts that many tests use."""

import os
import signal
import subprocess
import sys

import psutil

from tests.helpers import ranks
from tests.helpers.ranks import ROOT

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
QUESTION = "Digit eight. Which digit is this?"


def launch_command(script: str, *flags: str, processes: int = 0) -> subprocess.CompletedProcess:
    """A command of the package as a user types it, under torchrun with `processes`."""
    # A rehearsed device is in place only where its own launcher puts it (rehearsal.py).
    launch = os.environ.get("TEST_PYTHON", sys.executable).split()
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launch += [str(processes)]
    return subprocess.run(
        [*launch, str(ROOT / "examples/mimo" / script), *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_command(script: str, *flags: str, processes: int = 0) -> subprocess.CompletedProcess:
    """As `launch_command` does it, but in processes that need not import Megatron first.

    For tests of what a command does; that it starts as a user types it is tested once for each.
    """
    if "TEST_PYTHON" in os.environ:
        return launch_command(script, *flags, processes=processes)
    return ranks.run(f"examples/mimo/{script}", *flags, processes=processes, kind="commands")


def python_path() -> str:
    """The root, where tests define models of their own, and what this process was shown."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def run_train(*flags: str, processes: int = 1) -> subprocess.CompletedProcess:
    """`train.py` on ranks that need not import Megatron first; comparisons of runs use it."""
    return ranks.run("examples/mimo/train.py", *flags, processes=processes)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and its ranks, whose helpers must end by themselves."""
    below = psutil.Process(process.pid).children(recursive=True)
    ranks_of_it = [member for member in below if member.ppid() == process.pid]
    for member in [process, *ranks_of_it]:
        os.kill(member.pid, signal.SIGKILL)
    process.wait()
    assert len(below) > len(ranks_of_it)
    assert not psutil.wait_procs(below, timeout=120)[1]
