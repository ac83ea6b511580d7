import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from examples.mimo.modalities.files import read_image


def save(picture, path, **how):
    picture.save(path, **how)
    return path


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png")],
)
def test_any_mode_becomes_rgb(tmp_path, mode, suffix):
    picture = Image.new("RGB", (8, 6), (255, 0, 0)).convert(mode)
    read = read_image(save(picture, tmp_path / f"a.{suffix}"))
    assert (read.mode, read.size) == ("RGB", (8, 6))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 32896, 65535]], dtype=np.uint16)
    read = read_image(save(Image.fromarray(values), tmp_path / "a.png"))
    assert np.asarray(read)[0, :, 0].tolist() == [0, 128, 255]


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (4, 2), (0, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6
    assert read_image(save(picture, tmp_path / "a.jpg", exif=exif)).size == (2, 4)


def test_transparent_pixels_are_black(tmp_path):
    picture = Image.new("RGBA", (1, 1), (255, 255, 255, 0))
    assert read_image(save(picture, tmp_path / "a.png")).getpixel((0, 0)) == (0, 0, 0)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no such image file"):
        read_image(tmp_path / "a.png")


def test_empty_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        read_image(tmp_path / "a.png")


def test_not_an_image(tmp_path):
    # Pillow would give the second one to a program that executes it.
    for content in ("hello", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"):
        (tmp_path / "a.png").write_text(content)
        with pytest.raises(ValueError, match="not an image that Pillow can read as JPEG, PNG"):
            read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_image(tmp_path, suffix):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, {"jpg": "JPEG", "png": "PNG"}[suffix])
    (tmp_path / f"a.{suffix}").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    with pytest.raises(ValueError, match="damaged image"):
        read_image(tmp_path / f"a.{suffix}")


def test_pixel_limit_is_checked_before_decoding(tmp_path):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match="pixels"):
        read_image(tmp_path / "bomb.png")
    small = save(Image.new("RGB", (20, 10)), tmp_path / "b.png")
    with pytest.raises(ValueError, match="20 x 10 is 200 pixels, more than 100"):
        read_image(small, max_pixels=100)


def test_a_line_is_no_picture(tmp_path):
    """Its short side scaled to an encoder's, it would take tens of gigabytes."""
    with pytest.raises(ValueError, match="100000 x 1 is more than 200 times as long as wide"):
        read_image(save(Image.new("RGB", (100_000, 1)), tmp_path / "a.png"))
