"""Writes the pretrained demo's data: animals to name, hear and compare, from Tux Paint's stamps.

Every third animal is held out from comparing: its picture and its recording are named in
training, each alone, but whether they agree is never asked. An animal's further pictures are held
out from naming.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from demos.animals.tuxpaint import Animal, read_animals

SAMPLE_RATE_HZ = 16_000
MAX_SECONDS = 8.0
PICTURE_SIDE = 224
SEE = (
    "<image>What animal is in the picture?",
    "<image>Which animal do you see?",
    "<image>Name the animal.",
)
HEAR = (
    "<audio>What word do you hear?",
    "<audio>Which animal is named in the recording?",
    "<audio>What is said?",
)
CALL = ("<audio>Which animal makes this sound?", "<audio>Who calls like this?")
COMPARE = (
    "<image><audio>Do picture and name agree?",
    "<image><audio>Is the animal that you see the one that is named?",
    "<image><audio>Does the recording name what the picture shows?",
)
AGREE, DIFFER = "They agree.", "They differ."
MIXTURE = {"see": 0.45, "hear": 0.1, "call": 0.05, "compare": 0.4}

Record = dict[str, Any]


def write_stamps(stamps: Path, root: Path, seed: int, samples: int) -> None:
    """Fills the empty folder `root`; `samples` lines in train.jsonl."""
    generator = np.random.default_rng(seed)
    animals = read_animals(stamps)
    files = {animal.name: _copy(animal, root) for animal in animals}
    compared = [a for number, a in enumerate(animals) if number % 3]
    held_out = [a for number, a in enumerate(animals) if number % 3 == 0]
    draw = _RecordGenerator(files, generator)
    _write_lines(root, "train", [draw.mixed(animals, compared) for _ in range(samples)])
    _write_lines(root, "heldout", _every_comparison(draw, held_out, range(len(COMPARE))))
    _write_lines(root, "compare_seen", _every_comparison(draw, compared, range(1)))
    _write_lines(root, "heldout_pictures", _every_further_picture(draw, animals))
    for split, kind in (("see_seen", draw.see), ("hear_seen", draw.hear), ("call_seen", draw.call)):
        known = [a for a in animals if kind != draw.call or a.call]
        _write_lines(root, split, [kind(a, 0) for a in known])
    (root / "README.md").write_text(_README.format(animals=len(animals), held=len(held_out)))


class _RecordGenerator:
    """Records about animals; wordings are drawn unless they are passed."""

    def __init__(self, files: dict[str, dict[str, list[str]]], generator: np.random.Generator):
        self.files = files
        self.generator = generator

    def mixed(self, animals: list[Animal], compared: list[Animal]) -> Record:
        task = str(self.generator.choice(list(MIXTURE), p=list(MIXTURE.values())))
        if task == "compare":
            seen = heard = self._draw_animal(compared)
            if self.generator.integers(2):
                heard = self._draw_animal([a for a in compared if a is not seen])
            return self.compare(seen, heard)
        known = [a for a in animals if task != "call" or a.call]
        kinds: dict[str, Callable[[Animal], Record]]
        kinds = {"see": self.see, "hear": self.hear, "call": self.call}
        return kinds[task](self._draw_animal(known))

    def see(self, animal: Animal, wording: int | None = None, picture: int = 0) -> Record:
        file = self.files[animal.name]["pictures"][picture]
        return self._record("see", SEE, wording, _named(animal), animal, images=[file])

    def hear(self, animal: Animal, wording: int | None = None) -> Record:
        file = self.files[animal.name]["spoken"]
        return self._record("hear", HEAR, wording, _named(animal), animal, audios=file)

    def call(self, animal: Animal, wording: int | None = None) -> Record:
        file = self.files[animal.name]["call"]
        return self._record("call", CALL, wording, _named(animal), animal, audios=file)

    def compare(self, seen: Animal, heard: Animal, wording: int | None = None) -> Record:
        verdict = AGREE if seen is heard else DIFFER
        answer = f"I see {seen.phrase}. I hear {heard.phrase}. {verdict}"
        media = {
            "images": self.files[seen.name]["pictures"][:1],
            "audios": self.files[heard.name]["spoken"],
        }
        record = self._record("compare", COMPARE, wording, answer, seen, **media)
        return record | {"ending": verdict, "chance": 0.5}

    def _record(
        self,
        kind: str,
        wordings: tuple[str, ...],
        wording: int | None,
        answer: str,
        animal: Animal,
        **media: list[str],
    ) -> Record:
        if wording is None:
            wording = int(self.generator.integers(len(wordings)))
        question = wordings[wording]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        chance = 1 / len(self.files)
        return {
            "kind": kind, "group": animal.name, "chance": chance, **media, "conversations": turns,
        }  # fmt: skip

    def _draw_animal(self, animals: list[Animal]) -> Animal:
        return animals[self.generator.integers(len(animals))]


def _named(animal: Animal) -> str:
    return f"{animal.phrase.capitalize()}."


def _every_comparison(
    draw: _RecordGenerator, animals: list[Animal], wordings: range
) -> list[Record]:
    """In each wording, every animal with its own name and with another one's."""
    records = []
    for number, animal in enumerate(animals):
        others = animals[number + 1 :] + animals[:number]
        for wording in wordings:
            other = others[wording % len(others)]
            records += [draw.compare(animal, animal, wording), draw.compare(animal, other, wording)]
    return records


