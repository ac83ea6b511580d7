"""python -m tests.helpers.spoken_shapes DIR: a manifest of spoken questions about drawn shapes.

Pictures and questions are easy-VQA's, the voices eSpeak NG's. Samples have one to three turns, and
a question is spoken or written, so that they differ in length.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from demos.digits.speech import Synthesiser
from examples.mimo.configs import get_model_config
from examples.mimo.data.tokenizer import train_tokenizer

SAMPLE_RATE_HZ = 16_000
MAX_SECONDS = 2.3
VOICES = 4
SPOKEN = 0.6
VOCABULARY_SIZE = 400
TURNS = (0.5, 0.3, 0.2)


def write(root: Path, samples: int = 5_000, seed: int = 0) -> Path:
    """Fill the empty folder `root`; the path of its manifest."""
    import easy_vqa

    generator = np.random.default_rng(seed)
    by_picture = _questions(easy_vqa)
    voices = _speak(root, sorted({q for pairs in by_picture.values() for q, _ in pairs}))
    paths = easy_vqa.get_train_image_paths()
    chosen = generator.permutation(sorted(by_picture))
    (root / "images").mkdir()
    manifest = root / "manifest.jsonl"
    with manifest.open("w", encoding="utf-8") as lines:
        for number in range(samples):
            picture = int(chosen[number % len(chosen)])
            file = f"images/{picture}.png"
            if not (root / file).exists():
                shutil.copy(paths[picture], root / file)
            record = _record(by_picture[picture], file, voices, generator)
            lines.write(json.dumps({"key": f"shape-{number:05d}", **record}) + "\n")
    texts = [text for pairs in by_picture.values() for pair in pairs for text in pair]
    model = train_tokenizer(
        sorted({f"{text}\n" for text in texts}), get_model_config("tiny_avlm"), VOCABULARY_SIZE
    )
    (root / "tokenizer.model").write_bytes(model)
    return manifest


def _questions(easy_vqa: Any) -> dict[int, list[tuple[str, str]]]:
    result: dict[int, list[tuple[str, str]]] = {}
    for question, answer, picture in zip(*easy_vqa.get_train_questions(), strict=True):
        result.setdefault(picture, []).append((question, answer))
    return result


def _speak(root: Path, questions: list[str]) -> dict[str, list[str]]:
    """The recordings of each question that the demo's window holds."""
    import soundfile

    synthesiser = Synthesiser(SAMPLE_RATE_HZ)
    (root / "audios").mkdir(parents=True)
    files: dict[str, list[str]] = {}
    for number, question in enumerate(questions):
        for voice in synthesiser.variants()[:VOICES]:
            rate, sound = 170, np.zeros(0)
            while not len(sound) or len(sound) > MAX_SECONDS * SAMPLE_RATE_HZ:
                rate += 20
                sound = synthesiser.say(question, voice, words_per_minute=rate)
            file = f"audios/{number:03d}-{voice.replace(' ', '_')}.flac"
            soundfile.write(root / file, sound * (0.7 / np.abs(sound).max()), SAMPLE_RATE_HZ)
            files.setdefault(question, []).append(file)
    return files


def _record(
    pairs: list[tuple[str, str]],
    picture: str,
    voices: dict[str, list[str]],
    generator: np.random.Generator,
) -> dict[str, Any]:
    turns, audios = [], []
    count = 1 + int(generator.choice(len(TURNS), p=TURNS))
    for number in range(count):
        question, answer = pairs[int(generator.integers(len(pairs)))]
        text = question
        if generator.random() < SPOKEN:
            text = "<audio>"
            audios.append(str(generator.choice(voices[question])))
        shown = "<image>" if number == 0 else ""
        turns += [{"from": "human", "value": shown + text}, {"from": "gpt", "value": answer}]
    return {"images": [picture], "audios": audios, "conversations": turns}


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description="A manifest of spoken questions about shapes.")
    parser.add_argument("output", type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--samples", type=int, default=5_000)
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    print(write(args.output, args.samples))


if __name__ == "__main__":
    main()
