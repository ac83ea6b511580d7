"""python examples/mimo/serve.py --ckpt DIR

Answers over HTTP in the shape of OpenAI's chat completions, at /v1/chat/completions; a page to
try it is at /. Under torchrun with --tp and --pp rank 0 serves and all ranks answer.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from examples.mimo.cli import command

if TYPE_CHECKING:
    import uvicorn

    from examples.mimo.serving.worker import Worker

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Connections that wait until they are accepted.
BACKLOG = 128
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Parse the command line, load the model and serve it."""
    args = _parser().parse_args()
    _check(args)
    # A port that is taken should not cost the time of loading.
    listener = _listen(args.host, args.port) if os.environ.get("RANK", "0") == "0" else None
    command.prepare_environment()
    command.single_process_unless_launched()
    from examples.mimo import compat

    compat.install()
    with command.stdout_to(os.devnull):
        serve(args, listener)


def serve(args: argparse.Namespace, listener: socket.socket | None) -> None:
    """Load the model on every rank; rank 0, with the listener, serves HTTP until a signal."""
    from examples.mimo.checkpoint.description import open_checkpoint
    from examples.mimo.generation.api import Mimo
    from examples.mimo.serving.worker import Worker

    _log_to_stderr()
    checkpoint = open_checkpoint(args.ckpt)
    model = Mimo(checkpoint, args.tp, args.pp, args.prefixes, args.cuda_graphs)
    worker = Worker(model, args.max_batch, args.max_waiting)
    if listener is None:
        # Torchrun signals every rank; rank 0 alone decides when all stop.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _run(worker)
        return
    import uvicorn

    from examples.mimo.serving.app import Limits, Server

    hosts = ("*",) if args.host not in LOOPBACK else (*LOOPBACK, *map(_address, LOOPBACK))
    key = os.environ.get(args.api_key_variable) or None
    limits = Limits(int(args.max_body_megabytes * 2**20), key, hosts)
    app = Server(model, worker, limits).app()
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    for number in STOP_SIGNALS:
        signal.signal(number, server.handle_exit)
    # The model stays in the thread that loaded it: torch's threads on the CPU belong to it.
    http_thread = threading.Thread(target=_serve_http, args=(server, listener, worker))
    http_thread.start()
    print(
        f"{model.config.name} at http://{_address(args.host)}:{args.port}, "
        f"{'with' if key else 'without'} an API key; Ctrl-C ends",
        file=sys.stderr,
    )
    try:
        _run(worker)
    finally:
        server.should_exit = True
        http_thread.join()
    if not server.started:
        raise ValueError("HTTP could not start; the lines above say why")


def _log_to_stderr() -> None:
    """Megatron sends every log to stdout, where nobody looks for the reason of a status 500."""
    log = logging.getLogger("examples.mimo")
    log.addHandler(logging.StreamHandler())
    log.propagate = False


def _run(worker: Worker) -> None:
    """Run the worker; ValueError, which ends every rank, when it cannot go on."""
    # A rank that fails alone must not wait for the others, which wait for it.
    command.report_every_rank()
    try:
        worker.run()
    except Exception:
        raise ValueError(worker.failure) from None


def _serve_http(server: uvicorn.Server, listener: socket.socket, worker: Worker) -> None:
    """Serve HTTP until a signal; then stop the worker."""
    try:
        server.run(sockets=[listener])
    finally:
        worker.stop()


def _address(host: str) -> str:
    """A host as addresses spell it."""
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    """Listen at the port; ValueError when it is taken, forbidden or not this machine's.

    Clients that come while the model loads are answered after that.
    """
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # Two servers may bind one port as long as neither listens.
        listener.listen(BACKLOG)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror}; name another") from None
    except UnicodeError:
        raise ValueError(f"--host {host}: not the name of a machine") from None
    return listener


def _check(args: argparse.Namespace) -> None:
    for package in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"serving needs {package}; pip install -e '.[serve]'")
    if not 0 < args.port < 65536:
        raise ValueError(f"--port {args.port}: from 1 to 65535")
    for name in ("max_batch", "max_waiting", "max_body_megabytes"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: more than 0")
    if args.prefixes < 0:
        raise ValueError(f"--prefixes {args.prefixes}: 0 or more")
    if args.host not in LOOPBACK and not os.environ.get(args.api_key_variable):
        raise ValueError(
            f"--host {args.host} lets other machines in; put an API key into the environment "
            f"variable {args.api_key_variable}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="serve.py", description="Answer over HTTP, in the shape of OpenAI's chat completions."
    )
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="what train.py --save wrote")
    add("--host", default=LOOPBACK[0], help="default 127.0.0.1: this machine only")
    add("--port", type=int, default=8000, help="default 8000")
    add("--api-key-variable", default="MIMO_API_KEY", metavar="NAME", help="holds the API key")
    add("--max-batch", type=int, default=16, metavar="N", help="answers at once, default 16")
    add(
        "--max-waiting", type=int, default=64, metavar="N", help="answers that may wait, default 64"
    )
    add("--max-body-megabytes", type=float, default=32, metavar="N", help="default 32")
    add(
        "--prefixes",
        type=int,
        default=4,
        metavar="N",
        help="conversations in the prefix cache, default 4",
    )
    add("--tp", type=int, default=1, help="tensor-parallel size, under torchrun")
    add("--pp", type=int, default=1, help="pipeline stages, under torchrun")
    add("--cuda-graphs", action="store_true", help="one launch per token instead of hundreds")
    return parser


if __name__ == "__main__":
    command.run("serve.py", main)
