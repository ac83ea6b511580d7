"""What every command shares: one-line errors, a parser, quiet libraries, a progress line.

Imports nothing slow, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

# Read once, when torch, transformers or CUDA start.
ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    # Energon shows a bar for every buffer that it fills.
    "TQDM_DISABLE": "1",
    # Megatron overlaps communication with computation by the order of kernel launches.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}

# Seconds: on a busy machine one rank may import the same code many seconds later than another.
RANK_ZERO_REPORTS_WITHIN = 20
# Between two lines of a `ProgressBar`.
PROGRESS_SECONDS = 5.0


def run(command: str, main: Callable[[], None]) -> None:
    """Call `main`; a ValueError ends the process with one line on stderr and exit status 2.

    Any other error has a traceback; it ends a rank at once too, and torchrun the others.

    Under torchrun every rank meets a wrong input alike, so rank 0 reports for all, and the others
    wait for torchrun to end them; once ranks differ (`report_every_rank`), each reports its own.
    """
    try:
        check_source_tree()
        main()
        leave_process_group()
    except SystemExit:
        # Megatron exits this way on --exit-interval and on signals.
        leave_process_group()
        raise
    except ValueError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank != 0 and not _every_rank_reports:
            # torchrun ends all ranks as soon as one exits: before rank 0 has reported, if this
            # rank is faster. A rank that outlives the wait met an error that rank 0 did not.
            time.sleep(RANK_ZERO_REPORTS_WITHIN)
        single = os.environ.get("WORLD_SIZE", "1") == "1"
        names_rank = rank != 0 or (_every_rank_reports and not single)
        who = f" [rank {rank}]" if names_rank else ""
        _say_nothing_more()
        log_line(f"{command}{who}: error: {' '.join(str(error).split())}")
        _exit_now(2)
    except KeyboardInterrupt:
        _exit_now(130)
    except Exception:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        _say_nothing_more()
        sys.excepthook(*sys.exc_info())
        _exit_now(1)


def check_source_tree() -> None:
    """ValueError when the running script and the imported package are of different clones.

    Python puts a script's own folder on the import path, not the root of its clone, so with the
    package installed from another clone a script would run that clone's code.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None:
        return
    script_folder, package = Path(script).resolve().parent, Path(__file__).resolve().parents[1]
    # A script of a test or a benchmark stands in no such folder.
    in_a_clone = (script_folder / "cli" / "command.py").is_file()
    if in_a_clone and script_folder != package:
        root = script_folder.parents[1]
        raise ValueError(
            f"this script is {script_folder / Path(script).name}, but the code it would run is "
            f"that of {package}; run `pip install -e .` in {root}, or set PYTHONPATH={root}"
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


def leave_process_group() -> None:
    """Close the process group: gloo's threads may abort a process that ends while they run."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line in one line, through `run`."""

    def error(self, message: str) -> NoReturn:
        refuse(self, message)


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Raise ValueError with argparse's message, and the flag that was perhaps meant."""
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


def prepare_environment() -> None:
    """Set what libraries read when they are imported, and keep their warnings off the terminal."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for library in ("torch", "torch.utils.cpp_extension", "megatron", "absl"):
        logging.getLogger(library).setLevel(logging.ERROR)


def single_process_unless_launched() -> None:
    """Without torchrun, set what it would: a world of one process with an address."""
    if "RANK" in os.environ:
        return
    # At port 0 the store takes a free one, which nobody can take first.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(address | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})


@contextlib.contextmanager
def stdout_to(path: str) -> Iterator[None]:
    """Send what libraries print to the file `path`; a command prints its results outside."""
    with open(path, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield


class ProgressBar:
    """Prints every five seconds how much of a long step is done, and the time left if known.

    Under torchrun rank 0 prints.
    """

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
        self.printed = now
        rest = ""
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
