"""HTTP routes: checks requests, passes them to the worker, and sends answers back."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from examples.mimo.data.conversation import Sample
from examples.mimo.generation.api import Mimo
from examples.mimo.generation.scheduler import NOT_FINITE_ERROR, Answer, KeptAnswers, Piece
from examples.mimo.serving.media import (
    Budget,
    BudgetSpentError,
    Decoders,
    SoundPiece,
    SpokenChoices,
    decoded_size,
    media_types,
    sound_output,
)
from examples.mimo.serving.openai import Chat, Reply, error_body, parse
from examples.mimo.serving.worker import (
    CacheTooSmallError,
    Metrics,
    QueueFullError,
    Worker,
    WorkerFailedError,
)

PAGE = Path(__file__).with_name("page.html")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; "
    "script-src 'unsafe-inline'; img-src data: blob:; media-src data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
FAILED = "the server failed at this request; its log says why"
log = logging.getLogger(__name__)
RETRY = {"Retry-After": "1"}
# How long a body waits until others are read, unless it is small; how fast it must come later.
SMALL_BODY, ROOM_SECONDS = 2**16, 5.0
GRACE_SECONDS, LEAST_BYTES_A_SECOND = 10.0, 2**14


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients may take.

    Without an `api_key` every request is accepted; `hosts` are the accepted Host headers.
    """

    body_bytes: int = 32 * 2**20
    # Over all clients: bodies that are being received or read, and pixels and samples of sound
    # that are being decoded.
    bodies_bytes: int = 128 * 2**20
    decoding: int = 80_000_000
    # Answers with sound that later requests may name.
    kept_bytes: int = 16 * 2**20
    kept_seconds: float = 3600.0
    connections: int = 512
    # For a head, for a body, and for a client that does not read.
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    write_seconds: float = 30.0
    api_key: str | None = None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")


