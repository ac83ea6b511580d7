"""Files of unknown origin: pictures, recordings and bytes out of shards, decoded with care.

Sizes are checked before memory is taken, formats before they are decoded. Whatever is wrong with a
file is a ValueError of one line that names it.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from PIL import Image, ImageOps


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
    """Open `source` for reading; ValueError, one line, when it is missing or empty."""
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


MAX_PIXELS = 64_000_000


# A longer one becomes a huge picture when its short side is scaled to an encoder's.
MAX_RATIO = 200


# Pillow knows more; some of those formats run programs, and none is common.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def read_image(source: Source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to RGB: upright as its EXIF says, 16 bits scaled to 8, black behind alpha.

    Raises ValueError, one line, when the file is missing, empty, truncated, not a picture, or
    holds more than `max_pixels` or is a mere line (checked before any pixel is decoded).
    """
    with warnings.catch_warnings():
        # The limit below is checked, and named, by this function.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return _open(source, max_pixels)


def _open(source: Source, max_pixels: int) -> Image.Image:
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


# What fits is read, so a long file costs no memory; the rate and the samples of all channels a
# second are bounded to bound that, and the numbers of the filter that changes the rate: 44,100 to
# 16,000 Hz takes 441 times 160.
MAX_SAMPLE_RATE_HZ = 768_000


MAX_SAMPLES_A_SECOND = 2 * MAX_SAMPLE_RATE_HZ


MAX_KERNEL = 10_000_000


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
            _check_header(sound, source, sample_rate_hz, max_seconds, truncate)
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


def _check_header(
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
