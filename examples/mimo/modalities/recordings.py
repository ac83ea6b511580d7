"""Where the recordings in a file of sound begin and end, and how long they are; for `read_audio`.

Headers are often wrong: a program that writes to a pipe cannot know a length, and joined files have
one header for each of them. `sections` puts such headers right for libsndfile, which `file_blocks`
reads with, and `container_sounds` reads with PyAV what browsers and phones record.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import soundfile

from examples.mimo.modalities.files import BLOCK_SAMPLES, Sound, Source, check_rates

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame

# Containers of pictures and sound; a playlist would name other files and addresses.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
OPTIONS = {"format_whitelist": f"{FORMATS},avi", "protocol_whitelist": ""}
SOUND_OPTIONS = {**OPTIONS, "format_whitelist": f"{FORMATS},aac"}
# How far from its beginning a file's sound may start; how much behind it may be no sound; how many
# chunks or pages are looked at; how many samples fill an MP3 up.
MAX_HEAD_BYTES, MAX_JUNK_BYTES, MAX_CHUNKS, MP3_PADDING = 2**20, 4096, 2**17, 4096
MP3_FRAMES = b"\x7f\xff\xff\xff"


def open_pyav(source: Source, what_needs: str) -> Any:
    """The package PyAV; ValueError, which says what needs it, without it."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{source}: {what_needs} PyAV: pip install -e '.[data]'") from None
    return av


