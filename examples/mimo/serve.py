"""python examples/mimo/serve.py --ckpt DIR

Answers over HTTP in the shape of OpenAI's chat completions, at /v1/chat/completions; a page to
try it is at /. Under torchrun with --tp and --pp rank 0 serves and all ranks answer.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.mimo.cli import command
from examples.mimo.cli.overrides import add_integrity_flag

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from examples.mimo.serving.app import Limits
    from examples.mimo.serving.worker import Metrics, Worker

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Connections that wait until they are accepted.
BACKLOG = 128
# Flags that bound what clients may take.
LIMITS = {
    "max_body_megabytes": (32.0, "one body"),
    "max_bodies_megabytes": (128.0, "bodies that are read at once"),
    "max_decoding_megapixels": (80.0, "millions of pixels and samples that are decoded at once"),
    "max_kept_megabytes": (16.0, "answers with sound, which later requests may name"),
    "kept_seconds": (3600.0, "for which such an answer is kept"),
    "max_connections": (512, "open connections"),
    "head_seconds": (10.0, "for the head of a request, or an idle connection"),
    "body_seconds": (60.0, "for the body of a request"),
    "write_seconds": (30.0, "for a client that does not read its answer"),
}
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
    checkpoint = open_checkpoint(args.ckpt, verify=args.verify_integrity)
    model = Mimo(checkpoint, args.tp, args.pp, args.prefixes, args.cuda_graphs)
    gigabytes = args.max_cache_gigabytes
    cache_tokens = model.limit_cache(None if gigabytes is None else int(gigabytes * 2**30))
    worker = Worker(model, args.max_batch, args.max_waiting, cache_tokens)
    if listener is None:
        # Torchrun signals every rank; rank 0 alone decides when all stop.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _run(worker)
        return
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from examples.mimo.serving.app import Limits, Server

    hosts = ("*",) if args.host not in LOOPBACK else (*LOOPBACK, *map(_address, LOOPBACK))
    key = os.environ.get(args.api_key_variable) or None
    limits = Limits(
        body_bytes=int(args.max_body_megabytes * 2**20),
        bodies_bytes=int(args.max_bodies_megabytes * 2**20),
        decoding=int(args.max_decoding_megapixels * 1e6),
        kept_bytes=int(args.max_kept_megabytes * 2**20),
        kept_seconds=args.kept_seconds,
        connections=args.max_connections,
        head_seconds=args.head_seconds,
        body_seconds=args.body_seconds,
        write_seconds=args.write_seconds,
        api_key=key,
        hosts=hosts,
    )
    application = Server(model, worker, limits)

    def connection(**options: Any) -> BoundedConnection:
        return BoundedConnection(H11Protocol(**options), limits, application.metrics)

    config = uvicorn.Config(
        OneLengthMiddleware(application.app()),
        http=connection,  # type: ignore[arg-type]
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    for number in STOP_SIGNALS:
        signal.signal(number, server.handle_exit)
    # The model stays in the thread that loaded it: torch's threads on the CPU belong to it.
    http_thread = threading.Thread(target=_serve_http, args=(server, listener, worker))
    http_thread.start()
    print(
        f"{model.config.name} at http://{_address(args.host)}:{args.port}, "
        f"{'with' if key else 'without'} an API key, with a cache of {cache_tokens:,} tokens; "
        "Ctrl-C ends",
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
        # Of any kind: the worker keeps the reason, which `/health` told until now.
        raise ValueError(worker.failure) from None


def _serve_http(server: uvicorn.Server, listener: socket.socket, worker: Worker) -> None:
    """Serve HTTP until a signal; then stop the worker."""
    try:
        server.run(sockets=[listener])
    finally:
        worker.stop()


class OneLengthMiddleware:
    """Refuses a body with two lengths, which a proxy may read otherwise than this server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 400 and close the connection, or pass the request on."""
        from starlette.responses import JSONResponse

        from examples.mimo.serving.openai import error_body

        names = [name for name, _ in scope.get("headers", ())]
        is_chunked = b"transfer-encoding" in names
        if is_chunked and (b"content-length" in names or scope["http_version"] == "1.0"):
            message = "Content-Length together with Transfer-Encoding, or that in HTTP/1.0"
            headers = {"Connection": "close"}
            await JSONResponse(error_body(400, message), 400, headers)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class BoundedConnection(asyncio.Protocol):
    """A connection around uvicorn's, which has no limits of time.

    It is closed when a head or a body takes too long, when it is idle, when its client does not
    read, and when there are too many.
    """

    def __init__(self, inner: H11Protocol, limits: Limits, metrics: Metrics) -> None:
        self.inner, self.limits, self.metrics = inner, limits, metrics
        self.phase = ""
        self.phase_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.inner.connection_made(transport)  # type: ignore[arg-type]
        count = len(self.inner.connections)
        self.metrics.connections.set(count)
        if count > self.limits.connections:
            self._refuse(503, f"more than {self.limits.connections} connections; try again")
        else:
            self._time_phase()

    def connection_lost(self, exc: Exception | None) -> None:
        self.inner.connection_lost(exc)
        self.metrics.connections.set(len(self.inner.connections))
        for timer in (self.phase_timer, self.write_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.inner.data_received(data)
        self._time_phase()

    def eof_received(self) -> None:
        self.inner.eof_received()

    def pause_writing(self) -> None:
        self.inner.pause_writing()
        seconds = self.limits.write_seconds
        self.write_timer = self.inner.loop.call_later(seconds, self._end_writing)

    def resume_writing(self) -> None:
        self.inner.resume_writing()
        if self.write_timer is not None:
            self.write_timer.cancel()

    def _time_phase(self) -> None:
        """Begin the time of a head or of a body when the connection comes to it."""
        phase = str(self.inner.conn.their_state)
        if phase == self.phase:
            return
        self.phase = phase
        if self.phase_timer is not None:
            self.phase_timer.cancel()
            self.phase_timer = None
        # A body that the application reads is refused by it; this is for those that it does not.
        seconds = {"IDLE": self.limits.head_seconds, "SEND_BODY": self.limits.body_seconds + 10}
        if phase in seconds:
            name = "head" if phase == "IDLE" else "body"
            call_later = self.inner.loop.call_later
            self.phase_timer = call_later(seconds[phase], self._end_phase, name)

    def _end_phase(self, name: str) -> None:
        self.metrics.timeouts.labels(name).inc()
        self._refuse(408, f"the {name} of the request took too long")

    def _end_writing(self) -> None:
        self.metrics.timeouts.labels("write").inc()
        self.inner.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer a request that the application has not answered, and close the connection."""
        import h11

        from examples.mimo.serving.openai import error_body

        conn, transport = self.inner.conn, self.inner.transport
        if conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.metrics.requests.labels(str(status)).inc()
            body = json.dumps(error_body(status, message)).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            headers += [("Connection", "close"), ("Retry-After", "1")]
            response = h11.Response(status_code=status, headers=headers)
            for event in (response, h11.Data(body), h11.EndOfMessage()):
                transport.write(conn.send(event) or b"")
        if self.inner.cycle is not None:
            self.inner.cycle.disconnected = True
            self.inner.cycle.message_event.set()
        transport.close()


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
    for name in ("max_batch", "max_waiting", *LIMITS):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{flag} {value}: more than 0")
    if args.max_bodies_megabytes < args.max_body_megabytes:
        raise ValueError(
            f"--max-bodies-megabytes {args.max_bodies_megabytes:g} must hold a body of "
            f"--max-body-megabytes {args.max_body_megabytes:g}"
        )
    gigabytes = args.max_cache_gigabytes
    if gigabytes is not None and not 0 < gigabytes < float("inf"):
        raise ValueError(f"--max-cache-gigabytes {gigabytes}: more than 0")
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
    for name, (default, what) in LIMITS.items():
        flag = f"--{name.replace('_', '-')}"
        add(
            flag,
            type=type(default),
            default=default,
            metavar="N",
            help=f"{what}, default {default:g}",
        )
    add(
        "--prefixes",
        type=int,
        default=4,
        metavar="N",
        help="conversations in the prefix cache, default 4",
    )
    add(
        "--max-cache-gigabytes",
        type=float,
        metavar="N",
        help="key/value cache of a rank, default half of the memory that is free",
    )
    add("--tp", type=int, default=1, help="tensor-parallel size, under torchrun")
    add("--pp", type=int, default=1, help="pipeline stages, under torchrun")
    add_integrity_flag(parser)
    add("--cuda-graphs", action="store_true", help="one launch per token instead of hundreds")
    return parser


if __name__ == "__main__":
    command.run("serve.py", main)
