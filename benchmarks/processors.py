"""python -m benchmarks.processors: inputs of encoders beside those of transformers' processors.

Noise and pictures of awkward shapes, recordings of awkward lengths. Every processor is made from a
preprocessor_config.json as models ship them; the encoder's config is what `from-hf` makes of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import WhisperFeatureExtractor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from examples.mimo.configs import get_model_config
from examples.mimo.hf.weights import families_for
from examples.mimo.modalities.audio import SAMPLE_RATE_HZ, WhisperConfig
from examples.mimo.modalities.image import VitConfig

# Floats beside transformers'; bytes are equal. Its mel filters are computed in double precision.
IMAGE_BOUND, AUDIO_BOUND = 1e-6, 5e-5
SHAPES = ((1, 300), (640, 480), (333, 517), (50, 1000), (224, 225), (97, 31), (224, 224))
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# Family, transformers' processor, and what the model's file says beside the class's defaults.
IMAGE_CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "CLIP": ("clip", CLIPImageProcessorPil, {}),
    "CLIP, 336 px": (
        "clip",
        CLIPImageProcessorPil,
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    ),
    "SigLIP": ("siglip", SiglipImageProcessorPil, {}),
    "SigLIP, 384 px": (
        "siglip",
        SiglipImageProcessorPil,
        {"size": {"height": 384, "width": 384}},
    ),
    "DINOv2": ("dinov2", BitImageProcessorPil, {"size": {"shortest_edge": 256}, **IMAGENET}),
    "bilinear, values of -1 to 1": (
        "clip",
        CLIPImageProcessorPil,
        {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    "Lanczos, not rescaled": (
        "dinov2",
        BitImageProcessorPil,
        {"resample": 1, "do_rescale": False, "size": {"shortest_edge": 231}},
    ),
}
LENGTHS = (1, 399, 16_001, 29 * SAMPLE_RATE_HZ + 15_840, 30 * SAMPLE_RATE_HZ)
NUM_MEL_BINS = (80, 128)


def pictures() -> dict[str, Image.Image]:
    """Noise of every shape, on a slope so that what lies where matters."""
    random = np.random.default_rng(0)
    made = {}
    for width, height in SHAPES:
        slope = np.linspace(0, 155, width * height).reshape(height, width, 1)
        noise = random.integers(0, 100, (height, width, 3))
        made[f"{width} x {height}"] = Image.fromarray((slope + noise).astype(np.uint8))
    return made


def recordings() -> dict[str, np.ndarray]:
    """Noise of every length, a loud one, silence."""
    random = np.random.default_rng(1)
    made = {
        f"{length:,} samples": random.uniform(-0.3, 0.3, length).astype(np.float32)
        for length in LENGTHS
    }
    loud = np.sin(np.arange(3 * SAMPLE_RATE_HZ) / 7).astype(np.float32)
    return {**made, "loud": 8 * loud, "silence": np.zeros(SAMPLE_RATE_HZ, np.float32)}


def vit_of(family: str, processor: Any) -> VitConfig:
    """A ViT that preprocesses as the processor's preprocessor_config.json says."""
    values = json.loads(processor.to_json_string())
    size = values.get("crop_size") or values["size"]
    vit = VitConfig(1, 64, 2, 64, image_size=size["height"], patch_size=8, family=family)
    reader = families_for(vit)[0].preprocessor
    assert reader is not None
    return dataclasses.replace(vit, **reader.fields(values, vit, "the file", "the encoder"))


