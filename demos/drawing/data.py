"""Writes the data: someone says a number, and the answer is its name and a drawing of it.

python -m demos.drawing.data --output drawing-demo/data

Pictures are scikit-learn's 1,797 real handwritten digits of 8 x 8 pixels, voices eSpeak NG's; every
fifth of either is held out, as in the demo about digits.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from demos.digits.questions import NUMBERS
from demos.digits.speech import Synthesiser
from demos.digits.spoken_questions import SAMPLE_RATE_HZ, SPLITS, say, split_voices
from demos.drawing.model import drawing_lm
from examples.mimo.checkpoint.description import DatasetModel
from examples.mimo.cli import command
from examples.mimo.configs import with_codec_folder
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import train_tokenizer
from examples.mimo.modalities.codebook import Codebook, k_means

MODEL = "demos.drawing.model:drawing_lm"
WORDINGS = ("{}.", "Draw {}.", "Please draw {}.", "Can you draw {}?", "I would like {}.")
TAKES = {"train": 3, "heldout": 2}
# So often a question is written, not spoken.
WRITTEN_SHARE = 0.15

Progress = Callable[[str, int, int], None]
Record = dict[str, Any]


class Take(NamedTuple):
    """A recording, and what is said in it."""

    file: str
    digit: int
    words: str


# The files of a split.
Pictures = dict[int, list[str]]
Takes = dict[int, list[Take]]


def write_drawings(
    root: Path,
    seed: int = 0,
    samples: int = 24_000,
    voices: int | None = None,
    progress: Progress = lambda name, done, total: None,
) -> None:
    """Fills the empty folder `root`; one seed writes the same files.

    train.jsonl has so many `samples`, and align.jsonl half as many. `voices` of them are used, all
    when None.
    """
    generator = np.random.default_rng(seed)
    config = with_codec_folder(drawing_lm(), root)
    pictures = _write_pictures(root, config)
    takes = _write_speech(root, voices, generator, progress)
    train = pictures["train"], takes["train"]
    records = {
        "align": [_transcript(takes["train"], generator) for _ in range(samples // 2)],
        "train": [_request(*train, generator) for _ in range(samples)],
        # Every recording once.
        "heldout": [
            _record([take.file], "<audio>", take.digit, picture)
            for of_digit in takes["heldout"].values()
            for take in of_digit
            for picture in [_any(pictures["heldout"][take.digit], generator)]
        ],
    }
    texts = []
    for split, lines in records.items():
        with (root / f"{split}.jsonl").open("w") as file:
            for number, line in enumerate(lines):
                texts += [turn["value"] for turn in line["conversations"]]
                file.write(json.dumps({"key": f"{split}-{number:05d}", **line}) + "\n")
    (root / "tokenizer.model").write_bytes(train_tokenizer(texts, config))
    (root / "README.md").write_text(_README)
    DatasetModel(MODEL).write(root)


def _write_pictures(root: Path, config: MimoConfig) -> dict[str, Pictures]:
    """The real digits, black on white, and the patches that a codec learns from those of train."""
    from sklearn.datasets import load_digits

    codec: Any = config.outputs["drawings"].codec
    digits = load_digits()
    pictures: dict[str, Pictures] = {split: {digit: [] for digit in range(10)} for split in SPLITS}
    for split in SPLITS:
        (root / "drawings" / split).mkdir(parents=True)
    patches = []
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = SPLITS[index % 5 == 0]
        file = f"drawings/{split}/{index:04d}.png"
        codec.save(pixels / 16, root / file)
        pictures[split][int(digit)].append(file)
        if split == "train":
            patches.append(codec.patches(pixels / 16))
    centroids = k_means(np.concatenate(patches), codec.num_codes)
    Codebook(centroids).write(Path(codec.folder, codec.files[0]))
    return pictures


def _write_speech(
    root: Path, voices: int | None, generator: np.random.Generator, progress: Progress
) -> dict[str, Takes]:
    import soundfile

    synthesiser = Synthesiser(SAMPLE_RATE_HZ)
    takes: dict[str, Takes] = {split: {digit: [] for digit in range(10)} for split in SPLITS}
    for split in SPLITS:
        (root / "audios" / split).mkdir(parents=True)
    variants = split_voices(synthesiser)[:voices]
    for number, (variant, split) in enumerate(variants):
        for digit, take in itertools.product(range(10), range(TAKES[split])):
            words = _words(digit, generator)
            sound = say(synthesiser, words, variant, generator)
            file = f"audios/{split}/{digit}-{variant.replace(' ', '_')}-{take}.flac"
            soundfile.write(root / file, sound, SAMPLE_RATE_HZ)
            takes[split][digit].append(Take(file, digit, words))
        progress("voices", number + 1, len(variants))
    return takes


def _words(digit: int, generator: np.random.Generator) -> str:
    wording = _any(WORDINGS, generator)
    article = "" if wording == WORDINGS[0] else "an " if digit == 8 else "a "
    text = wording.format(article + NUMBERS[digit])
    return text[0].upper() + text[1:]


def _transcript(takes: Takes, generator: np.random.Generator) -> Record:
    """A recording to write down, from which the model learns to hear."""
    take = _any(takes[int(generator.integers(10))], generator)
    return _turns("<audio>Write it down.", take.words, audios=[take.file])


def _request(pictures: Pictures, takes: Takes, generator: np.random.Generator) -> Record:
    """A number to draw, spoken or written."""
    digit = int(generator.integers(10))
    picture = _any(pictures[digit], generator)
    if generator.random() < WRITTEN_SHARE:
        return _record([], _words(digit, generator), digit, picture)
    return _record([_any(takes[digit], generator).file], "<audio>", digit, picture)


def _record(audios: list[str], question: str, digit: int, picture: str) -> Record:
    turns = _turns(question, f"{NUMBERS[digit]} <drawing>", audios=audios, drawings=[picture])
    return {"digit": digit, **turns}


def _turns(question: str, answer: str, **files: list[str]) -> Record:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**files, "conversations": turns}


def _any[T](items: Sequence[T], generator: np.random.Generator) -> T:
    return items[int(generator.integers(len(items)))]


_README = """# Draw the number you hear

Each line of `train.jsonl` and `heldout.jsonl` is a sample: a recording that says a number, or the
words, and the number's name with a drawing of it. Those of `align.jsonl` are recordings with their
transcripts. `codecs/drawings` holds the patches of drawings.

Pictures: "Optical recognition of handwritten digits" (E. Alpaydin, C. Kaynak, UCI), as scikit-learn
carries it; the split is by index, so a writer may be on both sides. Speech: synthesised with eSpeak
NG (GPL-3.0), whose output is free of that licence.
"""


def main() -> None:
    """Parses the command line and writes the folder."""
    parser = command.Parser(prog="python -m demos.drawing.data", description="Write the data.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--seed", type=command.at_least(0), default=0, help="default %(default)s")
    args = parser.parse_args()
    output: Path = args.output
    if output.exists():
        raise ValueError(f"--output {output}: exists; name a new folder, or remove it")
    draft = output.with_name(f".{output.name}.draft")
    draft.mkdir(parents=True)
    write_drawings(draft, args.seed, progress=command.ProgressBar().step)
    draft.rename(output)


if __name__ == "__main__":
    command.run("demos.drawing.data", main)
