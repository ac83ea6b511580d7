"""Writes a small data set of motion sensor readings with questions about what was done.

A series is what a phone's sensors would read while someone shakes, turns or taps it, or lets it
rest: three accelerometer channels in g and three gyroscope channels in radians a second, 50 times
a second. Everything is simulated from a seed, so a data set is ready in seconds, and every answer
needs the series: the same question has another answer for another motion.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import train_tokenizer

MODALITY = "sensors"
STEPS_PER_SECOND = 50
MIN_STEPS, MAX_STEPS = 96, 192
ACCELEROMETER_NOISE_G, GYROSCOPE_NOISE_RAD = 0.02, 0.03
COUNTS = ("once", "twice", "three times")
HELDOUT_SHARE = 0.1

Readings = np.ndarray
Record = dict[str, Any]


@dataclass(frozen=True)
class Motion:
    """A kind of motion: how it is drawn, and what is answered about it.

    `draw` changes the readings (steps, 6) of a resting device in place and returns a detail that
    an answer may hold, such as a direction.
    """

    name: str
    was_done: str
    draw: Callable[[Readings, np.random.Generator], str]


def _rest(readings: Readings, generator: np.random.Generator) -> str:
    return ""


def _shake(readings: Readings, generator: np.random.Generator) -> str:
    """A fast oscillation along one axis, which the hand's rotation accompanies."""
    axis = int(generator.integers(3))
    hertz, phase = generator.uniform(3.0, 6.0), generator.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * hertz * np.arange(len(readings)) / STEPS_PER_SECOND + phase)
    readings[:, axis] += generator.uniform(1.0, 2.5) * wave
    readings[:, 3 + (axis + 1) % 3] += generator.uniform(0.3, 0.9) * wave
    return ""


def _turn(readings: Readings, generator: np.random.Generator) -> str:
    """One slow rotation about the vertical axis; positive is to the left."""
    is_left = bool(generator.integers(2))
    steps = int(generator.integers(MIN_STEPS // 2, MIN_STEPS))
    start = int(generator.integers(len(readings) - steps + 1))
    swell = np.sin(np.linspace(0, np.pi, steps))
    readings[start : start + steps, 5] += (1 if is_left else -1) * swell * generator.uniform(1, 3)
    return "to the left" if is_left else "to the right"


def _tap(readings: Readings, generator: np.random.Generator) -> str:
    """One to three short impulses that die away, at least a fifth of a second apart."""
    count = int(generator.integers(1, len(COUNTS) + 1))
    slots = generator.choice(len(readings) // 16 - 1, size=count, replace=False)
    decay = np.exp(-np.arange(8) / 2.0) * np.cos(np.arange(8) * 2.2)
    for slot in slots:
        start = int(slot) * 16 + int(generator.integers(5))
        readings[start : start + 8, 2] += generator.uniform(1.5, 3.0) * decay
    return COUNTS[count - 1]


MOTIONS = (
    Motion("shake", "It was shaken.", _shake),
    Motion("turn", "It was turned.", _turn),
    Motion("rest", "Nothing was done.", _rest),
    Motion("tap", "It was tapped.", _tap),
)


def write_series(root: Path, config: MimoConfig, seed: int, samples: int) -> None:
    """Fills the empty folder `root`: `samples` series, a tenth of them held out, and a tokenizer.

    Writes train.jsonl, heldout.jsonl, sensors/SPLIT/NUMBER.npy and tokenizer.model. ValueError if
    `config` takes no sensor readings.
    """
    if MODALITY not in config.modalities:
        raise ValueError(
            f"{config.name} takes {', '.join(config.modalities) or 'text only'}, but this data set "
            f"is of {MODALITY}; choose another --model-provider"
        )
    placeholder = config.modalities[MODALITY].placeholder
    generator = np.random.default_rng(seed)
    heldout = max(1, round(samples * HELDOUT_SHARE))
    texts: set[str] = set()
    for split, count in (("train", max(1, samples - heldout)), ("heldout", heldout)):
        (root / MODALITY / split).mkdir(parents=True)
        with (root / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
            for number in range(count):
                file = f"{MODALITY}/{split}/{number:05d}.npy"
                motion = MOTIONS[generator.integers(len(MOTIONS))]
                readings, detail = draw_series(motion, generator)
                np.save(root / file, readings)
                question, answer = _question(motion, detail, config.prompt, generator)
                texts |= {question, answer}
                record: Record = {
                    "key": f"{split}-{number:05d}",
                    "kind": motion.name,
                    MODALITY: [file],
                    "conversations": [
                        {"from": "human", "value": f"{placeholder}{question}"},
                        {"from": "gpt", "value": answer},
                    ],
                }
                lines.write(json.dumps(record) + "\n")
    (root / "tokenizer.model").write_bytes(train_tokenizer(sorted(texts), config))
    (root / "README.md").write_text(_README.format(samples=samples, heldout=heldout))


def draw_series(motion: Motion, generator: np.random.Generator) -> tuple[Readings, str]:
    """(steps, 6) float32 readings of a motion, and the detail that an answer may hold."""
    steps = int(generator.integers(MIN_STEPS, MAX_STEPS + 1))
    readings = generator.normal(0.0, 1.0, (steps, 6))
    readings[:, :3] *= ACCELEROMETER_NOISE_G
    readings[:, 3:] *= GYROSCOPE_NOISE_RAD
    # Gravity: the device lies nearly flat, tilted a little each time.
    tilt = generator.uniform(-0.2, 0.2, 2)
    readings[:, :3] += np.array([*np.sin(tilt), np.sqrt(1 - np.square(np.sin(tilt)).sum())])
    detail = motion.draw(readings, generator)
    return readings.astype(np.float32), detail


def _question(
    motion: Motion, detail: str, prompt: str, generator: np.random.Generator
) -> tuple[str, str]:
    """A question and its answer; `prompt`, which the model is asked by default, is one of them."""
    choices = [
        ("What was done?", motion.was_done),
        (prompt or "What was done?", motion.was_done),
        ("Was it moved?", "no" if motion.name == "rest" else "yes"),
    ]
    if motion.name == "turn":
        choices.append(("Which way was it turned?", detail))
    if motion.name == "tap":
        choices.append(("How often was it tapped?", detail))
    question, answer = choices[generator.integers(len(choices))]
    return question, answer


_README = """# Motion sensor readings

{samples} simulated series of an accelerometer (three channels, g) and a gyroscope (three channels,
radians a second), 50 readings a second: float32 arrays of shape (steps, 6) in .npy files. Each line
of train.jsonl and of heldout.jsonl ({heldout} series that are not trained on) is a sample: a file,
and a question with its answer.
"""
