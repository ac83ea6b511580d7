"""Media over HTTP: files that requests bring, and sound that answers are heard as.

Sound is what a codec makes that is a `SoundCodec`. It is asked for and sent as OpenAI does: of
`modalities` "text" and "audio", in a format that `audio` names. In a stream that is pcm16, the only
one without a header: 16 bits, little-endian, mono, 24,000 samples a second.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
import logging
import mimetypes
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import soundfile
import torch
from PIL import Image
from starlette.concurrency import run_in_threadpool

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.generation.scheduler import Answer, AnswerParts, KeptAnswers, OutputPiece, Piece
from examples.mimo.modalities.files import FORMATS, Blob
from examples.mimo.modalities.hf_codec import resampling
from examples.mimo.modalities.speech import SoundCodec

# No more of a recording is decoded; a small file of another kind holds little.
LONG_SECONDS, ANYTHING, SMALL_FILE = 600, 2**62, 2**12
URL_SAFE = str.maketrans("-_", "+/")
# OpenAI's names of formats; libsndfile writes no AAC.
PCM, SOUND_FORMATS = "pcm16", ("wav", "mp3", "flac", "opus", "pcm16")
PCM_HZ = 24_000
MAX_VOICE = 100
# Threads that wait for codes or decode them, and how many decode at once beside the model.
MAX_DECODERS, MAX_DECODING = 64, 2
log = logging.getLogger(__name__)

# Files in requests.


def file_part(
    part: Mapping[str, Any], at: str, config: MimoConfig, allowed: bool
) -> tuple[str, bytes]:
    """The modality and the bytes of a content part; nothing is fetched from anywhere."""
    url_types = {f"{m.singular}_url": name for name, m in config.inputs.items()}
    data_types = {f"input_{m.singular}": name for name, m in config.inputs.items()}
    kind = part.get("type")
    if allowed and isinstance(kind, str) and kind in url_types:
        value = part.get(kind)
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str) or not _is_data_url(url):
            raise ValueError(f"{at}: {kind} must be a data: URL with base64; nothing is fetched")
        return url_types[kind], _decode(url, at)
    if allowed and isinstance(kind, str) and kind in data_types:
        value = part.get(kind)
        data = value.get("data") if isinstance(value, Mapping) else None
        if not isinstance(data, str):
            raise ValueError(f"{at}: {kind}.data must be base64")
        return data_types[kind], _decode(data, at)
    if allowed and kind == "input_file":
        name, data = part.get("modality"), part.get("data")
        if not isinstance(name, str) or name not in config.inputs:
            raise ValueError(f"{at}.modality must be one of {', '.join(config.inputs)}")
        if not isinstance(data, str):
            raise ValueError(f"{at}.data must be base64 or a data: URL")
        return name, _decode(data, at)
    if not allowed:
        raise ValueError(f"{at}: its type must be text; files go into messages of the user")
    types = ["text", *url_types, *data_types, "input_file"]
    raise ValueError(f"{at}: its type must be one of {', '.join(types)}")


def kept_parts(
    audio: object, said: Sequence[Mapping[str, Any]], where: str, kept: KeptAnswers
) -> list[dict[str, Any]]:
    """The text and codes of an earlier answer; content beside its id must be that text."""
    name = audio.get("id") if isinstance(audio, Mapping) else None
    if not isinstance(name, str):
        raise ValueError(f"{where}.id must be the id of an answer with sound")
    parts = kept.get(name)
    if parts is None:
        raise ValueError(
            f"{where}.id {name!r:.60}: this server keeps no such answer (any more); send what it "
            "said as content instead"
        )
    content, text = ("".join(part.get("text", "") for part in of).strip() for of in (said, parts))
    if content not in ("", text):
        raise ValueError(f"{where} names an answer of other words than content has; leave out one")
    return parts


def _is_data_url(text: str) -> bool:
    return text.lstrip()[:5].lower() == "data:"


def _decode(data: str, at: str) -> bytes:
    """The bytes of base64, or of a data: URL with base64.

    As encoders write it: in lines, with either alphabet of RFC 4648, with or without padding.
    """
    if _is_data_url(data):
        head, comma, data = data.partition(",")
        if not comma or head.rpartition(";")[2].strip().lower() != "base64":
            raise ValueError(f"{at}: the data: URL must be ;base64")
        data = unquote(data)
    data = "".join(data.split()).translate(URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{at}: damaged base64") from None


def decoded_size(record: Mapping[str, Any]) -> int:
    """The most pixels of a picture, or samples of a recording, in a record, as headers say.

    Files are decoded one after the other. One that may hold anything, such as a video, counts as
    more than there is room for; one that is refused at once as nothing.
    """
    files = (file for files in record.values() for file in files if isinstance(file, Blob))
    return max((_decoded_size(file.data) for file in files), default=0)


def _decoded_size(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.width * picture.height
    except Image.DecompressionBombError:
        return 0
    except (OSError, ValueError, SyntaxError):
        pass
    try:
        header = soundfile.info(io.BytesIO(data))
    except soundfile.SoundFileError:
        return ANYTHING if len(data) > SMALL_FILE else 0
    return min(header.frames, LONG_SECONDS * header.samplerate)


def media_types(suffixes: Sequence[str]) -> list[str]:
    """MIME types of files with these suffixes, for browsers, which may know no suffix."""
    types = (mimetypes.guess_type(f"file{suffix}")[0] for suffix in suffixes)
    return sorted({kind for kind in types if kind})


class BudgetSpentError(Exception):
    """No room came in time."""


class Budget:
    """Units that requests share, in one event loop; who needs more than are free waits."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self.waiters: list[asyncio.Future[None]] = []

    @contextlib.asynccontextmanager
    async def share(self, units: int, seconds: float | None = None) -> AsyncIterator[None]:
        """Hold so many units, at most all; BudgetSpentError when they are not free in time."""
        units = min(units, self.size)
        try:
            async with asyncio.timeout(seconds):
                while self.used + units > self.size:
                    waiter = asyncio.get_running_loop().create_future()
                    self.waiters.append(waiter)
                    try:
                        await waiter
                    finally:
                        self.waiters.remove(waiter)
        except TimeoutError:
            raise BudgetSpentError from None
        self.used += units
        try:
            yield
        finally:
            self.used -= units
            for waiter in self.waiters:
                if not waiter.done():
                    waiter.set_result(None)