@dataclass
class Section(io.RawIOBase):
    """A part of a file: `head`, a header put right, then the bytes from `start` to `stop`.

    `stated`, `padding` and `lost_bytes` are as of `Sound`.
    """

    stream: BinaryIO
    start: int
    stop: int
    head: bytes = b""
    stated: int = 0
    padding: int = 0
    lost_bytes: int = 0
    position: int = 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = 0) -> int:
        size = len(self.head) + self.stop - self.start
        self.position = max(0, offset + (0, self.position, size)[whence])
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = self.head[self.position : self.position + len(buffer)]
        if not data:
            begin = self.start + self.position - len(self.head)
            data = _bytes_at(self.stream, begin, max(0, min(len(buffer), self.stop - begin)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def sections(stream: BinaryIO) -> Iterator[Section]:
    """The recordings in a file, each with a header that counts at least what is there."""
    size = stream.seek(0, 2)
    start = _behind_id3(stream, 0)
    magic = _bytes_at(stream, start, 4)
    if magic in CHUNKS:
        yield from _chunked(stream, start, size)
    elif magic in (b".snd", b"dns."):  # AU: length unknown
        head = _bytes_at(stream, start, 8) + b"\xff\xff\xff\xff"
        yield Section(stream, start + len(head), size, head)
    elif magic == b"fLaC":  # the number of samples is the last 36 of these bits; 0 is unknown
        head = _bytes_at(stream, start, 26).ljust(26, b"\0")
        stated = int.from_bytes(head[18:]) & 2**36 - 1
        head = head[:21] + bytes([head[21] & 0xF0, 0, 0, 0, 0])
        yield Section(stream, start + 26, size, head, stated)
    elif magic == b"OggS":
        yield from _ogg(stream, start, size)
    else:
        yield from _mp3(stream, start, size)


def _bytes_at(stream: BinaryIO, position: int, count: int) -> bytes:
    stream.seek(min(position, stream.seek(0, 2)))  # a header may lead further than seek can go
    return stream.read(count)


def _behind_id3(stream: BinaryIO, position: int) -> int:
    """Where the sound begins behind tags at `position`."""
    while (tag := _bytes_at(stream, position, 10))[:3] == b"ID3" and len(tag) == 10:
        # Seven bits a byte; a footer may follow.
        size = sum(
            (byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True)
        )
        position += 10 + size + (10 if tag[5] & 16 else 0)
    return position


class _Layout(NamedTuple):
    header: struct.Struct  # of a chunk: its name and its length
    first: int
    align: int
    sound: bytes  # the name of the chunk that holds it


CHUNKS = {
    **dict.fromkeys([b"RIFF", b"RF64", b"BW64"], _Layout(struct.Struct("<4sI"), 12, 2, b"data")),
    b"RIFX": _Layout(struct.Struct(">4sI"), 12, 2, b"data"),
    b"FORM": _Layout(struct.Struct(">4sI"), 12, 2, b"SSND"),
    b"caff": _Layout(struct.Struct(">4sq"), 8, 1, b"data"),
}


def _chunked(stream: BinaryIO, start: int, size: int) -> Iterator[Section]:
    """WAV, AIFF and CAF, several of which may follow one another."""
    while (magic := _bytes_at(stream, start, 4)) in CHUNKS:
        layout = CHUNKS[magic]
        if (found := _find_sound(stream, start, layout)) is None:
            yield Section(stream, start, size)
            return
        body, length = found
        end = _end_of_chunks(stream, body, length, size, layout)
        if end is None:
            length, end = size - body, size
        head = bytearray(_bytes_at(stream, start, body - start))
        # The 64-bit length of a large WAV is in a chunk that libsndfile skips in a RIFF.
        head[:4] = b"RIFF" if magic in (b"RF64", b"BW64") else magic
        head[-layout.header.size :] = layout.header.pack(layout.sound, min(length, 2**32 - 2))
        yield Section(stream, body, end, bytes(head))
        start = end


def _find_sound(stream: BinaryIO, start: int, layout: _Layout) -> tuple[int, int] | None:
    """Where the sound begins, and its length by the header; None where it is not found."""
    large = 0
    for name, body, length in _chunks(stream, start + layout.first, layout):
        if body - start > MAX_HEAD_BYTES:
            return None
        if name == b"ds64":
            large = int.from_bytes(_bytes_at(stream, body + 8, 8), "little")
        if name == layout.sound:
            return body, large if large and length == 2**32 - 1 else length
    return None


def _end_of_chunks(
    stream: BinaryIO, body: int, length: int, size: int, layout: _Layout
) -> int | None:
    """Where the file ends by its chunks, or another begins; None where `length` is wrong."""
    if not 0 <= length <= size - body:
        return None
    end = body + length + -length % layout.align
    for name, inner, chunk in _chunks(stream, end, layout):
        if name in CHUNKS:
            return inner - layout.header.size
        if not 0 <= chunk <= size - inner or not all(32 <= byte < 127 for byte in name):
            return size if length and size - end <= MAX_JUNK_BYTES else None
    return size


def _chunks(stream: BinaryIO, position: int, layout: _Layout) -> Iterator[tuple[bytes, int, int]]:
    """Name, begin and length of each chunk from `position` on."""
    for _ in range(MAX_CHUNKS):
        header = _bytes_at(stream, position, layout.header.size)
        if len(header) < layout.header.size:
            return
        name, length = layout.header.unpack(header)
        position += len(header)
        yield name, position, length
        position += max(0, length) + -length % layout.align


def _ogg(stream: BinaryIO, start: int, size: int) -> Iterator[Section]:
    """Each of the streams of a chained Ogg file."""
    position, in_headers = start, True
    for _ in range(MAX_CHUNKS):
        page = _bytes_at(stream, position, 27 + 255)
        if len(page) < 27 or page[:4] != b"OggS":
            break
        is_first = bool(page[5] & 2)
        if is_first and not in_headers:
            yield Section(stream, start, position)
            start = position
        in_headers = is_first
        position += 27 + page[26] + sum(page[27 : 27 + page[26]])
    yield Section(stream, start, size)


def _mp3(stream: BinaryIO, start: int, size: int) -> Iterator[Section]:
    """MP3, split where another follows; the whole of what is no MP3."""
    section = _mp3_section(stream, start, size)
    if section is None:
        yield Section(stream, 0, size)
        return
    while section.lost_bytes < 0:
        end = size + section.lost_bytes
        another = _mp3_section(stream, _behind_id3(stream, end), size)
        if another is None or not another.padding:
            break
        section.stop = end
        yield section
        section = another
    yield section


def _mp3_section(stream: BinaryIO, start: int, size: int) -> Section | None:
    """From the first frame of an MP3 on; None where there is none.

    The number of frames is in the first one, the Info frame. Here it counts more than there can be.
    One is put in front where there is none: mpg123 would guess the length from a frame's size.
    """
    frame = _bytes_at(stream, start, 200)
    if len(frame) < 4 or int.from_bytes(frame[:2]) & 0xFFE6 != 0xFFE2:  # sync, layer III
        return None
    version, rate_code = frame[1] >> 3 & 3, frame[2] >> 2 & 3
    if version == 1 or rate_code == 3 or frame[2] >> 4 in (0, 15):
        return None
    is_mpeg1, is_mono = version == 3, frame[3] >> 6 == 3
    tag = 4 + ((17 if is_mono else 32) if is_mpeg1 else (9 if is_mono else 17))
    # The fields there are: frames, bytes, a table of 100, quality.
    has_fields = frame[tag : tag + 4] in (b"Xing", b"Info") and len(frame) == 200
    flags = frame[tag + 7] if has_fields else 0
    if not flags & 1:
        rate = (44_100, 48_000, 32_000)[rate_code] >> {3: 0, 2: 1, 0: 2}[version]
        bitrate_code, length = (9, 144 * 128_000) if is_mpeg1 else (8, 72 * 64_000)
        head = bytes([0xFF, frame[1] | 1, bitrate_code << 4 | rate_code << 2, frame[3]])
        head = head.ljust(tag, b"\0") + b"Info\0\0\0\x01" + MP3_FRAMES
        return Section(stream, start, size, head.ljust(length // rate, b"\0"))
    frames, counted = (int.from_bytes(frame[tag + at : tag + at + 4]) for at in (8, 12))
    lost = start + counted - size if flags & 2 else 0
    lame = tag + 12 + 4 * bool(flags & 2) + 100 * bool(flags & 4) + 4 * bool(flags & 8)
    trimmed = int.from_bytes(frame[lame + 21 : lame + 24])
    stated = frames * (1152 if is_mpeg1 else 576) - (trimmed >> 12) - (trimmed & 0xFFF)
    head = frame[: tag + 8] + MP3_FRAMES
    return Section(stream, start + len(head), size, head, max(0, stated), MP3_PADDING, lost)


class SequentialFile(soundfile.SoundFile):
    """A file that is read from its start to wherever it ends.

    soundfile moves to where each block should have ended, which fails where a header is wrong.
    """

    def seekable(self) -> bool:
        return False


def file_blocks(file: soundfile.SoundFile, source: Source, stated: int) -> Iterator[np.ndarray]:
    """The samples of a file as they are decoded, mono."""
    count = 0
    while True:
        # Not across the end by the header: what is no sound may follow it.
        most = min(BLOCK_SAMPLES, stated - count) if stated > count else BLOCK_SAMPLES
        try:
            block = file.read(most, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            if 0 < stated <= count:
                return
            reason = getattr(error, "error_string", error)
            with contextlib.suppress(soundfile.SoundFileError):
                count = file.tell()  # with those of this block that lie in front of the damage
            raise ValueError(
                f"{source}: damaged audio, only {count:,} samples can be read ({reason})"
            ) from None
        if not len(block):
            return
        count += len(block)
        yield block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]


def is_container(head: bytes) -> bool:
    """Whether a file of sound that begins so is MP4, WebM or Matroska, or bare AAC."""
    is_aac = len(head) > 1 and int.from_bytes(head[:2]) & 0xFFF6 == 0xFFF0
    return head[4:8] == b"ftyp" or head[:4] in (b"\x1aE\xdf\xa3", b"ADIF") or is_aac


def container_sounds(stream: BinaryIO, source: Source) -> Iterator[Sound]:
    """The first sound of a container, by PyAV."""
    av = open_pyav(source, "sound in MP4, WebM and AAC needs")
    try:
        with av.open(stream, mode="r", options=SOUND_OPTIONS) as container:
            if not container.streams.audio:
                raise ValueError(f"{source}: no sound in this file")
            audio = container.streams.audio[0]
            frames = container.decode(audio)
            for first in frames:
                check_rates(source, first.sample_rate, first.layout.nb_channels)
                stated = audio.duration and audio.time_base and audio.duration * audio.time_base
                blocks = _frame_blocks(itertools.chain([first], frames), source)
                yield Sound(first.sample_rate, blocks, round((stated or 0) * first.sample_rate))
    except av.error.FFmpegError as error:
        raise ValueError(f"{source}: not sound that can be read ({error.strerror})") from None


def _frame_blocks(frames: Iterator[AudioFrame], source: Source) -> Iterator[np.ndarray]:
    from av import AudioResampler
    from av.error import FFmpegError

    resampler = AudioResampler("fltp")  # changes the type of the samples alone
    count = 0
    try:
        for frame in itertools.chain.from_iterable(map(resampler.resample, frames)):
            yield frame.to_ndarray().mean(axis=0)
            count += frame.samples
    except (FFmpegError, ValueError) as error:
        raise ValueError(
            f"{source}: damaged audio, only {count:,} samples can be read ({error})"
        ) from None
