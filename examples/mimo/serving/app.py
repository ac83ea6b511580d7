"""What the server counts, for Prometheus.

The HTTP side: checks what comes, hands it to the worker, and sends back what it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from examples.mimo.data.conversation import Sample
from examples.mimo.generation.api import Answerer
from examples.mimo.generation.sampling import numbered
from examples.mimo.generation.scheduler import Answer, Piece
from examples.mimo.serving.openai import Chat, Reply, parse
from examples.mimo.serving.worker import FullError, Worker

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mimo_requests", "Requests by their HTTP status.", ["status"], registry=self.registry
        )
        self.prompt_tokens = Counter(
            "mimo_prompt_tokens", "Tokens of prompts.", registry=self.registry
        )
        self.answer_tokens = Counter(
            "mimo_answer_tokens", "Tokens of answers.", registry=self.registry
        )
        self.left = Counter(
            "mimo_left", "Answers whose client left before their end.", registry=self.registry
        )
        self.first_token = Histogram(
            "mimo_first_token_seconds",
            "From a request to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "mimo_answer_seconds",
            "From a request to the end of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        running = Gauge("mimo_running", "Answers that are worked on.", registry=self.registry)
        running.set_function(lambda: worker.num_running)
        waiting = Gauge("mimo_waiting", "Answers that wait for a place.", registry=self.registry)
        waiting.set_function(lambda: worker.num_waiting)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


PAGE = Path(__file__).with_name("page.html")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; "
    "script-src 'unsafe-inline'; img-src data: blob:; media-src data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Limits:
    """`api_key` None lets everybody in; `hosts` are the names the server answers to."""

    body_bytes: int = 32 * 2**20
    api_key: str | None = None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")


class Server:
    """The routes of one model."""

    def __init__(self, answerer: Answerer, worker: Worker, limits: Limits) -> None:
        self.answerer, self.worker, self.limits = answerer, worker, limits
        self.metrics = Metrics(worker)
        # Media are decoded by so many threads; the processors are the worker's.
        self.reading = asyncio.Semaphore(2)

    def app(self) -> Starlette:
        """The application, for any ASGI server."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(self.limits.hosts))],
            exception_handlers={HTTPException: self._refused},
        )

    async def page(self, request: Request) -> Response:
        """A form to drop a picture and sound on."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=HEADERS)

    async def health(self, request: Request) -> Response:
        """200 while the model is there."""
        return JSONResponse({"status": "ok", "model": self.answerer.config.name})

    async def show_metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The one model."""
        self._let_in(request)
        model = {"id": self.answerer.config.name, "object": "model", "owned_by": "mimo"}
        return JSONResponse({"object": "list", "data": [{**model, "created": 0}]})

    async def chat(self, request: Request) -> Response:
        """A chat completion, whole or as server-sent events."""
        self._let_in(request)
        began = time.perf_counter()
        chat, sample = await self._read(request)
        hearing = ResponseStream(self, chat, sample, began)
        hearing.start()
        if chat.stream:
            self.metrics.requests.labels("200").inc()
            return StreamingResponse(hearing.events(), media_type="text/event-stream")
        try:
            answers = await hearing.answers(request)
        finally:
            hearing.cancel()
        self.metrics.requests.labels("200").inc()
        return JSONResponse(hearing.reply.whole(answers))

    async def _read(self, request: Request) -> tuple[Chat, Sample]:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "the body must be application/json")
        body = await self._body(request)
        try:
            chat = parse(json.loads(body), self.answerer.config)
            async with self.reading:
                sample = await run_in_threadpool(self._sample, chat)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise HTTPException(400, "the body is not JSON") from None
        except ValueError as error:
            raise HTTPException(400, " ".join(str(error).split())) from None
        return chat, sample

    def _sample(self, chat: Chat) -> Sample:
        sample = self.answerer.read(chat.request)
        longest = self.answerer.config.language.seq_length
        if len(sample.tokens.ids) >= longest:
            raise ValueError(f"the prompt fills all {longest} tokens; there is no room to answer")
        return sample

    async def _body(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise HTTPException(413, f"a body of {int(length):,} bytes, more than {most:,}")
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise HTTPException(413, f"a body of more than {most:,} bytes")
        except ClientDisconnect:
            raise HTTPException(400, "the body broke off") from None
        return bytes(body)

    def _let_in(self, request: Request) -> None:
        key = self.limits.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, "the API key is missing or wrong")

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self.metrics.requests.labels(str(error.status_code)).inc()
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        about = {"message": error.detail, "type": kind, "param": None, "code": None}
        return JSONResponse({"error": about}, error.status_code, headers=error.headers)


class ResponseStream:
    """The pieces of the answers to one request, from the worker's thread to the event loop."""

    def __init__(self, server: Server, chat: Chat, sample: Sample, began: float) -> None:
        self.server, self.chat, self.sample, self.began = server, chat, sample, began
        self.reply = Reply(chat, server.answerer.tokenizer, len(sample.tokens.ids))
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.numbers: list[int] = []
        self.found: dict[int, Answer] = {}
        self.heard = False

    def start(self) -> None:
        """Ask for every choice, or 503."""
        asked = self.chat.options
        try:
            for choice in range(self.chat.choices):
                options = replace(asked, sampling=numbered(asked.sampling, choice))
                self.numbers.append(self.server.worker.submit(self.sample, options, self._hear))
        except FullError:
            self.cancel()
            raise HTTPException(
                503, "too many requests are waiting; try again", headers={"Retry-After": "1"}
            ) from None
        self.server.metrics.prompt_tokens.inc(len(self.sample.tokens.ids))

    def cancel(self) -> None:
        """Free the places of answers that are not done."""
        for number in self.numbers:
            if self.server.worker.cancel(number):
                self.server.metrics.left.inc()

    def _hear(self, piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    async def _next(self) -> Piece:
        piece = await self.pieces.get()
        if not self.heard:
            self.heard = True
            self.server.metrics.first_token.observe(time.perf_counter() - self.began)
        if piece.answer is not None:
            self.found[self.numbers.index(piece.number)] = piece.answer
            self.server.metrics.answer_tokens.inc(len(piece.answer.tokens))
        return piece

    @property
    def done(self) -> list[Answer] | None:
        """All answers, when all are there."""
        if len(self.found) < len(self.numbers):
            return None
        return [self.found[choice] for choice in range(len(self.numbers))]

    async def answers(self, request: Request) -> list[Answer]:
        """All answers; a client that leaves ends the wait."""
        gone = asyncio.create_task(_gone(request))
        try:
            while self.done is None:
                piece = asyncio.create_task(self._next())
                await asyncio.wait({piece, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not piece.done():
                    piece.cancel()
                    raise HTTPException(499, "the client is gone")
                await piece
        finally:
            gone.cancel()
        self.server.metrics.whole.observe(time.perf_counter() - self.began)
        return self.done

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; a client that leaves closes the iterator."""
        try:
            while self.done is None:
                piece = await self._next()
                choice = self.numbers.index(piece.number)
                if piece.text:
                    yield _event(self.reply.piece(choice, piece.text))
                if piece.answer is not None:
                    yield _event(self.reply.piece(choice, "", piece.answer))
            if self.chat.include_usage:
                yield _event(self.reply.last(self.done))
            yield "data: [DONE]\n\n"
            self.server.metrics.whole.observe(time.perf_counter() - self.began)
        finally:
            self.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
