"""Writes the demo's data: PNG, FLAC and JSON lines that a person can open.

Pictures are scikit-learn's 1,797 real handwritten digits of 8 x 8 pixels, enlarged; every fifth
is held out. Voices are eSpeak NG's variants; every fifth is held out whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demos.digits.questions import KINDS, NUMBERS, PROMPT, Kind, question_pairs
from demos.digits.speech import Synthesiser
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import train_tokenizer

SAMPLE_RATE_HZ = 16_000
MAX_SECONDS = 2.3
PICTURE_SIDE = 64
SPLITS = ("train", "heldout")
WORDS_PER_MINUTE = (150, 215)
PITCH = (20, 80)
TRAIN_TAKES, HELD_OUT_TAKES = 3, 2
# Whispering and distorted variants, which people do not understand either.
LEFT_OUT_VARIANTS = ("whisper", "whisperf", "Demonic", "AnxiousAndy", "Marco", "croak")

WRITTEN_TURNS = 2
# "spoken" questions are about a picture; in "written" ones words stand in for the recording, in
# "words" for both. "name" and "transcribe" ask for those words.
ALIGN_MIXTURE = {"name": 0.45, "transcribe": 0.4, "words": 0.15}
TRAIN_MIXTURE = {"spoken": 0.7, "name": 0.09, "transcribe": 0.07, "written": 0.08, "words": 0.06}

Progress = Callable[[str, int, int], None]
Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How many lines each file gets; `voices` of the variants are used, all when None."""

    align: int = 24_000
    train: int = 48_000
    heldout: int = 640
    heldout_pairs: int = 320
    voices: int | None = None


@dataclass
class Stock:
    """The files samples are drawn from, by split: pictures by digit, recordings by question."""

    pictures: dict[str, dict[int, list[str]]]
    takes: dict[str, dict[str, list[str]]]


