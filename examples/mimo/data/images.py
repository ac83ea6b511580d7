"""Pictures from files nobody has checked."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in RGB: upright as its EXIF says, 16 bits scaled to 8, black behind alpha.

    Raises ValueError, one line, when the file is missing, empty, truncated, not a picture, or
    holds more than `max_pixels` (checked before any pixel is decoded).
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such image file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the image file is empty")
    with warnings.catch_warnings():
        # The limit below is checked, and named, by this function.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return _open(path, max_pixels)


def _open(path: Path, max_pixels: int) -> Image.Image:
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise ValueError(
                    f"{path}: {width} x {height} is {width * height:,} pixels, more than "
                    f"{max_pixels:,}; scale the picture down"
                )
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; scale it down"
        ) from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path}: not an image that Pillow can read") from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path}: damaged image ({error})") from None


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