class Server:
    """The HTTP application of one model."""

    def __init__(self, model: Mimo, worker: Worker, limits: Limits) -> None:
        self.model, self.worker, self.limits = model, worker, limits
        self.bodies, self.decoding = Budget(limits.bodies_bytes), Budget(limits.decoding)
        self.kept = KeptAnswers(limits.kept_bytes, limits.kept_seconds)
        self.metrics = Metrics(worker, self.bodies, self.decoding, self.kept)
        # Only so many requests are read at once, as the worker needs the processors.
        self.parsing, self.encoding = asyncio.Semaphore(1), asyncio.Semaphore(2)
        self.decoders = Decoders()

    def app(self) -> Starlette:
        """The application, for any ASGI server."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/modalities", self.modalities),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model_by_name),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(self.limits.hosts))],
            exception_handlers={HTTPException: self._http_error, Exception: self._internal_error},
        )

    async def page(self, request: Request) -> Response:
        """A web page to talk to the model."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=HEADERS)

    async def modalities(self, request: Request) -> Response:
        """What the model takes, with the files that belong to each, and what it puts out."""
        modalities = [
            {
                "name": name,
                "singular": modality.singular,
                "suffixes": list(modality.encoder.suffixes),
                "media_types": media_types(modality.encoder.suffixes),
            }
            for name, modality in self.model.config.inputs.items()
        ]
        config = self.model.config
        sound, _ = sound_output(config) or (None, None)
        # `asked_as` is its name among the `modalities` of a request; what has none is not sent.
        outputs = [
            {"name": n, "singular": o.singular, "asked_as": "audio" if n == sound else None}
            for n, o in config.outputs.items()
        ]
        fields = {"model": config.name, "prompt": config.prompt}
        return JSONResponse(fields | {"modalities": modalities, "outputs": outputs})

    async def health(self, request: Request) -> Response:
        """200 while the model answers; 503, with the reason, once it cannot any more."""
        fields = {"status": "ok", "model": self.model.config.name}
        if self.worker.failure is not None:
            fields |= {"status": "failed", "reason": self.worker.failure}
        return JSONResponse(fields, 200 if self.worker.failure is None else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        self._check_api_key(request)
        return JSONResponse({"object": "list", "data": [self._model_fields()]})

    async def model_by_name(self, request: Request) -> Response:
        """The same by its name; 404 for another."""
        self._check_api_key(request)
        name, served = request.path_params["name"], self.model.config.name
        if name != served:
            message = f"the model {name!r:.100} does not exist; this server has {served}"
            return self._error(404, message, code="model_not_found")
        return JSONResponse(self._model_fields())

    def _model_fields(self) -> dict[str, Any]:
        return {
            "id": self.model.config.name,
            "object": "model",
            "created": int(self.metrics.start_time),
            "owned_by": "mimo",
        }

    async def chat(self, request: Request) -> Response:
        """A chat completion, whole or as server-sent events."""
        self._check_api_key(request)
        start_time = time.perf_counter()
        chat, sample = await self._parse(request)
        response = ResponseStream(self, chat, sample, start_time)
        response.start()
        if chat.stream:
            self.metrics.requests.labels("200").inc()
            return StreamingResponse(response.events(), media_type="text/event-stream")
        try:
            answers = await response.wait_for_answers(request)
        finally:
            response.cancel()
        sounds = await response.sounds_of(answers)
        self.metrics.requests.labels("200").inc()
        reply = response.reply  # which sound makes large, and the event loop has other clients
        return await run_in_threadpool(lambda: JSONResponse(reply.completion(answers, sounds)))

    async def _parse(self, request: Request) -> tuple[Chat, Sample]:
        """The chat and its sample, or 400 with one sentence."""
        content_type = request.headers.get("content-type", "").partition(";")[0]
        if content_type.strip().lower() != "application/json":
            raise HTTPException(415, "the body must be application/json")
        length = self._body_length(request)
        try:
            # Small bodies are always read: those of connections that are allowed fit.
            async with self.bodies.share(length if length > SMALL_BODY else 0, ROOM_SECONDS):
                return await self._encoded(await self._body(request))
        except BudgetSpentError:
            message = (
                f"{self.limits.bodies_bytes:,} bytes of other bodies are being read; try again"
            )
            raise HTTPException(503, message, headers=RETRY) from None

    async def _encoded(self, body: bytearray) -> tuple[Chat, Sample]:
        """The chat in a body, and its sample; the body is emptied."""

        def read() -> Chat:
            fields = json.loads(body)
            body.clear()
            return parse(fields, self.model.config, self.kept)

        try:
            async with self.parsing:
                chat = await run_in_threadpool(read)
            size = await run_in_threadpool(decoded_size, chat.record)
            async with self.decoding.share(size), self.encoding:
                sample = await run_in_threadpool(self._encode, chat)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise HTTPException(400, "the body is not JSON") from None
        except ValueError as error:
            raise HTTPException(400, " ".join(str(error).split())) from None
        # What was in the files is in the sample.
        return replace(chat, record={}), sample

    def _encode(self, chat: Chat) -> Sample:
        sample = self.model.encode(chat.record)
        seq_length = self.model.config.language.seq_length
        if len(sample.tokens.ids) >= seq_length:
            raise ValueError(
                f"the prompt fills all {seq_length} tokens; there is no room to answer"
            )
        return sample

    def _body_length(self, request: Request) -> int:
        """The length of a body as its head states it, or else the largest; 413 for a larger."""
        limit = self.limits.body_bytes
        length = request.headers.get("content-length", str(limit))
        if length.isdigit() and int(length) > limit:
            raise HTTPException(413, f"a body of {int(length):,} bytes, more than {limit:,}")
        return int(length)

    async def _body(self, request: Request) -> bytearray:
        """The body; 408 when it takes too long, or so long that it would."""
        limit, body = self.limits.body_bytes, bytearray()
        started = asyncio.get_running_loop().time()
        seconds = min(GRACE_SECONDS, self.limits.body_seconds)
        try:
            async with asyncio.timeout_at(started + seconds) as deadline:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise HTTPException(413, f"a body of more than {limit:,} bytes")
                    allowed = GRACE_SECONDS + len(body) / LEAST_BYTES_A_SECOND
                    seconds = min(allowed, self.limits.body_seconds)
                    deadline.reschedule(started + seconds)
        except TimeoutError:
            self.metrics.timeouts.labels("body").inc()
            raise HTTPException(
                408, f"{len(body):,} bytes of the body in {seconds:.0f} s"
            ) from None
        except ClientDisconnect:
            raise HTTPException(400, "the connection ended before the body did") from None
        return body

    def _check_api_key(self, request: Request) -> None:
        key = self.limits.api_key
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(sent.encode(), key.encode()):
            raise HTTPException(401, "the API key is missing or wrong")

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return self._error(404, f"no path {request.url.path!r:.100}; a base URL ends in /v1")
        code = "invalid_api_key" if error.status_code == 401 else None
        return self._error(error.status_code, error.detail, error.headers, code)

    async def _internal_error(self, request: Request, error: Exception) -> Response:
        log.error("%s failed", request.url.path, exc_info=error)
        return self._error(500, FAILED)

    def _error(
        self,
        status: int,
        message: str,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
    ) -> Response:
        self.metrics.requests.labels(str(status)).inc()
        return JSONResponse(error_body(status, message, code), status, headers=headers)


class ResponseStream:
    """The pieces of the answers to one request, from the worker's thread to the event loop."""

    def __init__(self, server: Server, chat: Chat, sample: Sample, start_time: float) -> None:
        self.server, self.chat, self.sample = server, chat, sample
        self.start_time = start_time
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[Piece | SoundPiece] = asyncio.Queue()
        # The worker's number of each choice.
        self.numbers: list[int] = []
        self.answers: dict[int, Answer] = {}
        self.has_first_token = self.has_first_sound = False
        # Answers in a stream whose sound is still decoded.
        self.unheard: dict[int, Answer] = {}
        self.spoken: SpokenChoices | None = None
        if chat.sound:
            config, decoders = server.model.config, server.decoders
            emit = self._receive if chat.stream else None
            self.spoken = SpokenChoices(chat.sound, config, chat.choices, decoders, emit)
        tokenizer, prompt_tokens = server.model.tokenizer, len(sample.tokens.ids)
        self.reply = Reply(chat, tokenizer, prompt_tokens, self.spoken)

    def start(self) -> None:
        """Submit every choice to the worker, or raise 503."""
        try:
            for choice in range(self.chat.choices):
                options = self.chat.options.with_seed_offset(choice)
                self.numbers.append(self.server.worker.submit(self.sample, options, self._receive))
        except QueueFullError:
            self.cancel()
            message = "too many requests are waiting; try again"
            raise HTTPException(503, message, headers=RETRY) from None
        except CacheTooSmallError as error:
            self.cancel()
            raise HTTPException(400, str(error)) from None
        except WorkerFailedError:
            self.cancel()
            raise HTTPException(503, "the model cannot answer any more; /health says why") from None
        self.server.metrics.prompt_tokens.inc(len(self.sample.tokens.ids))

    def cancel(self) -> None:
        """Stop answers that are not finished."""
        if self.spoken:
            self.spoken.cancel()
        for number in self.numbers:
            if self.server.worker.cancel(number):
                self.server.metrics.cancelled.inc()

    def _receive(self, piece: Piece | SoundPiece) -> None:
        """Called in the worker's thread, and in those that decode."""
        with contextlib.suppress(RuntimeError):  # the loop is closed when the server stops
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    async def _next_chunks(self) -> list[dict[str, Any]]:
        """Wait for a piece of an answer; the chunks that it makes, or 500 for one that failed."""
        piece = await self.pieces.get()
        if isinstance(piece, SoundPiece):
            return self._sound_chunks(piece)
        if piece.error is not None:
            self.server.metrics.failed.inc()
            if piece.error != NOT_FINITE_ERROR:  # which the worker has put into the log
                raise HTTPException(500, FAILED)
            log.error(piece.error)
            raise HTTPException(500, piece.error)
        if not self.has_first_token:
            self.has_first_token = True
            self.server.metrics.first_token.observe(time.perf_counter() - self.start_time)
        choice = self.numbers.index(piece.number)
        if piece.answer is not None:
            is_heard = self.chat.sound and self.chat.stream
            (self.unheard if is_heard else self.answers)[choice] = piece.answer
            self.server.metrics.answer_tokens.inc(len(piece.answer.tokens))
        return self.reply.add(choice, piece)

    def _sound_chunks(self, piece: SoundPiece) -> list[dict[str, Any]]:
        """The chunks of new sound; behind the last the choice ends."""
        if piece.error:
            raise HTTPException(500, FAILED)
        chunks = []
        if piece.data:
            self._observe_sound()
            chunks.append(self.reply.add_sound(piece.choice, piece.data))
        if piece.is_last:
            answer = self.answers[piece.choice] = self.unheard.pop(piece.choice)
            chunks += self.reply.finish(piece.choice, answer, self._keep(piece.choice))
        return chunks

    def _observe_sound(self) -> None:
        if not self.has_first_sound:
            self.has_first_sound = True
            self.server.metrics.first_sound.observe(time.perf_counter() - self.start_time)

    def _keep(self, choice: int) -> int:
        """Let later requests name an answer; returns until when."""
        assert self.spoken is not None
        return self.server.kept.add(self.spoken.ids[choice], self.spoken.parts[choice].parts)

    async def sounds_of(self, answers: Sequence[Answer]) -> dict[int, tuple[bytes, int]]:
        """Choice -> its sound as a file, and when its id expires, of those that have any."""
        files = await self.spoken.encode(answers) if self.spoken else {}
        if files:
            self._observe_sound()
        return {choice: (data, self._keep(choice)) for choice, data in files.items()}

    @property
    def _all_answers(self) -> list[Answer] | None:
        """All answers by choice, once all are there."""
        if len(self.answers) < len(self.numbers):
            return None
        return [self.answers[choice] for choice in range(len(self.numbers))]

    async def wait_for_answers(self, request: Request) -> list[Answer]:
        """All answers; 499 when the client disconnects before."""
        disconnected = asyncio.create_task(_wait_for_disconnect(request))
        try:
            while self._all_answers is None:
                chunks = asyncio.create_task(self._next_chunks())
                await asyncio.wait({chunks, disconnected}, return_when=asyncio.FIRST_COMPLETED)
                if not chunks.done():
                    chunks.cancel()
                    raise HTTPException(499, "the client disconnected")
                await chunks
        finally:
            disconnected.cancel()
        self.server.metrics.whole_answer.observe(time.perf_counter() - self.start_time)
        return self._all_answers

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; starlette closes the iterator when the client disconnects."""
        try:
            while self._all_answers is None:
                for chunk in await self._next_chunks():
                    yield _event(chunk)
            if self.chat.include_usage:
                yield _event(self.reply.usage_chunk(self._all_answers))
            yield "data: [DONE]\n\n"
            self.server.metrics.whole_answer.observe(time.perf_counter() - self.start_time)
        except HTTPException as error:
            # The status is sent already; OpenAI's clients raise an error for such an event.
            yield _event(error_body(error.status_code, error.detail))
        except Exception as error:
            log.error("a stream failed", exc_info=error)
            yield _event(error_body(500, FAILED))
        finally:
            self.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, allow_nan=False)}\n\n"
