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
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import torch
from PIL import Image, ImageOps, features
from PIL.PngImagePlugin import PngImageFile

# Pillow knows more formats; some of those run programs, and none is common.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
MAX_PIXELS = 64_000_000
# Sides; a longer picture becomes huge when its short side is scaled to an encoder's.
MAX_RATIO = 200

# Only what fits the encoder is read, so a long recording costs no memory. These limit how much that
# is at a high rate, and the size of the resampling filter: 44,100 to 16,000 Hz takes 441 x 160.
MAX_SAMPLE_RATE_HZ = 768_000
MAX_SAMPLES_A_SECOND = 2 * MAX_SAMPLE_RATE_HZ
MAX_KERNEL = 10_000_000
BLOCK_SAMPLES = 2**14
# More than any header counts: what `sections` writes, and libsndfile says, of an unknown length.
UNKNOWN_FRAMES = 2**36
MAX_RECORDINGS = 1000  # joined in one file
# Full scale is 1. Files of floats may be louder, and their spectrum must not overflow.
MAX_AMPLITUDE = 1000.0
CUT = "cut the file, raise the encoder's max_windows, or set its overflow to truncate"
MAX_PIXEL_VALUE = 65_535
STRIP_PIXELS = 2**22

Colour = tuple[int, ...]
WHITE: Colour = (255, 255, 255)


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


def read_image(
    source: Source, max_pixels: int = MAX_PIXELS, background: Colour = WHITE
) -> Image.Image:
    """Decode a picture to RGB: upright as its EXIF says, 16 bits scaled to 8, the first frame.

    Where a picture is transparent, `background` shows through. AVIF is read where Pillow is built
    with it, HEIC where pillow-heif is installed. Raises ValueError, one line, when the file is
    missing, empty, truncated, not a picture, or holds more than `max_pixels` or is a mere line
    (checked before any pixel is decoded).
    """
    with warnings.catch_warnings():
        # The limit below is checked, and named, by this function.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return _decode_image(source, max_pixels, background)


def _decode_image(source: Source, max_pixels: int, background: Colour) -> Image.Image:
    try:
        with open_source(source, "image") as stream:
            formats = _formats(stream, source)
            with Image.open(stream, formats=formats) as picture:
                check_size(source, picture.size, max_pixels)
                _scale_transparent_colour(picture)
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)
                return to_rgb(picture, background)
    except Image.DecompressionBombError:
        raise ValueError(
            f"{source}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; scale it down"
        ) from None
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ValueError(f"{source}: not an image that Pillow can read as {known}") from None
    except (OSError, SyntaxError, EOFError, RuntimeError) as error:
        raise ValueError(f"{source}: damaged image ({error})") from None
    except ValueError as error:
        # Pillow's own do not name the file.
        named = str(error).startswith(f"{source}: ")
        raise ValueError(error if named else f"{source}: damaged image ({error})") from None


def _formats(stream: BinaryIO, source: Source) -> tuple[str, ...]:
    """The formats to try: those of every installation, or the one that the first bytes tell."""
    box = stream.read(64)
    stream.seek(0)
    brands = box[8 : int.from_bytes(box[:4])] if box[4:8] == b"ftyp" else b""
    if b"avif" in brands or b"avis" in brands:
        if not features.check("avif"):
            raise ValueError(f"{source}: AVIF pictures need Pillow 11.3 or newer, built with AVIF")
        return ("AVIF",)
    if any(brand in brands for brand in HEIC_BRANDS):
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise ValueError(
                f"{source}: HEIC pictures need pillow-heif: pip install pillow-heif"
            ) from None
        register_heif_opener()
        return ("HEIF",)
    return FORMATS


def check_size(source: Source, size: tuple[int, int], max_pixels: int) -> None:
    """ValueError for a picture of more than `max_pixels`, or one that is a mere line."""
    width, height = size
    if width * height > max_pixels:
        raise ValueError(
            f"{source}: {width} x {height} is {width * height:,} pixels, more than "
            f"{max_pixels:,}; scale the picture down"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"{source}: {width} x {height} is more than {MAX_RATIO} times as long as wide"
        )


def _scale_transparent_colour(picture: Image.Image) -> None:
    """Scale a PNG's transparent colour as Pillow scales its pixels, from 2, 4 or 16 bits to 8."""
    colour = picture.info.get("transparency")
    raw_mode = picture.tile[0].args if isinstance(picture, PngImageFile) and picture.tile else ""
    if raw_mode in ("L;2", "L;4") and colour is not None:
        picture.info["transparency"] = colour * (85 if raw_mode == "L;2" else 17)
    elif raw_mode == "RGB;16B" and colour is not None:
        picture.info["transparency"] = tuple(value >> 8 for value in colour)


