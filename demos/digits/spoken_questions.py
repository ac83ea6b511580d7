"""Writes the demo's data: PNG, FLAC and JSON lines that a person can open.

Pictures are scikit-learn's 1,797 real handwritten digits of 8 x 8 pixels, enlarged; every fifth
is held out. Voices are eSpeak NG's variants; every fifth is held out whole. For a model that has
an output of speech one more voice, the narrator, says the answers to some questions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demos.digits.questions import (
    ALOUD_PROMPT,
    KINDS,
    NUMBERS,
    PROMPT,
    Kind,
    SpokenAnswer,
    question_pairs,
    spoken_answers,
)
from demos.digits.speech import Synthesiser
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import train_tokenizer
from examples.mimo.modalities.speech import VectorQuantisedMel

SAMPLE_RATE_HZ = 16_000
MAX_SECONDS = 2.3
PICTURE_SIDE = 64
SPLITS = ("train", "heldout")
WORDS_PER_MINUTE = (150, 215)
PITCH = (20, 80)
TRAIN_TAKES, HELD_OUT_TAKES = 3, 2
# Whispering and distorted variants, which people do not understand either.
LEFT_OUT_VARIANTS = ("whisper", "whisperf", "Demonic", "AnxiousAndy", "Marco", "croak")

NARRATOR, NARRATOR_WORDS_PER_MINUTE = "Annie", 150

WRITTEN_TURNS, HEARD_TURNS = 2, 3
# "spoken" questions are about a picture; in "written" ones words stand in for the recording, in
# "words" for both. "name" and "transcribe" ask for those words.
MIXTURES = {
    "align": {"name": 0.45, "transcribe": 0.4, "words": 0.15},
    "train": {"spoken": 0.7, "name": 0.09, "transcribe": 0.07, "written": 0.08, "words": 0.06},
}
# For a model that speaks: "aloud" are spoken questions with a spoken answer, "read" asks for the
# speech of an answer that is given, and "hear" for the text of that speech.
SPEAKING_MIXTURES = {
    "align": {"name": 0.36, "transcribe": 0.29, "words": 0.1, "read": 0.08, "hear": 0.17},
    "train": {"spoken": 0.66, "aloud": 0.04, "name": 0.08, "transcribe": 0.05, "written": 0.08}
    | {"words": 0.04, "read": 0.01, "hear": 0.04},
}
LANGUAGES = {"en": "English", "fr": "French", "de": "German", "es": "Spanish"}
SPEECH = "<speech>"
HEAR_PROMPT = "<audio>Write it down."

Progress = Callable[[str, int, int], None]
Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How many lines each file gets; `voices` of the variants are used, all when None."""

    align: int = 24_000
    train: int = 48_000
    heldout: int = 640
    heldout_pairs: int = 320
    heldout_aloud: int = 320
    voices: int | None = None


@dataclass
class Stock:
    """The files samples are drawn from, by split: pictures by digit, recordings by question."""

    pictures: dict[str, dict[int, list[str]]]
    takes: dict[str, dict[str, list[str]]]
    answers: list[SpokenAnswer]