# Sound in answers.


@dataclass(frozen=True)
class Sound:
    """The output that an answer is heard as, and the format that it is sent in."""

    modality: str
    codec: SoundCodec
    format: str

    def encode(self, outputs: Sequence[Sequence[int]]) -> bytes:
        """A file of all outputs of an answer, one after the other."""
        samples = np.concatenate([self.codec.decode(codes) for codes in outputs])
        if self.format != PCM:
            return self.codec.encode_bytes(samples, self.format)
        return PcmStream(self.codec.sample_rate_hz)(samples, is_last=True)


def sound_output(config: MimoConfig) -> tuple[str, SoundCodec] | None:
    """The first output of a model that is sound, or None."""
    for name, output in config.outputs.items():
        if isinstance(output.codec, SoundCodec):
            return name, output.codec
    return None


def parse_sound(body: Mapping[str, Any], config: MimoConfig, stream: bool) -> Sound | None:
    """The sound that a body asks for; None for text alone, ValueError for what cannot be."""
    modalities, audio = body.get("modalities", ["text"]), body.get("audio")
    names = ("text", "audio")
    if (
        not isinstance(modalities, list)
        or not modalities
        or any(m not in names for m in modalities)
    ):
        raise ValueError('modalities must be ["text"], or ["text", "audio"] for answers with sound')
    if "audio" not in modalities:
        if audio is not None:
            raise ValueError('audio is for answers with sound; add "audio" to modalities too')
        return None
    output = sound_output(config)
    if output is None:
        known = ", ".join(["text", *config.outputs])
        raise ValueError(
            f'modalities: {config.name} answers with {known} and no sound; leave "audio" out'
        )
    if not isinstance(audio, Mapping):
        raise ValueError('audio must be an object, such as {"voice": "alloy", "format": "wav"}')
    voice = audio.get("voice")
    voice = voice.get("id") if isinstance(voice, Mapping) else voice
    if not isinstance(voice, str) or not 0 < len(voice) <= MAX_VOICE:
        raise ValueError('audio.voice must be a name such as "alloy"; any means the model\'s own')
    kind = audio.get("format")
    if not isinstance(kind, str) or kind not in SOUND_FORMATS:
        known = ", ".join(SOUND_FORMATS)
        raise ValueError(f"audio.format {kind!r:.30} is not written; choose one of {known}")
    if stream and kind != PCM:
        raise ValueError(
            f"audio.format {kind} cannot be streamed; ask for {PCM}, or leave stream out"
        )
    if kind != PCM:
        # What libsndfile cannot write at this rate is refused before anything is generated.
        try:
            output[1].encode_bytes(np.zeros(output[1].sample_rate_hz // 10, np.float32), kind)
        except ValueError as error:
            raise ValueError(f"audio.format: {error}") from None
    return Sound(*output, kind)


class PcmStream:
    """Samples at a codec's rate become pcm16, piece by piece."""

    def __init__(self, rate_hz: int) -> None:
        self.resample = None if rate_hz == PCM_HZ else resampling(rate_hz, PCM_HZ)
        self.rest = b""

    def __call__(self, samples: np.ndarray, is_last: bool = False) -> bytes:
        """The bytes that are certain now; a multiple of three before the last ones.

        So base64 of all pieces, joined, is base64 of all bytes.
        """
        if self.resample is not None:
            tensor = torch.from_numpy(np.asarray(samples, np.float32))[None, None]
            samples = self.resample(tensor, is_last)[0, 0].numpy()
        data = self.rest + np.rint(np.clip(samples, -1, 1) * 32_767).astype("<i2").tobytes()
        end = len(data) if is_last else len(data) // 6 * 6
        self.rest = data[end:]
        return data[:end]


class SoundPiece(NamedTuple):
    """New pcm16 of a choice, which may be empty where it is the last; or why it failed."""

    choice: int
    data: bytes
    is_last: bool = False
    error: bool = False


class End(Enum):
    """What follows the last code of an output, that of an answer, and that of one to give up."""

    OUTPUT, ANSWER, CANCELLED = range(3)


class CancelledError(Exception):
    """Nobody listens any more."""


class Decoders:
    """Threads that decode sound while codes come in, beside the model's thread."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.num_threads = 0
        self.computing = threading.Semaphore(MAX_DECODING)
        # Of whole answers, in threads of the event loop.
        self.encoding = asyncio.Semaphore(MAX_DECODING)

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job in a thread, after others where there are many; called in the event loop."""
        self.jobs.put(job)
        if self.num_threads < MAX_DECODERS:
            self.num_threads += 1
            # A daemon, as one that waits for codes must not keep the process from ending.
            threading.Thread(target=self._run, name="sound", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.jobs.get()()


class SoundStream:
    """The sound of one choice: codes go in, and `emit` gets pcm16 in another thread.

    Outputs of one answer follow one another.
    """

    def __init__(
        self, sound: Sound, decoders: Decoders, index: int, emit: Callable[[SoundPiece], None]
    ) -> None:
        self.codec, self.decoders, self.index, self.emit = sound.codec, decoders, index, emit
        self.codes: queue.SimpleQueue[int | End] = queue.SimpleQueue()
        self.has_begun = self.is_cancelled = False

    def add(self, piece: OutputPiece) -> None:
        """Take codes of an output; the first begin the decoding."""
        for code in piece.codes:
            self.codes.put(code)
        if piece.is_last:
            self.codes.put(End.OUTPUT)
        if not self.has_begun:
            self.has_begun = True
            self.decoders.submit(self._decode)

    def finish(self) -> None:
        """Take no more codes; a piece that is the last follows."""
        if self.has_begun:
            self.codes.put(End.ANSWER)
        else:
            self.emit(SoundPiece(self.index, b"", is_last=True))

    def cancel(self) -> None:
        """Stop decoding; nothing more is emitted."""
        self.is_cancelled = True
        self.codes.put(End.CANCELLED)

    def _decode(self) -> None:
        pcm, empty = PcmStream(self.codec.sample_rate_hz), np.zeros(0, np.float32)
        with self.decoders.computing:
            try:
                while (first := self._next()) is not End.ANSWER:
                    for samples in self.codec.decode_pieces(self._output(first)):
                        if data := pcm(samples):
                            self.emit(SoundPiece(self.index, data))
                self.emit(SoundPiece(self.index, pcm(empty, is_last=True), is_last=True))
            except CancelledError:
                pass
            except Exception:
                log.exception("sound could not be decoded")
                self.emit(SoundPiece(self.index, b"", error=True))

    def _output(self, code: int | End) -> Iterator[int]:
        """The codes of an output as they come, from its first on."""
        while isinstance(code, int):
            yield code
            code = self._next()

    def _next(self) -> int | End:
        """What comes next; while there is nothing, another thread may decode."""
        if self.is_cancelled:
            raise CancelledError
        try:
            code = self.codes.get_nowait()
        except queue.Empty:
            self.decoders.computing.release()
            code = self.codes.get()
            self.decoders.computing.acquire()
        if code is End.CANCELLED:
            raise CancelledError
        return code


class SpokenChoices:
    """The choices of one reply with sound, whose text and codes are kept as `parts`.

    Where it is streamed, `emit` gets their sound as it is decoded.
    """

    def __init__(
        self,
        sound: Sound,
        config: MimoConfig,
        count: int,
        decoders: Decoders,
        emit: Callable[[SoundPiece], None] | None,
    ) -> None:
        self.sound, self.decoders = sound, decoders
        # Nobody can guess the ids of others' answers.
        self.ids = [f"audio_{uuid.uuid4().hex}" for _ in range(count)]
        self.parts = [AnswerParts(config) for _ in range(count)]
        self.streams: list[SoundStream] = []
        if emit is not None:
            self.streams = [SoundStream(sound, decoders, n, emit) for n in range(count)]

    def add(self, index: int, piece: Piece) -> None:
        """Take a piece of choice `index`."""
        self.parts[index].add(piece)
        if not self.streams:
            return
        if piece.codes is not None:
            self.streams[index].add(piece.codes)
        if piece.answer is not None:
            self.streams[index].finish()

    async def encode(self, answers: Sequence[Answer]) -> dict[int, bytes]:
        """Choice -> its sound as a file, of the answers that have any."""
        files = {}
        for index, answer in enumerate(answers):
            if outputs := answer.outputs.get(self.sound.modality):
                async with self.decoders.encoding:
                    files[index] = await run_in_threadpool(self.sound.encode, outputs)
        return files

    def cancel(self) -> None:
        """Stop decoding."""
        for stream in self.streams:
            stream.cancel()