def to_rgb(picture: Image.Image, background: Colour = WHITE) -> Image.Image:
    """`picture` in RGB, on `background` where it is transparent; itself, if it is that already."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return _wide_to_rgb(picture, background)
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    # Premultiplied grey is converted to no other mode.
    picture = picture.convert("LA") if picture.mode == "La" else picture
    result = Image.new("RGB", picture.size)
    for top, bottom in _strips(picture):
        strip = picture.crop((0, top, picture.width, bottom)).convert("RGBA")
        paper = Image.new("RGBA", strip.size, (*background, 255))
        result.paste(Image.alpha_composite(paper, strip).convert("RGB"), (0, top))
    return result


def _strips(picture: Image.Image) -> Iterator[tuple[int, int]]:
    """First row and end of each part; copies of the whole of a large picture are large too."""
    tops = range(0, picture.height, max(1, STRIP_PIXELS // picture.width))
    return zip(tops, [*tops[1:], picture.height], strict=True)


def _wide_to_rgb(picture: Image.Image, background: Colour) -> Image.Image:
    """Grey values of more than 8 bits; Pillow's own conversion would clip them at 255.

    Fractions go from 0 to 1 where none is larger, else to 255, or as 16 bits do.
    """
    whole = np.asarray(picture)
    lowest, highest = float(whole.min()), float(whole.max())
    if not max(-lowest, highest) <= MAX_PIXEL_VALUE:  # nor is NaN
        raise ValueError(f"pixel values from {lowest:,.6g} to {highest:,.6g}; scale them to 8 bits")
    result = np.empty((*whole.shape, 3), np.uint8)
    for top, bottom in _strips(picture):
        values = whole[top:bottom].astype(np.float32)
        transparent = values == picture.info.get("transparency", np.nan)
        if picture.mode.startswith("I;16") or highest > 255:
            values /= 257.0
        elif picture.mode == "F" and highest <= 1:
            values *= 255.0
        result[top:bottom] = np.clip(values, 0, 255).astype(np.uint8)[..., None]
        result[top:bottom][transparent] = background
    return Image.fromarray(result)


def fit_picture(
    picture: Image.Image,
    size: tuple[int, int],
    fit: str,
    colour: Colour,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    scaled_side: int | None = None,
) -> Image.Image:
    """`picture` at (width, height) `size`: its centre, all of it stretched, or padded.

    `colour` fills what a padded picture leaves empty. With `scaled_side` a picture is scaled, or
    stretched, to that side instead, and the centre of `size` is cut out of it. Sizes are rounded
    down, as transformers and torchvision do.
    """
    if fit == "pad":
        return _pad(picture, size, colour, resample)
    whole = (scaled_side, scaled_side) if scaled_side else size
    scaled = _resize(
        picture, whole if fit == "stretch" else _covering(picture.size, whole), resample
    )
    if scaled.size == size:
        return scaled
    left, top = ((have - want) // 2 for have, want in zip(scaled.size, size, strict=True))
    return scaled.crop((left, top, left + size[0], top + size[1]))


def _covering(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) of the shape of `size` that covers `target`."""
    width, height = size
    if width * target[1] >= height * target[0]:
        return int(target[1] * width / height), target[1]
    return target[0], int(target[0] * height / width)


