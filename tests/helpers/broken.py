"""Sixty samples that nobody can train on, each with words of the reason it is refused for."""

import io
import itertools
import json
import struct
import tarfile
import zlib

import numpy as np
import soundfile
from PIL import Image

RATE = 16_000
NOISE = np.random.default_rng(0)


def turns(question, answer="yes"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def picture(kind="PNG", side=64):
    file = io.BytesIO()
    pixels = NOISE.integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def sound(kind="FLAC", samples=None, rate=RATE, **how):
    file = io.BytesIO()
    samples = NOISE.uniform(-0.5, 0.5, rate) if samples is None else samples
    soundfile.write(file, samples, rate, format=kind, **how)
    return file.getvalue()


def png(width, height):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def nan_sound(value, kind="WAV"):
    samples = np.zeros(RATE, np.float32)
    samples[9] = value
    return sound(kind, samples, subtype="FLOAT")


def half(content):
    return content[: len(content) // 2]


PICTURES = [
    (half(picture("JPEG")), "damaged image"),
    (half(picture("PNG")), "damaged image"),
    (half(picture("GIF")), "damaged image"),
    (half(picture("BMP")), "damaged image"),
    (half(picture("WEBP")), "damaged image|not an image"),
    (half(picture("TIFF")), "damaged image|not an image"),
    (b"", "is empty"),
    (b"\0" * 1_000, "not an image"),
    (b"hello, I am a picture", "not an image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    (b"%PDF-1.4\n", "not an image"),
    (sound(), "not an image"),
    (picture()[:20], "not an image|damaged image"),
    (b"\xff\xd8\xff\xe0", "not an image|damaged image"),
    (png(60_000, 60_000), "pixels"),
    (png(100_000, 1_000), "pixels"),
    (png(9_000, 9_000), "pixels, more than 64,000,000"),
    (picture().replace(b"IDAT", b"IDOT"), "damaged image|not an image"),
    (zlib.compress(picture()), "not an image"),
]
SOUNDS = [
    (half(sound()), "damaged audio|not sound"),
    (half(sound("OGG", subtype="VORBIS"))[:600], "damaged audio|not sound|no samples"),
    (sound()[:40], "not sound|no samples|damaged"),
    (b"", "is empty"),
    (b"\0" * 1_000, "not sound"),
    (b"hello, I am a recording", "not sound"),
    (picture(), "not sound"),
    (nan_sound(np.nan), "NaN or infinite"),
    (nan_sound(np.inf), "NaN or infinite"),
    (nan_sound(-np.inf), "NaN or infinite"),
    (nan_sound(np.nan, "AIFF"), "NaN or infinite"),
    (sound("WAV", np.zeros(0)), "no samples"),
    (sound("FLAC", np.zeros(0)), "no samples|not sound|is empty"),
    (sound("WAV", np.zeros(4 * RATE)), r"4\.00 seconds of sound, but 2\.4 fit"),
    (b"RIFF\xff\xff\xff\xffWAVE", "not sound"),
    (b"fLaC" + b"\xff" * 60, "not sound|no samples"),
    (b"ID3\x03", "not sound"),
]
SEE, HEAR = "<image>what is it?", "<audio>what is said?"
# (the record, without a key; words of the reason)
RECORDS = [
    ({"images": ["none.png"], "conversations": turns(SEE)}, "no such"),
    ({"audios": ["none.flac"], "conversations": turns(HEAR)}, "no such"),
    ({"images": ["../../etc/passwd"], "conversations": turns(SEE)}, "outside|no such part"),
    ({"images": ["/etc/passwd"], "conversations": turns(SEE)}, "outside|no such part"),
    ({"images": "good.png", "conversations": turns(SEE)}, "must be a list"),
    ({"images": [7], "conversations": turns(SEE)}, "must be a list"),
    ({"images": ["good.png"], "conversations": turns("what?")}, "0 <image> in the text, but 1"),
    ({"images": [], "conversations": turns(SEE)}, "1 <image> in the text, but 0"),
    (
        {"images": ["good.png"], "conversations": turns("<image><image>")},
        "2 <image> in the text, but 1",
    ),
    (
        {"images": ["good.png"] * 2, "audios": ["good.flac"], "conversations": turns(SEE + HEAR)},
        "1 <image> in the text, but 2",
    ),
    ({"audios": ["good.flac"], "conversations": turns(SEE)}, "in the text, but"),
    ({"conversations": turns("hello")[:1]}, "no turn is an answer|no answer"),
    ({"conversations": turns("hello", "")}, "has no text"),
    ({"conversations": turns("", "yes")}, "has no text"),
    ({"conversations": turns("  \n", "yes")}, "has no text"),
    ({"conversations": []}, "list of turns"),
    ({"conversations": "hello"}, "list of turns|a turn must be"),
    ({}, "list of turns"),
    ({"conversations": [7]}, "a turn must be an object"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "a turn is from 'robot'"),
    ({"conversations": [{"from": "human", "value": 3}]}, "has no text"),
]
# (a whole line of a manifest; words of the reason)
LINES = [
    (b'{"key": "cut", "conversations": [', "not JSON"),
    (b'{"key": "\xff\xfe", "conversations": []}', "not JSON"),
    (json.dumps({"key": "long", "conversations": turns("x" * 10_000_000)}).encode(), "bytes in"),
]


def cases():
    """(key, record or line, parts by name, words): the files are parts' contents."""
    samples = []
    for number, (content, words) in enumerate(PICTURES):
        name = f"picture{number}.png"
        record = {"images": [name], "conversations": turns(SEE)}
        samples.append((f"picture-{number}", record, {name: content}, words))
    for number, (content, words) in enumerate(SOUNDS):
        name = f"sound{number}.flac"
        record = {"audios": [name], "conversations": turns(HEAR)}
        samples.append((f"sound-{number}", record, {name: content}, words))
    for number, (record, words) in enumerate(RECORDS):
        samples.append((f"record-{number}", record, {}, words))
    for number, (line, words) in enumerate(LINES):
        samples.append((f"line-{number}", line, {}, words))
    return samples


GOOD = {"good.png": picture(), "good.flac": sound()}


def write_shard(folder, name="train-0.tar", good=60):
    """Every case as it is, unchecked, with good samples between and behind; the folder."""
    record = {"images": ["good.png"], "audios": ["good.flac"]}
    record["conversations"] = turns("<image><audio>")
    fine = [(f"good-{number}", record, {}) for number in range(good)]
    bad = [(key, content, files) for key, content, files, _ in cases()]
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w") as tar:
        for pair in itertools.zip_longest(bad, fine):
            for key, content, files in filter(None, pair):
                line = content if isinstance(content, bytes) else json.dumps(content).encode()
                named = "" if isinstance(content, bytes) else str(content)
                mine = {file: data for file, data in GOOD.items() if file in named}
                for part, data in {"json": line, **mine, **files}.items():
                    member = tarfile.TarInfo(f"{key}.{part}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder
