"""python -m benchmarks.floods --ckpt DIR: a server under floods, and under a long mixed load.

Beside each flood a client of good manners asks small questions, one after the other: how long its
answers take, and how much memory the server comes to. `--figures` keeps them; `--before` puts those
of an earlier version beside them.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "examples/mimo/serve.py"
PATH = "/v1/chat/completions"
# How long connections are held that say nothing; longer than the server's limits.
IDLE_SECONDS = 75.0
SOAK_CLIENTS = 8
PAGE = """# A server under floods

`python -m benchmarks.floods --ckpt DIR --output benchmarks/floods.md` wrote this on {processors}
processors, which the floods came from too, with a checkpoint of {megabytes} MB.
`memory` is what the server's process grew by at its highest; `client` is how long a small question
took that a client asked meanwhile, the median and the longest{before}.

{table}

- idle: 100 connections that send nothing, 100 with half a head, 50 with half a body; `open` are
  those that the server still holds after {idle:.0f} seconds.
- large: 32 bodies of 32 MB at once.
- pixels: 16 PNG files of 8,000 x 8,000 transparent pixels, {png} KB each, at once.
- many: 400 requests at once.
- readers: 5 clients with 3 streams of 16 answers and log-probabilities, none of which is read;
  `open` as above.
{soak}"""
SOAK = """
Ten minutes is `--soak-minutes 10`: {clients} clients, mixed requests (text, pictures, recordings,
streams, several choices, clients that leave, malformed bodies). {count:,} requests, {wrong} of them
with another answer or status than the first time. Memory in MB after each tenth:

{memory}
"""


@dataclass
class Figures:
    """What a flood did."""

    memory_mb: float
    median_s: float
    longest_s: float
    statuses: dict[str, int]
    seconds: float
    open: int | None = None


class Server:
    """A server process, and what it needs."""

    def __init__(self, script: Path, checkpoint: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        command = [sys.executable, str(script), "--ckpt", str(checkpoint), "--port", str(self.port)]
        self.process = subprocess.Popen(command)
        self.memory = psutil.Process(self.process.pid).memory_info
        while self.ask({})[0] != 400:
            time.sleep(0.1)

    def ask(self, body: Any, seconds: float = 300) -> tuple[int, Any]:
        """Status and reply of a chat completion; status 0 when the connection breaks."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("POST", PATH, data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def head(self, length: int) -> bytes:
        """The head of a request whose body has `length` bytes."""
        return (
            f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n\r\n"
        ).encode()

    def end(self) -> None:
        """Stop it."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=120)


def text(words: str, **more: Any) -> dict[str, Any]:
    """A question of text alone."""
    return {"messages": [{"role": "user", "content": words}], **more}


def with_file(kind: str, data: bytes, **more: Any) -> dict[str, Any]:
    """A question about a file."""
    url = {"url": f"data:;base64,{base64.b64encode(data).decode()}"}
    parts = [{"type": kind, kind: url}, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": parts}], **more}


def png(side: int) -> bytes:
    """A picture of one transparent colour, which is a small file."""
    file = io.BytesIO()
    Image.new("RGBA", (side, side), (9, 99, 199, 99)).save(file, "PNG")
    return file.getvalue()


def wav(seconds: float) -> bytes:
    """Noise."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, int(16_000 * seconds))
    soundfile.write(file, noise, 16_000, format="WAV")
    return file.getvalue()