def image_differences(name: str) -> dict[str, tuple[int, float]]:
    """Picture -> the largest difference of the bytes that are normalised, and of the floats."""
    family, kind, settings = IMAGE_CASES[name]
    processor = kind(**settings)
    vit = vit_of(family, processor)
    plain = kind(**{**settings, "do_rescale": False, "do_normalize": False})
    bytes_only = dataclasses.replace(vit, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    result = {}
    for shape, picture in pictures().items():
        theirs = processor(picture, return_tensors="np")["pixel_values"]
        ours = vit.preprocess(picture)["pixel_values"].numpy()
        their_bytes = plain(picture, return_tensors="np")["pixel_values"].astype(int)
        our_bytes = bytes_only.preprocess(picture)["pixel_values"].numpy().round().astype(int)
        # Relative to their spread, which is not 1 where values are not rescaled.
        largest = float(np.abs(ours - theirs).max()) / max(1.0, float(np.abs(theirs).max()))
        result[shape] = int(np.abs(our_bytes - their_bytes).max()), largest
    return result


def audio_differences(num_mel_bins: int) -> dict[str, float]:
    """Recording -> the largest difference of the features."""
    theirs = WhisperFeatureExtractor(feature_size=num_mel_bins)
    whisper = WhisperConfig(1, 64, 2, 64, num_mel_bins, hop_samples=160, window_seconds=30.0)
    result = {}
    for name, sound in recordings().items():
        expected = theirs(sound, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np")
        features = whisper.preprocess(sound)["input_features"].numpy()
        result[name] = float(np.abs(features - expected["input_features"]).max())
    return result


def shipped_that_differ() -> list[str]:
    """The shipped configs whose preprocessing differs from their family's file in transformers."""
    files = {"clip": "CLIP, 336 px", "siglip": "SigLIP, 384 px", "dinov2": "DINOv2"}
    wrong = []
    for model in ("llava_vlm", "qwen3_avlm", "smollm2_avlm"):
        encoder: Any = get_model_config(model).inputs["images"].encoder
        family, kind, settings = IMAGE_CASES[files[encoder.family]]
        expected = vit_of(family, kind(**settings))
        fields = ("fit", "resize_side", "resample", "normalization", "image_size")
        if any(getattr(encoder, field) != getattr(expected, field) for field in fields):
            wrong.append(model)
    return wrong


def main() -> None:
    """Print the tables; status 1 where a bound is exceeded."""
    parser = argparse.ArgumentParser(description="Encoder inputs beside transformers'.")
    parser.add_argument("--output", type=Path, help="write the page to this Markdown file")
    output = parser.parse_args().output
    shapes = list(pictures())
    lines = [f"| pictures | {' | '.join(shapes)} |", "| --- |" + " ---: |" * len(shapes)]
    passed = True
    for name in IMAGE_CASES:
        found = image_differences(name)
        passed &= all(
            of_bytes == 0 and of_floats <= IMAGE_BOUND for of_bytes, of_floats in found.values()
        )
        cells = (f"{of_bytes}; {of_floats:.0e}" for of_bytes, of_floats in found.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    images, names = "\n".join(lines), list(recordings())
    lines = [f"| recordings | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for num_mel_bins in NUM_MEL_BINS:
        heard = audio_differences(num_mel_bins)
        passed &= max(heard.values()) <= AUDIO_BOUND
        cells = (f"{value:.0e}" for value in heard.values())
        lines.append(f"| Whisper, {num_mel_bins} mel bins | {' | '.join(cells)} |")
    page = _PAGE.format(images, "\n".join(lines), IMAGE_BOUND, AUDIO_BOUND)
    print(page)
    if output:
        output.write_text(page, encoding="utf-8")
    sys.exit(0 if passed else 1)


_PAGE = """# Inputs beside transformers' processors

`python -m benchmarks.processors --output benchmarks/processors.md` wrote this: the largest
difference between what an encoder gets here and what transformers' processor (with Pillow) makes of
the same picture or recording, with the config that `from-hf` reads in the processor's file. Of
pictures the bytes before normalisation come first, then the floats, relative to the largest.

{}

Features are from -1.5 to about 2:

{}

The tests hold bytes equal, floats of pictures within {:.0e} and features within {:.0e}.
"""


if __name__ == "__main__":
    main()
