"""python -m benchmarks.codecs: what codecs of sound cost, on one thread.

Ten seconds of eSpeak NG's speech through VectorQuantisedMel, learned from four minutes of the same
voice, and through Mimi, DAC and EnCodec of the sizes that are published. Their weights are random:
the time is that of the real ones, the sound is not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demos.digits.speech import Synthesiser
from examples.mimo.modalities.hf_codec import HuggingFaceCodec
from examples.mimo.modalities.speech import SoundCodec, VectorQuantisedMel

RATE, SECONDS, ROUNDS = 16_000, 10, 3
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# Codebooks as they are published or, of Mimi, as Moshi uses them.
NEURAL = {
    "Mimi, 8 codebooks": ("Mimi", 8, 2048),
    "EnCodec, 24 kHz, 2 codebooks": ("Encodec", 2, 1024),
    "EnCodec, 24 kHz, 8 codebooks": ("Encodec", 8, 1024),
    "DAC, 16 kHz, 12 codebooks": ("Dac", 12, 1024),
}
HEADING = """| codec | codes | a second | to codes | to sound | in pieces | first sound after |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


def main() -> None:
    """Print a line for each codec; times are for a second of sound."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    synthesiser = Synthesiser()
    words = [f"{a} and {b} is {c}." for a in DIGITS for b in DIGITS for c in DIGITS[:2]]
    sounds = [synthesiser.say(text, "m3") for text in words]
    sound = np.concatenate(sounds)[: SECONDS * RATE]
    print(HEADING)
    with tempfile.TemporaryDirectory() as folder:
        speech = VectorQuantisedMel(folder=f"{folder}/speech")
        began = time.process_time()
        speech.learn(sounds)
        learned = time.process_time() - began
        measure("VectorQuantisedMel", speech, sound)
        for name, (kind, num_codebooks, size) in NEURAL.items():
            place = f"{folder}/{name}"
            save_model(kind, place)
            codec = HuggingFaceCodec(
                folder=place, num_codebooks=num_codebooks, codebook_size=size, sample_rate_hz=RATE
            )
            measure(name, codec, sound)
    minutes = sum(map(len, sounds)) / RATE / 60
    print(f"\nThe codebook was learned in {learned:.1f} s from {minutes:.1f} minutes.")


def measure(name: str, codec: SoundCodec, sound: np.ndarray) -> None:
    """Print a line of the table."""
    to_codes = cost(lambda: codec.encode(sound))
    codes = codec.encode(sound)
    to_sound = cost(lambda: codec.decode(codes))
    in_pieces = cost(lambda: list(codec.decode_pieces(codes)))
    taken: list[int] = []
    next(codec.decode_pieces(code for code in codes if not taken.append(code)))
    a_second = len(codes) / SECONDS
    print(
        f"| {name} | {codec.num_codes:,} | {a_second:.0f} | {to_codes:.0f} ms | {to_sound:.0f} ms "
        f"| {in_pieces:.0f} ms | {len(taken)} codes, {len(taken) / a_second:.2f} s |",
        flush=True,
    )


def cost(call: Callable[[], Any]) -> float:
    """Milliseconds of CPU time for a second of sound, the median of a few."""
    call()
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return statistics.median(times) * 1000 / SECONDS


def save_model(kind: str, place: str) -> None:
    """A model of the sizes that its config has by default, with random weights and codebooks."""
    import transformers

    torch.manual_seed(0)
    fields: dict[str, Any] = (
        {"n_codebooks": 12, "downsampling_ratios": [2, 4, 5, 8]} if kind == "Dac" else {}
    )
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**fields))
    for name, tensor in model.named_buffers():
        if name.endswith(("embed_sum", "codebook.embed")):
            tensor.normal_()
    Path(place).mkdir()
    model.save_pretrained(place)


if __name__ == "__main__":
    sys.exit(main())