@contextlib.contextmanager
def observed(server: Server, result: dict[str, Any]) -> Iterator[None]:
    """Watch the memory, and ask small questions, until the block ends."""
    ended = threading.Event()
    before = server.memory().rss
    most, latencies = [before], []
    questions = [text("hi", max_tokens=8), with_file("image_url", png(64), max_tokens=8)]

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], server.memory().rss)

    def ask() -> None:
        while not ended.is_set():
            started = time.perf_counter()
            status, _ = server.ask(questions[len(latencies) % 2])
            latencies.append((time.perf_counter() - started, status))
            ended.wait(0.05)

    threads = [threading.Thread(target=work) for work in (watch, ask)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    times = [seconds for seconds, _ in latencies]
    result["memory_mb"] = (most[0] - before) / 2**20
    result["median_s"], result["longest_s"] = statistics.median(times), max(times)
    result["seconds"] = time.perf_counter() - started
    refused = Counter(status for _, status in latencies if status != 200)
    result["client_refused"] = dict(refused)


def idle(server: Server) -> tuple[dict[str, int], int | None]:
    """Connections that say nothing, or half of it."""
    sent = [b""] * 100 + [server.head(9)[:60]] * 100 + [server.head(2**20) + b"x" * 10_000] * 50
    clients = []
    for data in sent:
        with contextlib.suppress(OSError):
            client = socket.create_connection(("127.0.0.1", server.port))
            client.sendall(data)
            clients.append(client)
    time.sleep(IDLE_SECONDS)
    still_open = 0
    for client in clients:
        client.setblocking(False)
        try:
            while client.recv(65_536):
                pass
        except BlockingIOError:
            still_open += 1
        except OSError:
            pass
        client.close()
    return {}, still_open


def at_once(server: Server, body: Any, count: int) -> dict[str, int]:
    """The statuses of so many requests at once."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with ThreadPoolExecutor(count) as clients:
        statuses = clients.map(lambda _: server.ask(data, 600)[0], range(count))
        return dict(Counter(str(status) for status in statuses))


def large(server: Server) -> tuple[dict[str, int], None]:
    """Bodies of 32 MB, which hold a file that is no picture."""
    size = 32 * 2**20 * 3 // 4 - 1000
    return at_once(server, with_file("image_url", b"x" * size), 32), None


def pixels(server: Server) -> tuple[dict[str, int], None]:
    """Small files of many pixels."""
    return at_once(server, with_file("image_url", png(8000), max_tokens=8), 16), None


def many(server: Server) -> tuple[dict[str, int], None]:
    """Small requests."""
    return at_once(server, text("hi", max_tokens=64, temperature=1.0), 400), None


def readers(server: Server) -> tuple[dict[str, int], int | None]:
    """Streams that nobody reads."""
    body = text("hi", temperature=5.0, max_tokens=120, logprobs=True, top_logprobs=20, stream=True)
    data = json.dumps(body | {"n": 16}).encode()
    clients = []
    for _ in range(5):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", server.port))
        # One after the other, as one alone may fit what the kernel keeps for the client.
        client.sendall(3 * (server.head(len(data)) + data))
        clients.append(client)
    time.sleep(IDLE_SECONDS)
    connections = psutil.Process(server.process.pid).net_connections("tcp")
    mine = [connection for connection in connections if connection.laddr.port == server.port]
    still_open = sum(connection.status == "ESTABLISHED" for connection in mine)
    for client in clients:
        client.close()
    return {}, still_open


FLOODS: dict[str, Callable[[Server], tuple[dict[str, int], int | None]]] = {
    "idle": idle,
    "large": large,
    "pixels": pixels,
    "many": many,
    "readers": readers,
}


def flood(server: Server, name: str) -> Figures:
    """Figures of one flood."""
    result: dict[str, Any] = {}
    with observed(server, result):
        statuses, still_open = FLOODS[name](server)
    statuses |= {f"client {status}": n for status, n in result.pop("client_refused").items()}
    figures = Figures(**result, statuses=statuses, open=still_open)
    print(name, asdict(figures), file=sys.stderr, flush=True)
    return figures


def soak(server: Server, minutes: float) -> dict[str, Any]:
    """Mixed requests of several clients, each of which has one right outcome."""
    bodies: list[Any] = [text("hi"), text("Which digit is this?", n=3, temperature=1.5, seed=4)]
    bodies += [with_file("image_url", png(side)) for side in (30, 500, 2000)]
    bodies += [with_file("audio_url", wav(seconds)) for seconds in (0.3, 2.0)]
    bodies += [text("hi", logprobs=True, top_logprobs=5, temperature=2.0, seed=1)]
    bodies += [{**body, "stream": True} for body in bodies[:5]]
    bodies += [b"{", text("word " * 5000), with_file("image_url", b"x"), text("hi", n=99)]

    def outcome(body: Any) -> tuple[int, str]:
        status, reply = server.ask(body)
        lines = [line for line in reply.decode().split("\n\n") if line and "[DONE]" not in line]
        replies = [json.loads(line.removeprefix("data: ")) for line in lines]
        choices: dict[int, str] = {}
        for choice in (c for reply in replies for c in reply.get("choices", ())):
            message = choice.get("message") or choice["delta"]
            said = choices.get(choice["index"], "")
            choices[choice["index"]] = said + (message.get("content") or "")
        return status, json.dumps(sorted(choices.items()))

    def leave() -> None:
        data = json.dumps(text("hi", temperature=3.0, max_tokens=100, stream=True)).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(server.head(len(data)) + data[: random.choice((40, len(data)))])
            time.sleep(random.random() / 10)

    expected = [outcome(body) for body in bodies]
    end = time.monotonic() + 60 * minutes
    counts, wrong = [0] * SOAK_CLIENTS, [0] * SOAK_CLIENTS

    def ask(client: int) -> None:
        chooser = random.Random(client)
        while time.monotonic() < end:
            number = chooser.randrange(len(bodies) + 1)
            if number == len(bodies):
                leave()
            else:
                wrong[client] += outcome(bodies[number]) != expected[number]
            counts[client] += 1

    memory = []
    with ThreadPoolExecutor(SOAK_CLIENTS) as clients:
        running = [clients.submit(ask, client) for client in range(SOAK_CLIENTS)]
        for _ in range(10):
            time.sleep(6 * minutes)
            memory.append(round(server.memory().rss / 2**20))
            print("memory", memory[-1], file=sys.stderr, flush=True)
        for future in running:
            future.result()
    return {"count": sum(counts), "wrong": sum(wrong), "memory": memory}


def table(figures: dict[str, Any], before: dict[str, Any]) -> str:
    """The floods as a table, each number after that of the earlier version where there is one."""

    def cell(name: str, field: str, digits: int) -> str:
        values = [source[name].get(field) for source in (before, figures) if name in source]
        if values[-1] is None:
            return ""
        return " -> ".join(f"{value:,.{digits}f}" for value in values if value is not None)

    lines = [
        "| flood | memory, MB | client, median s | longest s | seconds | open | statuses |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name in FLOODS:
        if name not in figures:
            continue
        cells = [
            cell(name, field, digits)
            for field, digits in (
                ("memory_mb", 0),
                ("median_s", 2),
                ("longest_s", 2),
                ("seconds", 0),
                ("open", 0),
            )
        ]
        statuses = " -> ".join(
            ", ".join(
                f"{count} x {status}" for status, count in sorted(row[name]["statuses"].items())
            )
            for row in (before, figures)
            if name in row
        )
        lines.append(f"| {name} | {' | '.join(cells)} | {statuses.strip(' ->')} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the page."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the page is about CPUs
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--script", type=Path, default=SCRIPT, help="serve.py of another version")
    parser.add_argument("--only", nargs="*", default=list(FLOODS), choices=list(FLOODS))
    parser.add_argument("--figures", type=Path, help="JSON: what is in it already is kept")
    parser.add_argument("--before", type=Path, help="figures of an earlier version")
    parser.add_argument("--soak-minutes", type=float, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    if args.figures and args.figures.exists():
        figures = json.loads(args.figures.read_text())
    for name in args.only:
        server = Server(args.script, args.ckpt)
        figures[name] = asdict(flood(server, name))
        server.end()
    if args.soak_minutes:
        server = Server(args.script, args.ckpt)
        figures["soak"] = soak(server, args.soak_minutes)
        server.end()
    if args.figures:
        args.figures.write_text(json.dumps(figures, indent=1))
    before = json.loads(args.before.read_text()) if args.before else {}
    weights = sum(file.stat().st_size for file in args.ckpt.rglob("*.distcp"))
    page = PAGE.format(
        processors=os.cpu_count(),
        megabytes=f"{weights / 1e6:.0f}",
        before="; before -> after the limits" if before else "",
        table=table(figures, before),
        idle=IDLE_SECONDS,
        png=len(png(8000)) // 1024,
        soak="",
    )
    if "soak" in figures:
        numbers = figures["soak"]
        page += SOAK.format(
            clients=SOAK_CLIENTS,
            count=numbers["count"],
            wrong=numbers["wrong"],
            memory=", ".join(f"{value:,}" for value in numbers["memory"]),
        )
    if args.output:
        args.output.write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
