"""What every command shares: one-line errors, a parser, quiet libraries, a progress line.

Imports nothing slow, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import errno
import fcntl
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

# Read once, when torch, transformers or CUDA start.
ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # Energon shows a bar for every buffer that it fills
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron overlaps by the order of kernel launches
    # cuDNN's attention plans anew for every shape; torch then takes its flash kernels first.
    "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    # Else a CUDA graph with NCCL's kernels may read memory that moved: see below.
    "NCCL_GRAPH_REGISTER": "0",
    "THP_MEM_ALLOC_ENABLE": "1",  # large tensors on a CPU in large pages
}
# Micro-batches differ in shape, so freed blocks of one seldom fit the next; segments that grow do.
# They cannot hold the buffers that NCCL registers for --use-nccl-ub.
ALLOCATOR, OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"

RANK_ZERO_REPORTS_WITHIN = 20  # seconds: on a busy machine ranks import at different speeds
RANKS_REPORT_WITHIN = 5  # seconds, an error that all of them meet
PROGRESS_SECONDS = 5.0  # between two lines of a `ProgressBar`
# What the system says when it has no more of something, where it names no file.
LIMITS = {
    os.strerror(errno.EMFILE): "raise the limit with ulimit -n",
    os.strerror(errno.EAGAIN): "raise the number of processes with ulimit -u",
    "can't start new thread": "raise the number of processes with ulimit -u",
    os.strerror(errno.ENOSPC): "see the folders that are written, and /tmp and /dev/shm",
    os.strerror(errno.ENOMEM): "free memory, or use smaller batches",
}
# What to lower where a command has no memory left, on a GPU or in the machine.
OUT_OF_MEMORY = {
    "train.py": "lower --micro-batch-size, add --recompute-granularity full --recompute-method "
    "uniform --recompute-num-layers 1, or raise --tensor-model-parallel-size; --dry-run estimates "
    "what a run holds",
    "avlm_inference.py": "lower --batch-size or --max-new-tokens, or raise --tp or --pp",
    "evaluate.py": "lower --batch-size, or raise --tp or --pp",
    "serve.py": "lower --max-cache-gigabytes or --max-batch, or raise --tp or --pp",
}
# How libraries say it, beside `torch.OutOfMemoryError`: the driver, NCCL, cuBLAS, torch on CPUs.
OUT_OF_MEMORY_WORDS = ["CUDA error: out of memory", "'out of memory'"]
OUT_OF_MEMORY_WORDS += ["CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory"]
LOCK_FILE = ".in_use"  # in a folder that a run writes to
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class RunError(ValueError):
    """An error of the whole run, such as a full disk: one rank reports it, the others end silently.

    Without a message, another rank knows what it was.
    """


_command = ""
last_word = threading.Lock()  # held by the thread that says why this process ends, and ends it


def run(command: str, main: Callable[[], None]) -> None:
    """Call `main`; a ValueError ends the process with one line on stderr and exit status 2.

    So do errors of the system, such as a full disk or memory. Any other error has a traceback; it
    ends a rank at once too, and torchrun the others. No process that `main` forks outlives it.

    Under torchrun every rank meets a wrong input alike, so rank 0 reports for all, and the others
    wait for torchrun to end them; once ranks differ (`report_every_rank`), each reports its own.
    """
    global _command
    _command = command
    try:
        end_children_with_this_process()
        check_source_tree()
        main()
        leave_process_group()
    except SystemExit:
        leave_process_group()  # Megatron exits this way on --exit-interval and on signals
        raise
    except KeyboardInterrupt:
        _exit_now(130)
    except Exception as error:
        if (line := one_line(error)) is not None:
            _report(command, line, error)
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        _say_nothing_more()
        last_word.acquire()
        sys.excepthook(*sys.exc_info())
        _exit_now(1)


def one_line(error: BaseException) -> str | None:
    """What a user is told of an error that the input or the system caused; None for any other."""
    if type(error).__name__ in ("DistNetworkError", "DistStoreError"):  # torch's
        address = ":".join(os.environ.get(f"MASTER_{name}", "") for name in ("ADDR", "PORT"))
        first = str(error).split(". ")[0].split("\n")[0]
        return f"the ranks cannot meet at {address} (MASTER_ADDR, MASTER_PORT): {first}"
    if isinstance(error, ValueError):
        text = str(error)  # of a worker that reads data, with its traceback
        if "Original Traceback (most recent call last)" in text:
            text = text.rpartition(f"{type(error).__name__}: ")[2]
        return " ".join(text.split())
    # Without a number it is no error of the system.
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return f"{error.filename}: {error.strerror}"
    if is_out_of_memory(error):
        remedy = OUT_OF_MEMORY.get(_command, LIMITS[os.strerror(errno.ENOMEM)])
        return f"{_lack_of_memory(error)}; {remedy}"
    for limit, remedy in LIMITS.items():
        if isinstance(error, (OSError, RuntimeError)) and limit in str(error):
            return f"{limit}; {remedy}"
    return error.strerror if isinstance(error, OSError) and error.errno is not None else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine has no memory left for what was to be allocated."""
    of_torch = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if isinstance(error, (MemoryError, of_torch)):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in OUT_OF_MEMORY_WORDS)


