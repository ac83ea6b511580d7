import dataclasses
import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, features

from examples.mimo.cli.overrides import (
    add_modality_flags,
    inference_parser,
    with_fields,
    with_modality_flags,
)
from examples.mimo.configs import get_model_config
from examples.mimo.modalities.files import Blob, read_image, to_rgb


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
    # A dark one is no picture of eight bits.
    dark = Image.fromarray(np.array([[0, 200, 514]], dtype=np.uint16).clip(max=255))
    assert np.asarray(read_image(save(dark, tmp_path / "b.png"))).max() == 0


def test_fractions_are_read_at_their_scale(tmp_path):
    """From 0 to 1, to 255, or to 65,535."""
    shades = np.array([[0, 0.2, 1]], dtype=np.float32)
    for most in (1, 255, 65_535):
        file = save(Image.fromarray(shades * most), tmp_path / f"{most}.tiff")
        assert np.asarray(read_image(file))[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e18, -1e18, 65_536, 2**31 - 1])
def test_pixels_of_no_picture_are_refused(tmp_path, value):
    values = np.full((4, 4), 7, np.int32 if isinstance(value, int) else np.float32)
    values[1, 2] = value
    file = save(Image.fromarray(values), tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff: damaged image \(pixel values from .* scale"):
        read_image(file)


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (4, 2), (0, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6
    assert read_image(save(picture, tmp_path / "a.jpg", exif=exif)).size == (2, 4)


def png(rows, bits, colour, *chunks):
    """A PNG of rows of raw bytes; Pillow writes none of few bits with a transparent colour."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    width = len(rows[0]) * 8 // (bits * {0: 1, 2: 3, 4: 2, 6: 4}[colour])
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    middle = b"".join(chunk(kind, body) for kind, body in chunks)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + middle
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def as_file(picture, kind, **how):
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def letters(mode):
    """Nothing between two dark pixels, as `mode` keeps it."""
    picture = Image.new("RGBA", (3, 1), (10, 10, 10, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    return picture.convert(mode)


def palette(transparency):
    picture = Image.new("P", (2, 1), 1)
    picture.putpalette([10, 10, 10, 0, 0, 0])
    picture.putpixel((0, 0), 0)
    return as_file(picture, "PNG", transparency=transparency)


TRANSPARENT = {
    "RGBA": as_file(letters("RGBA"), "PNG"),
    "RGBA of WebP": as_file(letters("RGBA"), "WEBP", lossless=True, exact=True),
    "RGBA of TIFF": as_file(letters("RGBA"), "TIFF"),
    "grey and alpha": as_file(letters("LA"), "PNG"),
    "palette, one transparent colour": palette(1),
    "palette, an alpha for each colour": palette(b"\xff\0"),
    "GIF": as_file(letters("RGBA"), "GIF"),
    "animated GIF": as_file(
        letters("RGBA"), "GIF", save_all=True, append_images=[Image.new("RGBA", (3, 1), "red")]
    ),
    "animated WebP": as_file(
        letters("RGBA"),
        "WEBP",
        **{"lossless": True, "exact": True, "save_all": True},
        append_images=[Image.new("RGBA", (3, 1), "red")],
    ),
    "RGB, a transparent colour": png([[10, 10, 10, 1, 2, 3]], 8, 2, (b"tRNS", b"\0\1\0\2\0\3")),
    "16-bit RGB, a transparent colour": png(
        [[10, 0, 10, 0, 10, 0, 1, 1, 2, 2, 3, 3]], 16, 2, (b"tRNS", b"\1\1\2\2\3\3")
    ),
    "16-bit RGBA": png([[10, 0, 10, 0, 10, 0, 255, 255, *[0] * 8]], 16, 6),
    "16-bit grey and alpha": png([[10, 0, 255, 255, *[0] * 4]], 16, 4),
    "grey, a transparent shade": png([[10, 0]], 8, 0, (b"tRNS", b"\0\0")),
    "16-bit grey, a transparent shade": png([[10, 0, 0, 7]], 16, 0, (b"tRNS", b"\0\7")),
}
# These have no shade of 10.
TRANSPARENT_BITS = {
    "1-bit grey": png([[0b01000000]], 1, 0, (b"tRNS", b"\0\1")),
    "2-bit grey": png([[0b00100000]], 2, 0, (b"tRNS", b"\0\2")),
    "4-bit grey": png([[0x0B]], 4, 0, (b"tRNS", b"\0\x0b")),
}


@pytest.mark.parametrize("kind", [*TRANSPARENT, *TRANSPARENT_BITS])
def test_the_background_shows_through_what_is_transparent(kind):
    file = Blob("a", {**TRANSPARENT, **TRANSPARENT_BITS}[kind])
    dark = 10 if kind in TRANSPARENT else 0
    for how, colour in (({}, (255, 255, 255)), ({"background": (9, 8, 7)}, (9, 8, 7))):
        read = np.asarray(read_image(file, **how))
        assert abs(read[0, 0].astype(int) - dark).max() <= 1
        assert tuple(read[0, 1]) == colour


def test_half_transparent_pixels_are_mixed():
    file = Blob("a", as_file(Image.new("RGBA", (1, 1), (0, 0, 200, 51)), "PNG"))
    assert read_image(file).getpixel((0, 0)) == (204, 204, 244)
    premultiplied = Image.new("RGBa", (1, 1), (0, 0, 40, 51))
    assert to_rgb(premultiplied).getpixel((0, 0)) == (204, 204, 244)
    assert to_rgb(Image.new("LA", (1, 1), (0, 51)).convert("La")).getpixel((0, 0)) == (204,) * 3


def test_a_config_chooses_the_background():
    vit = get_model_config("tiny_avlm").modalities["images"].encoder
    file = Blob("a", as_file(Image.new("RGBA", (4, 4)), "PNG"))
    colours = {}
    for background in ("white", "black", "mean"):
        raw = dataclasses.replace(vit, background=background).read(file)
        colours[background] = raw.getpixel((0, 0))
        if background == "mean":  # nothing, to the encoder
            assert vit.preprocess(raw)["pixel_values"].abs().max() < 0.02
    assert colours == {"white": (255,) * 3, "black": (0,) * 3, "mean": (122, 116, 104)}
    assert vit.read(file).getpixel((0, 0)) == (255,) * 3
    with pytest.raises(ValueError, match="background is 'pink'; choose one of white, black, mean"):
        dataclasses.replace(vit, background="pink")


def test_flags_choose_the_background_too():
    config = get_model_config("tiny_avlm")
    parser = inference_parser()
    add_modality_flags(parser, config)
    args = parser.parse_args(["--ckpt", "x", "--image-background", "black"])
    encoder = with_modality_flags(config, args).modalities["images"].encoder
    assert encoder.background_colour == (0, 0, 0)
    changed = with_fields(
        config, ["images.encoder.background=mean", "images.encoder.mean=0.2,0.5,1"]
    )
    assert changed.modalities["images"].encoder.background_colour == (51, 127, 255)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("resize_side", 31, "resize_side 31: at least image_size 32"),
        ("resize_side", "40", "resize_side is '40'; it must be a whole number"),
        (
            "resize_side",
            10**6,
            "resize_side is 1000000; it must be a whole number from 1 to 16,384 or none",
        ),
        (
            "mean",
            (0.5, 0.5),
            r"mean is \(0.5, 0.5\); it must be a list of 3, each a number from -1e\+06 to 1e\+06",
        ),
        ("mean", {"r": 1}, "mean is {.*a list of 3"),
        ("std", [0.5, 0.5, 0], "std .*a list of 3, each a number from 1e-06"),
        ("std", [0.5, 0.5, float("nan")], "std .*a list of 3"),
        ("std", ["1", 1, 1], "std .*a list of 3"),
        ("resample", "cubic", "resample is 'cubic'; choose one of nearest"),
    ],
)
def test_fields_of_preprocessing_are_checked(field, value, message):
    vit = get_model_config("tiny_avlm").modalities["images"].encoder
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(vit, **{field: value})
    with pytest.raises(ValueError, match="resize_side 40: fit pad"):
        dataclasses.replace(vit, fit="pad", resize_side=40)


def test_lists_of_a_checkpoint_become_tuples():
    vit = get_model_config("tiny_avlm").modalities["images"].encoder
    changed = dataclasses.replace(vit, mean=[0, 0.25, 1], std=[1, 2, 3])
    assert (changed.mean, changed.std) == ((0.0, 0.25, 1.0), (1.0, 2.0, 3.0))
    pixels = changed.preprocess(Image.new("RGB", (32, 32), (255, 0, 51)))["pixel_values"]
    assert pixels[0, :, 5, 5].tolist() == pytest.approx([1.0, -0.125, -0.8 / 3])


def test_what_pillow_refuses_names_the_file(tmp_path):
    file = tmp_path / "b.png"
    file.write_bytes(png([[1, 2, 3]], 8, 2, (b"tRNS", b"\0")))
    with pytest.raises(ValueError, match=f"^{file}: damaged image .*tRNS"):
        read_image(file)


def test_avif_is_read(tmp_path):
    if not features.check("avif"):
        pytest.skip("Pillow is built without AVIF")
    picture = Image.new("RGBA", (40, 20), (0, 0, 200, 255))
    picture.paste((0, 0, 0, 0), (20, 0, 40, 20))
    file = save(picture, tmp_path / "a.avif", quality=100)
    read = np.asarray(read_image(file)).astype(int)
    assert read.shape == (20, 40, 3)
    assert abs(read[10, 5] - (0, 0, 200)).max() < 8
    assert abs(read[10, 35] - 255).max() < 8
    with pytest.raises(ValueError, match="40 x 20 is 800 pixels, more than 799"):
        read_image(file, max_pixels=799)
    file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(ValueError, match=r"a\.avif: "):
        read_image(file)
    # Whole boxes, with what no decoder makes a picture of.
    whole = bytearray(save(picture, file).read_bytes())
    body = whole.index(b"mdat") + 4
    whole[body:] = bytes(len(whole) - body)
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"a\.avif: damaged image \("):
        read_image(file)


def test_heic_needs_its_plugin(tmp_path, monkeypatch):
    file = tmp_path / "a.heic"
    file.write_bytes(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(100))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(ValueError, match="HEIC pictures need pillow-heif: pip install"):
            read_image(file)
    heif = pytest.importorskip("pillow_heif")
    with pytest.raises(ValueError, match=r"a\.heic: "):
        read_image(file)
    heif.from_pillow(Image.new("RGB", (64, 32), (200, 0, 0))).save(file, quality=90)
    assert read_image(file).size == (64, 32)
    with pytest.raises(ValueError, match="64 x 32 is 2,048 pixels, more than 2,000"):
        read_image(file, max_pixels=2_000)


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
