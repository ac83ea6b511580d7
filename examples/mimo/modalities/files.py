"""Decoding of untrusted files: images, recordings, bytes from shards, JSON lines.

Sizes are checked before memory is taken, formats before they are decoded. Whatever is wrong with a
file is a ValueError of one line that names it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
from PIL import Image, ImageOps

# Pillow knows more formats; some of those run programs, and none is common.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 64_000_000
# Sides; a longer picture becomes huge when its short side is scaled to an encoder's.
MAX_RATIO = 200

# Only what fits the encoder is read, so a long recording costs no memory. These limit how much that
# is at a high rate, and the size of the resampling filter: 44,100 to 16,000 Hz takes 441 x 160.
MAX_SAMPLE_RATE_HZ = 768_000
MAX_SAMPLES_A_SECOND = 2 * MAX_SAMPLE_RATE_HZ
MAX_KERNEL = 10_000_000

Colour = tuple[int, ...]


@dataclass(frozen=True)
class Blob:
    """A file's content out of a shard or a request, and the name that messages give it."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


Source = Path | Blob


@contextlib.contextmanager
def open_source(source: Source, singular: str) -> Iterator[BinaryIO]:
    """Open `source` for reading; ValueError, one line, when it is missing or empty.

    `singular` is what the message calls the file, such as `image`.
    """
    if isinstance(source, Blob):
        if not source.data:
            raise ValueError(f"{source}: the {singular} file is empty")
        yield io.BytesIO(source.data)
        return
    try:
        stream = source.open("rb") if source.is_file() else None
    except OSError as error:
        raise ValueError(
            f"{source}: the {singular} file cannot be read ({error.strerror})"
        ) from None
    if stream is None:
        raise ValueError(f"{source}: no such {singular} file")
    with stream:
        if source.stat().st_size == 0:
            raise ValueError(f"{source}: the {singular} file is empty")
        yield stream


