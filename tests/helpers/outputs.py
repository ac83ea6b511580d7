"""A model that answers aloud: `--model-provider tests.helpers.outputs:with_speech`."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soundfile

from examples.mimo.configs import get_model_config, with_codec_folder
from examples.mimo.configs.schema import MimoConfig, ModalityConfig
from examples.mimo.configs.tiny_avlm import tiny_avlm
from examples.mimo.modalities.files import Source, read_audio
from examples.mimo.modalities.speech import SoundCodec

RATE_HZ = 16_000
FRAME = 320  # 20 ms
SPEECH = "tests.helpers.outputs:with_speech"


@dataclass(frozen=True)
class LevelCodec(SoundCodec):
    """The mean of every 20 ms in two codes, of its `base` squared levels: its digits."""

    base: int = 8

    files: ClassVar[tuple[str, ...]] = ("scale.json",)
    origin: ClassVar[str] = "tests write it"
    suffixes: ClassVar[tuple[str, ...]] = (".flac", ".wav")
    unit: ClassVar[int] = 2

    @property
    def num_codes(self) -> int:
        return 2 * self.base

    def allowed(self, position: int) -> range:
        first = self.base * (position % 2)
        return range(first, first + self.base)

    @property
    def scale(self) -> float:
        return json.loads((Path(self.folder) / "scale.json").read_text())["scale"]

    def read(self, source: Source) -> np.ndarray:
        return read_audio(source, sample_rate_hz=RATE_HZ, max_seconds=2.0)

    def encode(self, raw: np.ndarray) -> list[int]:
        frames = np.pad(raw, (0, -len(raw) % FRAME)).reshape(-1, FRAME).mean(1) / self.scale
        most, base = self.base**2 - 1, self.base
        levels = np.clip(np.round((frames + 1) / 2 * most), 0, most).astype(int).tolist()
        return [code for level in levels for code in (level // base, base + level % base)]

    def decode(self, codes: Sequence[int]) -> np.ndarray:
        self.check_codes(codes)
        levels = self.base * np.array(codes[::2]) + np.array(codes[1::2]) - self.base
        frames = self.scale * (2 * levels / (self.base**2 - 1) - 1)
        return frames.repeat(FRAME).astype(np.float32)

    def decode_pieces(self, codes: Iterable[int]) -> Iterator[np.ndarray]:
        for pair in itertools.batched(codes, 2):
            yield self.decode(pair)

    def save(self, raw: Any, path: Path) -> None:
        if path.suffix.lower() not in self.suffixes:
            raise ValueError(f"{path}: speech is written as {' or '.join(self.suffixes)}")
        soundfile.write(path, raw, RATE_HZ)


def with_speech() -> MimoConfig:
    """`tiny_avlm` with an output that it takes no file of."""
    speech = ModalityConfig(singular="speech", placeholder="<speech>", codec=LevelCodec())
    base = tiny_avlm()
    return dataclasses.replace(base, name=SPEECH, modalities={**base.modalities, "speech": speech})


def with_spoken_audios() -> MimoConfig:
    """`tiny_avlm` whose sound goes in and out."""
    base = tiny_avlm()
    audios = dataclasses.replace(base.modalities["audios"], codec=LevelCodec())
    return dataclasses.replace(
        base,
        name="tests.helpers.outputs:with_spoken_audios",
        modalities={**base.modalities, "audios": audios},
    )


def with_learned_voice(root: Path) -> MimoConfig:
    """The demo's model, with a codec of noises in a data folder."""
    (root / "codecs/speech").mkdir(parents=True)
    config = with_codec_folder(get_model_config("tiny_avlm_speech"), root)
    noises = np.random.default_rng(0).normal(size=(40, RATE_HZ)).astype(np.float32)
    config.outputs["speech"].codec.learn(noises * np.linspace(0.01, 0.3, RATE_HZ, dtype=np.float32))
    return config


def write_codec(root: Path, name: str = "speech") -> None:
    """The codec's file in a data folder."""
    folder = root / "codecs" / name
    folder.mkdir(parents=True)
    (folder / "scale.json").write_text('{"scale": 0.5}')


def write_wave(path: Path, *levels: float) -> None:
    """A file of frames with these means."""
    soundfile.write(path, np.repeat(np.float32(levels), FRAME), RATE_HZ, subtype="FLOAT")


def record(number: int) -> dict[str, Any]:
    """Sample `number` of the data folder that `write_data` makes."""
    turns = [
        {"from": "human", "value": f"What is {number}?"},
        {"from": "gpt", "value": f"It is {number}. <speech>"},
    ]
    return {"key": f"k{number}", "speech": [f"{number}.wav"], "conversations": turns}


def write_data(root: Path, num_samples: int = 24) -> None:
    """A manifest with an answer aloud a line, its files and the codec."""
    write_codec(root)
    generator = np.random.default_rng(0)
    with (root / "train.jsonl").open("w") as lines:
        for number in range(num_samples):
            write_wave(root / f"{number}.wav", *generator.uniform(-0.5, 0.5, 1 + number % 5))
            lines.write(json.dumps(record(number)) + "\n")