def write_spoken_questions(
    root: Path, config: MimoConfig, seed: int, sizes: Sizes, progress: Progress
) -> None:
    """Fills the empty folder `root` with data for `config`; one seed writes the same samples.

    ValueError if `config` does not take images and audios, or speaks with another codec.
    """
    if missing := {"images", "audios"} - config.inputs.keys():
        raise ValueError(
            f"{config.name} takes no {' and no '.join(sorted(missing))}, which this data set has; "
            "choose another --model-provider"
        )
    generator = np.random.default_rng(seed)
    synthesiser = Synthesiser(SAMPLE_RATE_HZ)
    pictures = _write_pictures(root)
    takes = _write_speech(root, synthesiser, sizes.voices, generator, progress)
    stock, mixtures = Stock(pictures, takes, answers=[]), MIXTURES
    if "speech" in config.outputs:
        stock.answers, mixtures = _write_answers(root, synthesiser, config), SPEAKING_MIXTURES
    texts: list[str] = []  # as often as they occur, so that frequent ones take few tokens
    plans = {
        "align": (sizes.align, lambda: _mixed(stock, mixtures["align"], generator)),
        "train": (sizes.train, lambda: _mixed(stock, mixtures["train"], generator)),
        "heldout": (sizes.heldout, lambda: _held_out("spoken", stock, False, generator)),
        "heldout_pairs": (sizes.heldout_pairs, lambda: _held_out("spoken", stock, True, generator)),
        "heldout_aloud": (sizes.heldout_aloud, lambda: _held_out("aloud", stock, False, generator)),
    }
    if not stock.answers:
        del plans["heldout_aloud"]
    for name, (count, draw) in plans.items():
        progress(f"{name}.jsonl", 0, 1)
        with (root / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                record = {"key": f"{name}-{number:06d}", **draw()}
                turns = [turn["value"] for turn in record["conversations"]]
                texts.extend(text.removesuffix(SPEECH) for text in turns)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        progress(f"{name}.jsonl", 1, 1)
    (root / "tokenizer.model").write_bytes(train_tokenizer(texts, config))
    aloud = _README_ALOUD.format(s=sizes) if stock.answers else ""
    readme = _README.format(s=sizes, kinds=_kinds_table(), aloud=aloud)
    (root / "README.md").write_text(readme, encoding="utf-8")


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
    root: Path,
    synthesiser: Synthesiser,
    voices: int | None,
    generator: np.random.Generator,
    progress: Progress,
) -> dict[str, dict[str, list[str]]]:
    """Every question in every voice, by split and kind."""
    import soundfile

    takes: dict[str, dict[str, list[str]]] = {
        split: {kind.name: [] for kind in KINDS} for split in SPLITS
    }
    for split in SPLITS:
        (root / "audios" / split).mkdir(parents=True)
    variants = split_voices(synthesiser, but=NARRATOR)[:voices]
    for number, (variant, split) in enumerate(variants):
        for kind in KINDS:
            for take in range(HELD_OUT_TAKES if split == "heldout" else TRAIN_TAKES):
                sound = say(synthesiser, kind.wording, variant, generator)
                file = f"audios/{split}/{kind.name}-{variant.replace(' ', '_')}-{take}.flac"
                soundfile.write(root / file, sound, SAMPLE_RATE_HZ)
                takes[split][kind.name].append(file)
        progress("voices", number + 1, len(variants))
    return takes


def _write_answers(root: Path, synthesiser: Synthesiser, config: MimoConfig) -> list[SpokenAnswer]:
    """Every answer as the narrator says it, and a codec of that voice."""
    import soundfile

    (root / "answers").mkdir()
    answers, sounds = spoken_answers(), []
    for answer in answers:
        rate = NARRATOR_WORDS_PER_MINUTE
        sound = synthesiser.say(answer.words, NARRATOR, answer.language, words_per_minute=rate)
        sounds.append(sound * np.float32(0.7 / np.abs(sound).max()))
        soundfile.write(root / answer.file, sounds[-1], SAMPLE_RATE_HZ)
    folder = root / "codecs" / "speech"
    folder.mkdir(parents=True)
    codec = config.outputs["speech"].codec
    if not isinstance(codec, VectorQuantisedMel):
        raise ValueError(
            f"{config.name} speaks with a {type(codec).__name__}; this data set learns a "
            "VectorQuantisedMel"
        )
    dataclasses.replace(codec, folder=str(folder)).learn(sounds)
    return answers


def split_voices(synthesiser: Synthesiser, but: str = "") -> list[tuple[str, str]]:
    """The names of the voices that people understand, `but` one, each with its split."""
    left_out = (*LEFT_OUT_VARIANTS, but)
    names = [name for name in synthesiser.variants() if name not in left_out]
    return [(name, SPLITS[number % 5 == 0]) for number, name in enumerate(names)]