def _pad(
    picture: Image.Image, size: tuple[int, int], colour: Colour, resample: Image.Resampling
) -> Image.Image:
    scale = min(target / side for target, side in zip(size, picture.size, strict=True))
    scaled = _resize(picture, tuple(max(1, round(side * scale)) for side in picture.size), resample)
    if scaled.size == size:
        return scaled
    padded = Image.new("RGB", size, colour)
    left, top = ((want - have) // 2 for have, want in zip(scaled.size, size, strict=True))
    padded.paste(scaled, (left, top))
    return padded


def _resize(picture: Image.Image, size: tuple[int, ...], resample: Image.Resampling) -> Image.Image:
    if picture.size == size:
        return picture
    return picture.resize((size[0], size[1]), resample)


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


class Sound(NamedTuple):
    """A recording, or one of several in a file: its rate, and mono blocks as they are decoded.

    `stated` is its length by the header, 0 if unknown; up to `padding` samples more fill the last
    frame. `lost_bytes`, above 0, are those that the header counts and the file does not have.
    """

    rate: int
    blocks: Iterator[np.ndarray]
    stated: int = 0
    padding: int = 0
    lost_bytes: int = 0


def read_audio(
    source: Source, sample_rate_hz: int, max_seconds: float, truncate: bool = False, cut: str = CUT
) -> np.ndarray:
    """Decode a recording: (samples,) float32 mono at `sample_rate_hz`, channels averaged.

    Reads what libsndfile reads, and with PyAV the sound of MP4, WebM and AAC. The length is what
    can be decoded, not what a header says, and at most `max_seconds` of it are tried. Raises
    ValueError, one line, when the file is missing, empty, not sound, holds no samples or NaN, when
    the decoder reports damage, when samples are far beyond full scale, or when it lasts longer than
    `max_seconds` and `truncate` is off: `cut` then says what to do.
    """
    pieces: list[np.ndarray] = []
    seconds = 0.0
    with open_source(source, "audio") as stream:
        for sound in _sounds(stream, source):
            check_rates(source, sound.rate, 1, sample_rate_hz)
            samples = _decode(sound, source, max_seconds - seconds)
            seconds += len(samples) / sound.rate
            if seconds > max_seconds and not truncate:
                stated = 0 if pieces else (sound.stated or 0) / sound.rate
                length = f"{stated:.2f}" if stated > max_seconds else f"more than {max_seconds:g}"
                raise ValueError(
                    f"{source}: {length} seconds of sound, but {max_seconds:g} fit; {cut}"
                )
            pieces.append(_resample(samples, sound.rate, sample_rate_hz))
            if seconds >= max_seconds and truncate:
                break
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if not len(samples):
        raise ValueError(f"{source}: the recording has no samples")
    loudest = max(float(samples.max()), -float(samples.min()))
    if not math.isfinite(loudest):
        raise ValueError(f"{source}: the recording holds NaN or infinite samples")
    if loudest > MAX_AMPLITUDE:
        raise ValueError(
            f"{source}: samples of up to {loudest:,.6g}, but full scale is 1; divide them"
        )
    return samples[: round(max_seconds * sample_rate_hz)]


def _decode(sound: Sound, source: Source, max_seconds: float) -> np.ndarray:
    """All of `sound`, or so much more than `max_seconds` of it that the excess is certain."""
    most = math.ceil(max_seconds * sound.rate) + 1 + sound.padding
    blocks: list[np.ndarray] = []
    count = 0
    for block in sound.blocks:
        blocks.append(block)
        count += len(block)
        if count >= most:
            break
    else:
        if sound.lost_bytes > 0:
            raise ValueError(
                f"{source}: damaged audio, {sound.lost_bytes:,} bytes are missing at its end; "
                f"{count:,} samples can be read"
            )
    samples = np.concatenate(blocks)[:most] if blocks else np.zeros(0, np.float32)
    if sound.stated <= len(samples) <= sound.stated + sound.padding:
        return samples[: sound.stated]
    return samples


def _sounds(stream: BinaryIO, source: Source) -> Iterator[Sound]:
    """The recordings in a file: one, or several that were joined."""
    # Which uses what is defined here.
    from examples.mimo.modalities import recordings

    head = stream.read(16)
    stream.seek(0)
    if recordings.is_container(head):
        yield from recordings.container_sounds(stream, source)
        return
    try:
        for section in itertools.islice(recordings.sections(stream), MAX_RECORDINGS):
            with recordings.SequentialFile(io.BufferedReader(section, 2**16)) as file:
                check_rates(source, file.samplerate, file.channels)
                stated = section.stated or (file.frames if file.frames < UNKNOWN_FRAMES else 0)
                blocks = recordings.file_blocks(file, source, stated)
                yield Sound(file.samplerate, blocks, stated, section.padding, section.lost_bytes)
    except soundfile.SoundFileError as error:
        # The whole text names the open file as an object; of a damaged MP3 it asks of pipes.
        reason = getattr(error, "error_string", str(error))
        reason = "no frame of an MP3 can be decoded" if "a pipe" in reason else reason
        raise ValueError(f"{source}: not sound that libsndfile can read ({reason})") from None


def check_rates(source: Source, rate: int, channels: int, target_hz: int | None = None) -> None:
    """ValueError for rates of no recording, and for two that would take a huge filter."""
    if rate > MAX_SAMPLE_RATE_HZ:
        raise ValueError(f"{source}: {rate:,} Hz is not a rate of sound recordings")
    if rate * channels > MAX_SAMPLES_A_SECOND:
        raise ValueError(f"{source}: {channels} channels of {rate:,} Hz; mix them down")
    common = math.gcd(rate, target_hz or rate)
    if target_hz and rate // common * (target_hz // common) > MAX_KERNEL:
        raise ValueError(
            f"{source}: {rate:,} Hz and {target_hz:,} Hz have no useful divisor in common; "
            "resample the file"
        )


def _resample(samples: np.ndarray, rate: int, target_hz: int) -> np.ndarray:
    if rate == target_hz or not len(samples):
        return samples
    # Takes a second to import, so it waits until a file needs it.
    from torchaudio.functional import resample

    return resample(torch.from_numpy(samples), rate, target_hz).numpy()


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
                except (ValueError, RecursionError) as error:  # also of too many digits
                    yield number, ValueError(f"not JSON ({error})")