def _lack_of_memory(error: BaseException) -> str:
    """What was to be allocated and what is free, of the many sentences that torch writes."""
    sentences = re.split(r"\. (?=[A-Z])", " ".join(str(error).split()).removesuffix("."))
    telling = re.compile("out of memory|(ried|able) to allocate|total capacity")
    kept = [sentence for sentence in sentences if telling.search(sentence)]
    return "; ".join(kept[:3]) or "out of memory"


def _report(command: str, line: str, error: Exception) -> NoReturn:
    """Say `line`, with the rank where ranks differ, and end the process."""
    rank = os.environ.get("RANK", "0")
    rank = rank if rank.isdecimal() else "0"
    single = os.environ.get("WORLD_SIZE", "1") == "1"
    _say_nothing_more()
    # Of the run, wherever it is met: a rank without memory may be the only one.
    of_the_run = int((isinstance(error, RunError) or is_out_of_memory(error)) and bool(line))
    if rank != "0" and not of_the_run and not (_every_rank_reports and line):
        # torchrun ends all ranks as soon as one exits: before rank 0 has reported, if this
        # rank is faster. A rank that outlives the wait met an error that rank 0 did not.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_ZERO_REPORTS_WITHIN)
    last_word.acquire()
    if line and count_reports(of_the_run) == of_the_run:
        names_rank = rank != "0" or (_every_rank_reports and not single)
        log_line(f"{command}{f' [rank {rank}]' * names_rank}: error: {line}")
    # The count ends with rank 0, unless torchrun holds it.
    deadline = time.monotonic() + RANKS_REPORT_WITHIN * of_the_run * (rank == "0")
    while time.monotonic() < deadline and 0 < count_reports() < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
    _exit_now(2)


def count_reports(more: int = 0) -> int:
    """How often a `RunError` was reported by any rank, `more` of them now by this one.

    The count is in the store through which the ranks met. It may be on a rank that has ended; then
    nobody can tell, and this rank counts for itself.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return more
    try:
        return torch.distributed.distributed_c10d._get_default_store().add("mimo/reports", more)
    except RuntimeError:
        return more


def check_source_tree() -> None:
    """ValueError when the running script is of one clone, and the installed package of another.

    Python puts a script's own folder on the import path, not the root of its clone.
    """
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
    package, root = Path(__file__).resolve().parents[1], script.parents[2:3]
    # A script of a test or a benchmark stands in no such folder.
    if (script.parent / "cli" / "command.py").is_file() and script.parent != package:
        raise ValueError(
            f"this script is {script}, but the code it would run is that of {package}; run "
            f"`pip install -e .` in {root[0]}, or set PYTHONPATH={root[0]}"
        )


def log_line(line: str) -> None:
    """Write a line to stderr in one call: `print` makes two, and ranks under torchrun mingle."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _say_nothing_more() -> None:
    """Silence what says where a rank was when it was ended: it ends for a reason of its own."""
    signal.set_wakeup_fd(-1)