def say(
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
        return _record(task, kind, None, [(HEAR_PROMPT, kind.wording)], audios=[take])
    if task == "words":
        # The questions about a digit follow one another, which fills a batch's shorter samples.
        kinds = [KINDS[i] for i in generator.permutation(len(KINDS))[:WRITTEN_TURNS]]
        turns = [(f"{kind.wording} {PROMPT}", kind.answer(digit)) for kind in kinds]
        turns[0] = (f"Digit {NUMBERS[digit]}. {turns[0][0]}", turns[0][1])
        return _record(task, kinds[-1], digit, turns)
    if task == "hear":
        heard = [_draw(stock.answers, generator) for _ in range(HEARD_TURNS)]
        turns = [(HEAR_PROMPT, answer.text) for answer in heard]
        return _record(task, None, None, turns, audios=[answer.file for answer in heard])
    if task == "read":
        answer = _draw(stock.answers, generator)
        turns = [(f"Read in {LANGUAGES[answer.language]}: {answer.text}", SPEECH)]
        return _record(task, None, None, turns, speech=[answer.file])
    return _asked(task, stock, "train", question_pairs(held_out=False), generator)


def _held_out(task: str, stock: Stock, pairs: bool, generator: np.random.Generator) -> Record:
    record = _asked(task, stock, "heldout", question_pairs(pairs), generator)
    return record | ({"hear_prompt": HEAR_PROMPT} if task == "aloud" else {})


def _asked(
    task: str,
    stock: Stock,
    split: str,
    pairs: list[tuple[Kind, int]],
    generator: np.random.Generator,
) -> Record:
    """A question of `pairs` about a picture, spoken or written, to be answered aloud or not."""
    kind, digit = pairs[generator.integers(len(pairs))]
    asked, media = f"{kind.wording} ", {"images": [_draw(stock.pictures[split][digit], generator)]}
    if task != "written":
        asked, media["audios"] = "<audio>", [_draw(stock.takes[split][kind.name], generator)]
    prompt, answer = PROMPT, kind.answer(digit)
    if task == "aloud":
        media["speech"] = [SpokenAnswer(answer, kind.language).file]
        prompt, answer = ALOUD_PROMPT, f"{answer}{SPEECH}"
    turns = [(f"<image>{asked}{prompt}", answer)]
    return _record(task, kind, digit, turns, **media)


def _draw[T](items: list[T], generator: np.random.Generator) -> T:
    return items[generator.integers(len(items))]


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
        "images": [],
        "audios": [],
        **media,
        "conversations": [
            {"from": speaker, "value": text}
            for turn in turns
            for speaker, text in zip(("human", "gpt"), turn, strict=True)
        ],
    }


def _kinds_table() -> str:
    return "\n".join(f"| {k.name} | {k.wording} | {k.answer(7)} |" for k in KINDS)


_README_ALOUD = """\
| heldout_aloud.jsonl | {s.heldout_aloud} | as heldout.jsonl, to be answered aloud |

`answers` holds the spoken answers, of one voice that asks nothing, and `codecs/speech` the
centroids of the codec that was learned from them.
"""
_README = """# Spoken questions about handwritten digits

Each line of a `.jsonl` file is a sample: pictures and recordings by file name, and turns.

| file | lines | what |
| --- | --- | --- |
| align.jsonl | {s.align} | name the picture; transcribe the recording; answers in words alone |
| train.jsonl | {s.train} | spoken questions, with the same helper tasks mixed in |
| heldout.jsonl | {s.heldout} | spoken questions, unseen pictures and unheard voices |
| heldout_pairs.jsonl | {s.heldout_pairs} | the same for (question, digit) pairs never trained on |
{aloud}
| kind | what is said | answer for a seven |
| --- | --- | --- |
{kinds}

Pictures: "Optical recognition of handwritten digits" (E. Alpaydin, C. Kaynak, UCI), as scikit-learn
carries it; the split is by index, so a writer may be on both sides. Speech: synthesised with eSpeak
NG (GPL-3.0), whose output is free of that licence.
"""
