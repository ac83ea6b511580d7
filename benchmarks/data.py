"""python -m benchmarks.data: samples a second and core, by stage, beside transformers' processors.

Spoken questions about easy-VQA's shapes, prepared for `llava_avlm`: pictures at 336 pixels and
sound in windows of 30 seconds. Rounds of ours and theirs alternate on the same files, one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.mimo.cli import command

command.prepare_environment(uses_gpus=False)  # the page compares CPUs

from examples.mimo import compat

compat.install()

import soundfile
import torch
from PIL import Image

from examples.mimo.configs import get_model_config
from examples.mimo.data.conversation import (
    SampleEncoder,
    to_pieces,
    tokenise,
)
from examples.mimo.data.tokenizer import load_tokenizer
from examples.mimo.data.turns import FilesInside, parse_turns
from examples.mimo.modalities.audio import AUDIO_SUFFIXES
from examples.mimo.shards.read import pack
from tests.helpers import spoken_shapes

SAMPLES, ROUNDS = 200, 5
SEQ_LENGTH, BUFFER = 4096, 200
AUDIO_BOUND, IMAGE_BOUND = 3.0, 1.0
# Samples a second that one GPU takes, from a large language model to a small one.
CONSUMPTION = (30, 100, 300, 1000)


def seconds_each(work: Callable[[], Any], count: int) -> float:
    """Seconds per file of one round."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) / count


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], count: int) -> tuple[float, float]:
    """Median seconds per file of both, rounds in turn; a first round each is left out."""
    times: tuple[list[float], list[float]] = [], []
    for number in range(ROUNDS + 1):
        for kind, work in zip(times, (ours, theirs), strict=True):
            seconds = seconds_each(work, count)
            if number:
                kind.append(seconds)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Measure, print and write the page; status 1 below a bound."""
    parser = argparse.ArgumentParser(description="Samples a second and core, by stage.")
    parser.add_argument("--output", type=Path, help="write the page to this Markdown file")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        page, passed = measure(Path(folder))
    print(page)
    if output:
        output.write_text(page, encoding="utf-8")
    sys.exit(0 if passed else 1)


def measure(folder: Path) -> tuple[str, bool]:
    """The page, and whether both bounds hold."""
    from transformers import WhisperFeatureExtractor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    records = [
        json.loads(line) for line in spoken_shapes.write(folder, SAMPLES).read_text().splitlines()
    ]
    config = get_model_config("llava_avlm")
    image_encoder, audio_encoder = (config.inputs[name].encoder for name in ("images", "audios"))
    pictures = [folder / file for record in records for file in record["images"]]
    sounds = [folder / file for record in records for file in record["audios"]]
    assert all(file.suffix in AUDIO_SUFFIXES for file in sounds)
    side = {"height": 336, "width": 336}
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side)
    whisper = WhisperFeatureExtractor(feature_size=80)

    def their_picture(file: Path) -> Any:
        return clip(Image.open(file).convert("RGB"), return_tensors="pt")

    def their_sound(file: Path) -> Any:
        return whisper(soundfile.read(file)[0], sampling_rate=16_000, return_tensors="pt")

    image = compare(
        lambda: [image_encoder.preprocess(image_encoder.read(file)) for file in pictures],
        lambda: [their_picture(file) for file in pictures],
        len(pictures),
    )
    audio = compare(
        lambda: [audio_encoder.preprocess(audio_encoder.read(file)) for file in sounds],
        lambda: [their_sound(file) for file in sounds],
        len(sounds),
    )
    window = torch.rand(30 * 16_000).numpy()
    full = compare(
        lambda: [audio_encoder.preprocess(window) for _ in range(20)],
        lambda: [whisper(window, sampling_rate=16_000, return_tensors="pt") for _ in range(20)],
        20,
    )
    stages = by_stage(records, folder, config, pictures, sounds)
    whole = stages["a whole sample"]
    rows = ["| stage | a second and core |", "| --- | ---: |"]
    rows += [f"| {name} | {1 / seconds:,.0f} |" for name, seconds in stages.items()]
    peers = [
        "| file to tensor | ours, ms | transformers, ms | times |",
        "| --- | ---: | ---: | ---: |",
    ]
    named = {"picture": image, "recording of 1 to 2 s": audio, "full window of 30 s, decoded": full}
    peers += [
        f"| {name} | {1e3 * a:.2f} | {1e3 * b:.2f} | {b / a:.1f} |"
        for name, (a, b) in named.items()
    ]
    feeding = ["| samples a second | workers |", "| ---: | ---: |"]
    feeding += [f"| {rate} | {math.ceil(rate * whole)} |" for rate in CONSUMPTION]
    passed = audio[1] / audio[0] >= AUDIO_BOUND and image[1] / image[0] >= IMAGE_BOUND
    tables = ["\n".join(table) for table in (rows, peers, feeding)]
    return _PAGE.format(*tables), passed


def by_stage(
    records: Sequence[dict[str, Any]],
    folder: Path,
    config: Any,
    pictures: Sequence[Path],
    sounds: Sequence[Path],
) -> dict[str, float]:
    """Seconds per file or sample, the median of the rounds."""
    tokenizer = load_tokenizer(folder)
    image_encoder, audio_encoder = (config.inputs[name].encoder for name in ("images", "audios"))
    raw_pictures, raw_sounds = (
        [image_encoder.read(f) for f in pictures],
        [audio_encoder.read(f) for f in sounds],
    )
    reader, find = SampleEncoder(config, tokenizer, SEQ_LENGTH), FilesInside(folder)
    samples = [reader.encode(record, find) for record in records]
    pieces = [to_pieces(parse_turns(r["conversations"], config), config) for r in records]
    counts = [
        {(name, False): [config.inputs[name].tokens_of(inputs) for inputs in items]
         for name, items in sample.media.items()}
        for sample in samples
    ]  # fmt: skip
    lengths = [len(sample.tokens.ids) for sample in samples]

    def tokenise_all() -> None:
        for conversation, count in zip(pieces, counts, strict=True):
            tokenise(conversation, count, config, reader.text_encoder)

    work = {
        "decode a picture": (lambda: [image_encoder.read(f) for f in pictures], len(pictures)),
        "resize and normalise it": (
            lambda: [image_encoder.preprocess(p) for p in raw_pictures],
            len(pictures),
        ),
        "decode a recording": (lambda: [audio_encoder.read(f) for f in sounds], len(sounds)),
        "its mel features": (
            lambda: [audio_encoder.preprocess(s) for s in raw_sounds],
            len(sounds),
        ),
        "tokenise a conversation": (tokenise_all, len(records)),
        f"pack, {BUFFER} at a time": (lambda: pack(lengths[:BUFFER], SEQ_LENGTH), BUFFER),
        "a whole sample": (lambda: [reader.encode(r, find) for r in records], len(records)),
    }
    return {
        name: statistics.median(seconds_each(run, count) for _ in range(ROUNDS))
        for name, (run, count) in work.items()
    }


_PAGE = """# What preparing a sample costs

`python -m benchmarks.data --output benchmarks/data.md` wrote this, on one thread: spoken
questions about easy-VQA's shapes, prepared for `llava_avlm`.

{}

Beside transformers' processors (Pillow for pictures, as torchvision is not installed), on the same
files in turn. Of a short recording only what sounds is transformed; a full window has no silence to
save.

{}

Worker processes (`--num-workers`) that a GPU needs which takes so many of these samples a second:

{}
"""


if __name__ == "__main__":
    main()
