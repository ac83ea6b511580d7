"""An interpreter that has imported Megatron, and forks processes that run a script.

`python -m tests.helpers.warm SOCKET [MODULES]`: every message on the socket, whose descriptor is
the argument, asks for a process; ranks.py sends them. MODULES are imported beforehand, too.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from pathlib import Path

from PIL import Image

from examples.mimo import compat
from examples.mimo.cli import command

OF_TRAINING = (
    "megatron.training",
    "megatron.training.argument_utils",
    "megatron.core.dist_checkpointing.gpt_checkpoint_interop",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.models.vision.multimodal_projector",
    "megatron.core.tokenizers.text",
    "megatron.core.tokenizers.text.models",
    "sentencepiece.sentencepiece_model_pb2",
    "torch.utils.serialization",
    "torchaudio",
    "examples.mimo.planner.dry_run",
    "examples.mimo.cli.observer",
    "examples.mimo.hf.weights",
    "examples.mimo.modalities.audio",
    "examples.mimo.modalities.image",
    "examples.mimo.modalities.recordings",
    "examples.mimo.training.pretrain",
    "examples.mimo.compat.megatron",
    "examples.mimo.compat.kernels",
)
MOST_BYTES = 2**18  # of a message: a command line and an environment


def warm_up(modules: list[str]) -> None:
    """Import what `train.py` imports, and `modules`."""
    # One thread, or a fork would lose the others.
    os.environ["OMP_NUM_THREADS"] = "1"
    command.prepare_environment()
    compat.install()
    for module in (*OF_TRAINING, *modules):
        importlib.import_module(module)
    Image.init()
    remember_flags()
    # A collection in a forked process would write to every object that is here, and so copy it.
    gc.collect()
    gc.freeze()


def remember_flags() -> None:
    """Read the sources of Megatron's configs, whose docstrings describe its flags, only once.

    That is most of what parsing a command line takes.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    read = ArgumentGroupFactory._get_field_docstrings
    known: dict[type, dict[str, str]] = {}

    def read_once(self: ArgumentGroupFactory, source: type) -> dict[str, str]:
        if source not in known:
            known[source] = read(self, source)
        return known[source]

    ArgumentGroupFactory._get_field_docstrings = read_once
    add_megatron_arguments(argparse.ArgumentParser())


def fork_on_request(control: socket.socket) -> None:
    """Fork a process for every message, until there are no more.

    With a message come descriptors: its stdin, stdout and stderr, and where its id is written and,
    when it has ended, its exit status and the CPU seconds that it and its children took.
    """
    running: dict[int, tuple[int, int]] = {}
    while True:
        for ready in select.select([control.fileno(), *running], [], [])[0]:
            if ready in running:
                pid, report = running.pop(ready)
                _, status, used = os.wait4(pid, 0)
                seconds = used.ru_utime + used.ru_stime
                with contextlib.suppress(BrokenPipeError):
                    os.write(report, f"{os.waitstatus_to_exitcode(status)} {seconds}\n".encode())
                os.close(report)
                os.close(ready)
                continue
            message, descriptors, _, _ = socket.recv_fds(control, MOST_BYTES, 4)
            if not message:
                return
            *streams, report = descriptors
            pid = os.fork()
            if pid == 0:
                control.close()
                for descriptor in (report, *running, *(other for _, other in running.values())):
                    os.close(descriptor)
                become(streams, **json.loads(message))
            running[os.pidfd_open(pid)] = pid, report
            for stream in streams:
                os.close(stream)
            with contextlib.suppress(BrokenPipeError):
                os.write(report, f"{pid}\n".encode())


def become(
    streams: list[int], argv: list[str], variables: dict[str, str], folder: str, session: bool
) -> None:
    """Run `argv` as `python argv` would in this environment, and end as it would.

    What an interpreter does last, to take itself apart object by object, is left out: it costs more
    than most tests' runs. Threads are waited for, and what is registered for the exit is called.
    """
    ctypes.CDLL(None).prctl(command.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if session:
        os.setsid()
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    status = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, int):
            status = ended.code
        elif ended.code is not None:
            print(ended.code, file=sys.stderr)
            status = 1
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError, ValueError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    # Ctrl-C reaches the whole group; the processes decide what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warm_up(sys.argv[2:])
    fork_on_request(socket.socket(fileno=int(sys.argv[1])))