def write_spoken_questions(
    root: Path, config: MimoConfig, seed: int, sizes: Sizes, progress: Progress
) -> None:
    """Fills the empty folder `root` with data for `config`; one seed writes the same samples."""
    generator = np.random.default_rng(seed)
    stock = Stock(
        pictures=_write_pictures(root), takes=_write_speech(root, sizes.voices, generator, progress)
    )
    texts: list[str] = []  # as often as they occur, so that frequent ones take few tokens
    plans = {
        "align": (sizes.align, lambda: _mixed(stock, ALIGN_MIXTURE, generator)),
        "train": (sizes.train, lambda: _mixed(stock, TRAIN_MIXTURE, generator)),
        "heldout": (sizes.heldout, lambda: _held_out(stock, False, generator)),
        "heldout_pairs": (sizes.heldout_pairs, lambda: _held_out(stock, True, generator)),
    }
    for name, (count, draw) in plans.items():
        progress(f"{name}.jsonl", 0, 1)
        with (root / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                record = {"key": f"{name}-{number:06d}", **draw()}
                texts.extend(turn["value"] for turn in record["conversations"])
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        progress(f"{name}.jsonl", 1, 1)
    (root / "tokenizer.model").write_bytes(train_tokenizer(texts, config))
    _write_readme(root, sizes)


def _write_pictures(root: Path) -> dict[str, dict[int, list[str]]]:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures: dict[str, dict[int, list[str]]] = {
        split: {digit: [] for digit in range(10)} for split in SPLITS
    }
    for split in SPLITS:
        (root / "images" / split).mkdir(parents=True)
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = SPLITS[index % 5 == 0]
        file = f"images/{split}/{index:04d}.png"
        picture = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        picture.resize((PICTURE_SIDE,) * 2, Image.Resampling.BICUBIC).save(root / file)
        pictures[split][int(digit)].append(file)
    return pictures


def _write_speech(
    root: Path, voices: int | None, generator: np.random.Generator, progress: Progress
) -> dict[str, dict[str, list[str]]]:
    import soundfile

    synthesiser = Synthesiser(SAMPLE_RATE_HZ)
    variants = [v for v in synthesiser.variants() if v not in LEFT_OUT_VARIANTS]
    variants = variants[:voices]
    takes: dict[str, dict[str, list[str]]] = {
        split: {kind.name: [] for kind in KINDS} for split in SPLITS
    }
    for split in SPLITS:
        (root / "audios" / split).mkdir(parents=True)
    for number, variant in enumerate(variants):
        split = SPLITS[number % 5 == 0]
        for kind in KINDS:
            for take in range(HELD_OUT_TAKES if split == "heldout" else TRAIN_TAKES):
                sound = _say(synthesiser, kind.wording, variant, generator)
                file = f"audios/{split}/{kind.name}-{variant.replace(' ', '_')}-{take}.flac"
                soundfile.write(root / file, sound, SAMPLE_RATE_HZ)
                takes[split][kind.name].append(file)
        progress("voices", number + 1, len(variants))
    return takes


def _say(
    synthesiser: Synthesiser, text: str, variant: str, generator: np.random.Generator
) -> np.ndarray:
    """One take at a random rate and pitch, quicker if it would not fit the window."""
    rate, pitch = int(generator.integers(*WORDS_PER_MINUTE)), int(generator.integers(*PITCH))
    sound = synthesiser.say(text, variant, words_per_minute=rate, pitch=pitch)
    while len(sound) > MAX_SECONDS * SAMPLE_RATE_HZ:
        rate += 20
        sound = synthesiser.say(text, variant, words_per_minute=rate, pitch=pitch)
    return sound * np.float32(0.7 / np.abs(sound).max())


def _mixed(stock: Stock, mixture: dict[str, float], generator: np.random.Generator) -> Record:
    task = str(generator.choice(list(mixture), p=list(mixture.values())))
    digit = int(generator.integers(10))
    if task == "name":
        picture = _draw(stock.pictures["train"][digit], generator)
        turns = [("<image>Name the digit.", NUMBERS[digit])]
        return _record(task, None, digit, turns, images=[picture])
    if task == "transcribe":
        kind = KINDS[generator.integers(len(KINDS))]
        take = _draw(stock.takes["train"][kind.name], generator)
        return _record(task, kind, None, [("<audio>Write it down.", kind.wording)], audios=[take])
    if task == "words":
        # The questions about a digit follow one another, which fills a batch's shorter samples.
        kinds = [KINDS[i] for i in generator.permutation(len(KINDS))[:WRITTEN_TURNS]]
        turns = [(f"{kind.wording} {PROMPT}", kind.answer(digit)) for kind in kinds]
        turns[0] = (f"Digit {NUMBERS[digit]}. {turns[0][0]}", turns[0][1])
        return _record(task, kinds[-1], digit, turns)
    return _asked(task, stock, "train", question_pairs(held_out=False), generator)


def _held_out(stock: Stock, pairs: bool, generator: np.random.Generator) -> Record:
    return _asked("spoken", stock, "heldout", question_pairs(pairs), generator)


def _asked(
    task: str,
    stock: Stock,
    split: str,
    pairs: list[tuple[Kind, int]],
    generator: np.random.Generator,
) -> Record:
    """A question of `pairs` about a picture, spoken or written."""
    kind, digit = pairs[generator.integers(len(pairs))]
    asked, media = f"{kind.wording} ", {"images": [_draw(stock.pictures[split][digit], generator)]}
    if task == "spoken":
        asked, media["audios"] = "<audio>", [_draw(stock.takes[split][kind.name], generator)]
    turns = [(f"<image>{asked}{PROMPT}", kind.answer(digit))]
    return _record(task, kind, digit, turns, **media)


def _draw(files: list[str], generator: np.random.Generator) -> str:
    return files[generator.integers(len(files))]


def _record(
    task: str,
    kind: Kind | None,
    digit: int | None,
    turns: list[tuple[str, str]],
    **media: list[str],
) -> Record:
    return {
        "task": task,
        "kind": kind.name if kind else None,
        "digit": digit,
        "images": media.get("images", []),
        "audios": media.get("audios", []),
        "conversations": [
            {"from": speaker, "value": text}
            for turn in turns
            for speaker, text in zip(("human", "gpt"), turn, strict=True)
        ],
    }


def _write_readme(root: Path, sizes: Sizes) -> None:
    (root / "README.md").write_text(_README.format(s=sizes, kinds=_kinds_table()), encoding="utf-8")


def _kinds_table() -> str:
    return "\n".join(f"| {k.name} | {k.wording} | {k.answer(7)} |" for k in KINDS)


_README = """# Spoken questions about handwritten digits

Each line of a `.jsonl` file is a sample: pictures and recordings by file name, and turns.

| file | lines | what |
| --- | --- | --- |
| align.jsonl | {s.align} | name the picture; transcribe the recording; answers in words alone |
| train.jsonl | {s.train} | spoken questions, with the same helper tasks mixed in |
| heldout.jsonl | {s.heldout} | spoken questions, unseen pictures and unheard voices |
| heldout_pairs.jsonl | {s.heldout_pairs} | the same for (question, digit) pairs never trained on |

| kind | what is said | answer for a seven |
| --- | --- | --- |
{kinds}

Pictures: "Optical recognition of handwritten digits" (E. Alpaydin, C. Kaynak, UCI), as scikit-learn
carries it; the split is by index, so a writer may be on both sides. Speech: synthesised with eSpeak
NG (GPL-3.0), whose output is free of that licence.
"""