def _every_further_picture(draw: _RecordGenerator, animals: list[Animal]) -> list[Record]:
    return [
        draw.see(animal, wording, picture)
        for animal in animals
        for picture in range(1, len(animal.pictures))
        for wording in range(len(SEE))
    ]


def _copy(animal: Animal, root: Path) -> dict[str, list[str]]:
    """PNG on white and FLAC at 16 kHz; the names of the files."""
    pictures = [_copy_picture(p, root, animal.name, n) for n, p in enumerate(animal.pictures)]
    call = [_copy_sound(animal.call, root, f"{animal.name}-call")] if animal.call else []
    spoken = [_copy_sound(animal.spoken, root, f"{animal.name}-name")]
    return {"pictures": pictures, "spoken": spoken, "call": call}


def _copy_picture(source: Path, root: Path, name: str, number: int) -> str:
    from PIL import Image, ImageOps

    with Image.open(source) as stamp:
        drawn = ImageOps.contain(stamp.convert("RGBA"), (PICTURE_SIDE * 7 // 8,) * 2)
    picture = Image.new("RGB", (PICTURE_SIDE,) * 2, "white")
    left, top = ((PICTURE_SIDE - side) // 2 for side in drawn.size)
    picture.paste(drawn, (left, top), drawn)
    file = f"images/{_file_name(name)}-{number}.png"
    (root / file).parent.mkdir(exist_ok=True)
    picture.save(root / file)
    return file


def _copy_sound(source: Path, root: Path, name: str) -> str:
    import soundfile

    from examples.mimo.modalities.files import read_audio

    sound = read_audio(source, SAMPLE_RATE_HZ, MAX_SECONDS, truncate=True)
    file = f"audios/{_file_name(name)}.flac"
    (root / file).parent.mkdir(exist_ok=True)
    soundfile.write(root / file, sound, SAMPLE_RATE_HZ)
    return file


def _file_name(name: str) -> str:
    return name.replace(" ", "_")


def _write_lines(root: Path, split: str, records: list[Record]) -> None:
    with (root / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for number, record in enumerate(records):
            file.write(json.dumps({"key": f"{split}-{number:05d}", **record}) + "\n")


_README = """# Animals to name, hear and compare

Pictures, spoken names and animals' calls are Tux Paint's stamps: copyright 2002-2022 by Bill
Kendrick and the artists he names, GNU General Public License, version 2; so are these copies.
The recordings are of people and animals; nothing is synthesised.

{animals} animals. Each line of a `.jsonl` file is a sample.

| file | what |
| --- | --- |
| train.jsonl | what a picture shows, what is said, who calls, whether picture and name agree |
| heldout.jsonl | agreement for {held} animals of which it was never asked in training |
| compare_seen.jsonl | agreement for the other animals |
| heldout_pictures.jsonl | names of pictures that were never trained on |
| see_seen.jsonl, hear_seen.jsonl, call_seen.jsonl | every picture and recording of training once |
"""
