"""Pictures from files nobody has checked."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from examples.mimo.data.sources import Source, open_source

MAX_PIXELS = 64_000_000
# A longer one becomes a huge picture when its short side is scaled to an encoder's.
MAX_RATIO = 200
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".img")
# Pillow knows more; some of those formats run programs, and none is common.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
FITS = ("crop", "stretch", "pad")

Colour = tuple[int, ...]


def read_image(source: Source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in RGB: upright as its EXIF says, 16 bits scaled to 8, black behind alpha.

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


def fit_picture(
    picture: Image.Image, size: tuple[int, int], fit: str, colour: Colour
) -> Image.Image:
    """`picture` at (width, height) `size`: its centre, all of it stretched, or padded.

    Scaled bicubically; `colour` fills what a padded picture leaves empty.
    """
    if fit == "stretch":
        return _resize(picture, size)
    ratios = [wanted / side for wanted, side in zip(size, picture.size, strict=True)]
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
    """The content of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