def read_image(source: Source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to RGB: upright as its EXIF says, 16 bits scaled to 8, black behind alpha.

    Raises ValueError, one line, when the file is missing, empty, truncated, not a picture, or
    holds more than `max_pixels` or is a mere line (checked before any pixel is decoded).
    """
    with warnings.catch_warnings():
        # The limit below is checked, and named, by this function.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return _decode_image(source, max_pixels)


def _decode_image(source: Source, max_pixels: int) -> Image.Image:
    try:
        with open_source(source, "image") as stream, Image.open(stream, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise ValueError(
                    f"{source}: {width} x {height} is {width * height:,} pixels, more than "
                    f"{max_pixels:,}; scale the picture down"
                )
            if max(width, height) > MAX_RATIO * min(width, height):
                raise ValueError(
                    f"{source}: {width} x {height} is more than {MAX_RATIO} times as long as wide"
                )
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except Image.DecompressionBombError:
        raise ValueError(
            f"{source}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; scale it down"
        ) from None
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ValueError(f"{source}: not an image that Pillow can read as {known}") from None
    except (OSError, SyntaxError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{source}: damaged image ({error})") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        return _wide_to_rgb(np.asarray(picture, dtype=np.float32))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, picture).convert("RGB")
    return picture.convert("RGB")


def _wide_to_rgb(values: np.ndarray) -> Image.Image:
    """Grey values of more than 8 bits; Pillow's own conversion would clip them at 255."""
    if values.max(initial=0) > 255:
        values = values / 257.0
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")


def fit_picture(
    picture: Image.Image, size: tuple[int, int], fit: str, colour: Colour
) -> Image.Image:
    """`picture` at (width, height) `size`: its centre, all of it stretched, or padded.

    Scaled bicubically; `colour` fills what a padded picture leaves empty.
    """
    if fit == "stretch":
        return _resize(picture, size)
    ratios = [target / side for target, side in zip(size, picture.size, strict=True)]
    scale = max(ratios) if fit == "crop" else min(ratios)
    scaled = _resize(picture, tuple(max(1, round(side * scale)) for side in picture.size))
    left, top = ((have - want) // 2 for have, want in zip(scaled.size, size, strict=True))
    if fit == "crop":
        return scaled.crop((left, top, left + size[0], top + size[1]))
    if scaled.size == size:
        return scaled
    padded = Image.new("RGB", size, colour)
    padded.paste(scaled, (-left, -top))
    return padded


def _resize(picture: Image.Image, size: tuple[int, ...]) -> Image.Image:
    if picture.size == size:
        return picture
    return picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def grid_of_tiles(size: tuple[int, int], side: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) of square tiles for a picture of (width, height) `size`; (0, 0) for none.

    As LLaVA-NeXT chooses: of the grids of at most `max_tiles` the one that keeps the most of the
    picture's pixels, of several the one with the least left empty.
    """
    if max_tiles < 1 or max(size) <= side:
        return 0, 0
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]

    def worth(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(side * count / length for count, length in zip(grid, size, strict=True))
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - grid[0] * grid[1] * side * side

    return max(grids, key=worth)


def to_png(picture: Image.Image) -> bytes:
    """Encode as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def read_audio(
    source: Source, sample_rate_hz: int, max_seconds: float, truncate: bool = False
) -> np.ndarray:
    """Decode a recording: (samples,) float32 mono at `sample_rate_hz`, channels averaged.

    Reads whatever libsndfile reads. Raises ValueError, one line, when the file is missing,
    empty, damaged, not sound, holds no samples or NaN, or lasts longer than `max_seconds`
    and `truncate` is off.
    """
    try:
        with open_source(source, "audio") as stream, soundfile.SoundFile(stream) as sound:
            _check_audio_header(sound, source, sample_rate_hz, max_seconds, truncate)
            rate = sound.samplerate
            num_samples = min(sound.frames, int(np.ceil(max_seconds * rate)))
            samples = sound.read(num_samples, dtype="float32", always_2d=True).mean(axis=1)
    except soundfile.SoundFileError as error:
        # The whole text names the open file as an object.
        reason = getattr(error, "error_string", error)
        raise ValueError(f"{source}: not sound that libsndfile can read ({reason})") from None
    if len(samples) < num_samples:
        raise ValueError(
            f"{source}: damaged audio, {len(samples):,} of {num_samples:,} samples can be read"
        )
    if not np.isfinite(samples).all():
        raise ValueError(f"{source}: the recording holds NaN or infinite samples")
    if rate != sample_rate_hz:
        # Takes a second to import, so it waits until a file needs it.
        from torchaudio.functional import resample

        samples = resample(torch.from_numpy(samples), rate, sample_rate_hz).numpy()
    return samples[: round(max_seconds * sample_rate_hz)]


def _check_audio_header(
    sound: soundfile.SoundFile,
    source: Source,
    sample_rate_hz: int,
    max_seconds: float,
    truncate: bool,
) -> None:
    if sound.frames <= 0:
        raise ValueError(f"{source}: the recording has no samples")
    if sound.samplerate > MAX_SAMPLE_RATE_HZ:
        raise ValueError(f"{source}: {sound.samplerate:,} Hz is not a rate of sound recordings")
    if sound.samplerate * sound.channels > MAX_SAMPLES_A_SECOND:
        raise ValueError(
            f"{source}: {sound.channels} channels of {sound.samplerate:,} Hz; mix them down"
        )
    common = math.gcd(sound.samplerate, sample_rate_hz)
    if sound.samplerate // common * (sample_rate_hz // common) > MAX_KERNEL:
        raise ValueError(
            f"{source}: {sound.samplerate:,} Hz and {sample_rate_hz:,} Hz have no useful "
            "divisor in common; resample the file"
        )
    seconds = sound.frames / sound.samplerate
    if seconds > max_seconds and not truncate:
        raise ValueError(
            f"{source}: {seconds:.2f} seconds of sound, but {max_seconds:g} fit; cut the file, "
            "raise the encoder's max_windows, or set its overflow to truncate"
        )


def to_wav(samples: np.ndarray, sample_rate_hz: int) -> bytes:
    """Encode mono samples as a 16-bit WAV file."""
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate_hz, format="WAV", subtype="PCM_16")
    return file.getvalue()


def json_lines(path: Path, max_bytes: int = 2**30) -> Iterator[tuple[int, Any]]:
    """The number, from 1, and the value of each line of `path` that is not blank.

    A line that is not JSON, or has more than `max_bytes`, gives the ValueError that says so.
    """
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(max_bytes + 1)
            if not line:
                return
            size = len(line)
            if size > max_bytes:
                # The rest is read in pieces, so that memory stays bounded.
                while line and not line.endswith(b"\n"):
                    line = file.readline(max_bytes)
                    size += len(line)
                yield number, ValueError(f"{size:,} bytes in one line, more than {max_bytes:,}")
            elif line.strip():
                try:
                    yield number, json.loads(line)
                # Also numbers of too many digits, and half characters.
                except (ValueError, RecursionError) as error:
                    yield number, ValueError(f"not JSON ({error})")