def _exit_now(status: int) -> NoReturn:
    """Other ranks may wait in a collective for this one; a normal exit would wait for them."""
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status)


# Objects with a method `drop`, which is called before the process group is closed.
dropped_first: weakref.WeakSet[Any] = weakref.WeakSet()


def leave_process_group() -> None:
    """Close the process group: gloo's threads may abort a process that ends while they run."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        for held in dropped_first:
            held.drop()
        torch.distributed.destroy_process_group()


def end_children_with_this_process() -> None:
    """From here on a forked process gets SIGKILL when its parent ends, however that is.

    Else readers of data and writers of shards outlive a command that is killed, and write into the
    folder of the next one. Linux does this for the thread that forks.
    """
    parents: list[int] = []
    prctl = ctypes.CDLL(None).prctl

    def end_with_parent() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parents[-1]:  # it ended before the call
            os._exit(1)

    os.register_at_fork(before=lambda: parents.append(os.getpid()), after_in_child=end_with_parent)


def hold_folder(flag: str, folder: Path, name: str = LOCK_FILE) -> None:
    """Keep other runs out of `folder` while this process lives; ValueError if one is in it.

    The lock is the system's: it ends with the process, also when that is killed, and no child
    inherits it. The file `name` in the folder stays behind and says who had it last.
    """
    file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            # As of a network file system that is mounted without locks.
            log_line(f"  {flag} {folder}: no lock here ({error.strerror}); run only one at a time")
            return
        raise ValueError(
            f"{flag} {folder}: {_holder(os.read(file, 4096))} writes here; wait until it ends, or "
            "name another folder"
        ) from None
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
    os.ftruncate(file, 0)
    os.pwrite(file, f"{json.dumps(holder)}\n".encode(), 0)


@contextlib.contextmanager
def hold_output(output: Path) -> Iterator[None]:
    """Keep others from writing the folder `output`; an error that names no file names it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = output.with_name(f".{output.name}{LOCK_FILE}")
    hold_folder(f"--output {output.name} in", lock.parent, lock.name)
    try:
        yield
    except OSError as error:
        error.filename = error.filename or f"--output {output}"
        raise
    finally:
        lock.unlink(missing_ok=True)


def _holder(content: bytes) -> str:
    """The process that a lock file names."""
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    except (ValueError, KeyError, TypeError):
        return "another process"


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line in one line, through `run`."""

    def error(self, message: str) -> NoReturn:
        refuse(self, message)


def at_least(low: float, kind: type = int) -> Callable[[str], Any]:
    """The type of a flag whose numbers are finite and no less than `low`."""

    def number(text: str) -> Any:
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: at least {low}")
        return value

    number.__name__ = kind.__name__  # by which argparse names it
    return number


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Raise ValueError with argparse's message, and the flag that was perhaps meant."""
    message = re.sub(r"^argument (--\S+): (\S+: at least)", r"\1 \2", message)
    known = [flag for action in parser._actions for flag in action.option_strings]
    wrong = next((word for word in message.split() if word.startswith("--")), "").rstrip(":")
    wrong = wrong.split("/")[0]  # argparse names a flag by all its names
    close = difflib.get_close_matches(wrong, [flag for flag in known if flag != wrong], n=1)
    hint = f"; did you mean {close[0]}?" if close and wrong not in known else ""
    raise ValueError(f"{message}{hint}")


_every_rank_reports = False


def report_every_rank() -> None:
    """From here on a rank may fail alone, so each reports its own errors."""
    global _every_rank_reports
    _every_rank_reports = True


