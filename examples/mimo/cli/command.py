"""What every command shares: one-line errors, a parser, quiet libraries, a process group of one.

Progress of many answers.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
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


def run(command: str, main: Callable[[], None]) -> None:
    """`main()`; a ValueError ends the process with one line on stderr and exit status 2.

    Under torchrun every rank meets a wrong input alike, so rank 0 speaks for all; once ranks
    differ (`speak_for_myself`), whoever meets it says so.
    """
    try:
        main()
        leave_process_group()
    except SystemExit:
        # Megatron ends so on --exit-interval and on signals.
        leave_process_group()
        raise
    except ValueError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or _every_rank_reports:
            alone = os.environ.get("WORLD_SIZE", "1") == "1"
            who = f" [rank {rank}]" if _every_rank_reports and not alone else ""
            say(f"{command}{who}: error: {' '.join(str(error).split())}")
        _end_now(2)
    except KeyboardInterrupt:
        _end_now(130)


def say(line: str) -> None:
    """A line on stderr, in one write: `print` under torchrun takes two, and ranks share a line."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _end_now(status: int) -> NoReturn:
    """Other ranks may wait in a collective for this one; a normal exit would wait for them."""
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status)


def leave_process_group() -> None:
    """Gloo's threads abort a process that ends while they run, in one of two tries."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, for `run` to print."""

    def error(self, message: str) -> NoReturn:
        refuse(self, message)


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """ValueError with argparse's message, and the flag that was perhaps meant."""
    known = [flag for action in parser._actions for flag in action.option_strings]
    wrong = next((word for word in message.split() if word.startswith("--")), "")
    close = difflib.get_close_matches(wrong, set(known) - {wrong}, n=1)
    hint = f"; did you mean {close[0]}?" if close and wrong not in known else ""
    raise ValueError(f"{message}{hint}")


_every_rank_reports = False


def report_every_rank() -> None:
    """From here on a rank may fail alone, so each reports its own errors."""
    global _every_rank_reports
    _every_rank_reports = True


def prepare_environment() -> None:
    """Set what libraries read at import; their warnings do not reach the terminal."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for library in ("torch", "torch.utils.cpp_extension", "megatron", "absl"):
        logging.getLogger(library).setLevel(logging.ERROR)


def alone_unless_launched() -> None:
    """Without torchrun a command is a world of one; give it an address."""
    if "RANK" in os.environ:
        return
    # At port 0 the store takes a free one, which nobody can take first.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(address | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})


@contextlib.contextmanager
def stdout_to(path: str) -> Iterator[None]:
    """What libraries print goes to `path`; a command's own results are printed outside."""
    with open(path, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield


EVERY_SECONDS = 5.0


class ProgressBar:
    """Says on stderr how many of `total` are done and how long the rest takes."""

    def __init__(self, title: str = "", total: int | None = None) -> None:
        self.title, self.total = title, total
        self.started = self.last_printed = time.perf_counter()

    def __call__(self, done: int) -> None:
        """Prints a line if `done` are done, more are left and five seconds have passed."""
        now = time.perf_counter()
        is_due = now - self.last_printed > EVERY_SECONDS and done != self.total
        if not is_due or os.environ.get("RANK", "0") != "0":
            return
        self.last_printed = now
        line = f"  {self.title}: {done:,}"
        if self.total is not None:
            left = (now - self.started) / max(done, 1) * (self.total - done)
            line += f" of {self.total:,}, {left:.0f} s left"
        say(line)

    def step(self, title: str, done: int, total: int | None) -> None:
        """The same for a task of several steps; `total` is None while it is not known."""
        if title != self.title:
            self.started = self.last_printed = time.perf_counter()
        self.title, self.total = title, total
        self(done)