def prepare_environment(uses_gpus: bool = True) -> None:
    """Set what libraries read when they are imported, and keep their warnings off the terminal.

    Without `uses_gpus` this process, and those that it starts, see none. Call it before torch is
    imported.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not uses_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if OLD_ALLOCATOR not in os.environ and "--use-nccl-ub" not in sys.argv:
        os.environ.setdefault(ALLOCATOR, "expandable_segments:True")
    warnings.filterwarnings("ignore")
    for library in ("torch", "torch.utils.cpp_extension", "megatron", "absl"):
        logging.getLogger(library).setLevel(logging.ERROR)


def single_process_unless_launched() -> None:
    """Without torchrun, set what it would: a world of one process with an address.

    ValueError for half of what a launcher sets.
    """
    if "RANK" in os.environ:
        _check_launch()
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and RANK is not set; start with torchrun, "
            "or unset WORLD_SIZE"
        )
    # At port 0 the store takes a free one, which nobody can take first.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(address | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})


def _check_launch() -> None:
    for name in ("RANK", "WORLD_SIZE"):
        if not ((value := os.environ.get(name)) or "").isdecimal():
            sets = "start with torchrun, which sets RANK and WORLD_SIZE"
            raise ValueError(f"{name} is {value!r}, no number; {sets}")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise ValueError(f"RANK {rank} of WORLD_SIZE {size}: ranks go from 0 to {size - 1}")
    if missing := [n for n in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]:
        raise ValueError(f"RANK is set, but {missing[0]} is not; start with torchrun")
    _check_gpus()


def _check_gpus() -> None:
    """ValueError where a machine has GPUs, but fewer than the processes that were started on it.

    Or a launcher shows each process a GPU of its own (torchrun --virtual-local-rank), its first.
    """
    rank, processes = (os.environ.get(f"LOCAL_{name}", "0") for name in ("RANK", "WORLD_SIZE"))
    if not (rank + processes).isdecimal() or (needed := max(int(processes), int(rank) + 1)) == 1:
        return
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    single = gpus == 1 and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")
    if not gpus or needed <= gpus or (single and rank == "0"):
        return
    if single and rank == "1":  # rank 0 cannot tell, so it does not report
        report_every_rank()
    raise ValueError(
        f"{needed} processes on this machine, but {gpus} visible GPU{'s' * (gpus > 1)}; start "
        f"{gpus} with torchrun --nproc-per-node {gpus}, show more in CUDA_VISIBLE_DEVICES, or set "
        "CUDA_VISIBLE_DEVICES= to run on CPUs"
    )


@contextlib.contextmanager
def stdout_to(path: str) -> Iterator[None]:
    """Send what libraries print to the file `path`; a command prints its results outside."""
    with open(path, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield


class ProgressBar:
    """Prints every five seconds, on rank 0, how much is done, and the time left if known."""

    def __init__(self, title: str = "", total: int | None = None) -> None:
        self.begin(title, total)

    def begin(self, title: str, total: int | None) -> None:
        """A step of `total` items begins now."""
        self.title, self.total = title, total
        self.started = self.printed = time.perf_counter()

    def __call__(self, done: int) -> None:
        """`done` items of the step are done."""
        now = time.perf_counter()
        finished = self.total is not None and done >= self.total
        if now - self.printed <= PROGRESS_SECONDS or finished or os.environ.get("RANK", "0") != "0":
            return
        self.printed, rest = now, ""
        if self.total is not None:
            seconds_left = (now - self.started) / max(done, 1) * (self.total - done)
            rest = f" of {self.total:,}, {seconds_left:.0f} s left"
        log_line(f"  {self.title}: {done:,}{rest}")

    def step(self, title: str, done: int, total: int | None) -> None:
        """As a call, for work of several steps: a new title begins a new one."""
        if title != self.title:
            self.begin(title, total)
        self.total = total
        self(done)
