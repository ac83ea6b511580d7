"""Damage to a checkpoint's files, one at a time, and whether loading notices it."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

from examples.mimo.checkpoint.description import FILE_NAME, TOKENIZER, open_checkpoint
from examples.mimo.checkpoint.integrity import begin_check, finish_check


@dataclasses.dataclass(frozen=True)
class Damage:
    """A bit of a file that flips, or the length it is cut to."""

    file: Path
    position: int
    bit: int | None = None

    def __str__(self) -> str:
        what = "cut to" if self.bit is None else f"bit {self.bit} of byte"
        return f"{self.file.name} {what} {self.position} of {self.file.stat().st_size}"

    @contextlib.contextmanager
    def done(self) -> Iterator[None]:
        """The file is damaged in here, and whole again behind it."""
        with self.file.open("r+b") as stream:
            stream.seek(self.position)
            rest = stream.read()
            if self.bit is None:
                stream.truncate(self.position)
            else:
                stream.seek(self.position)
                stream.write(bytes([rest[0] ^ 1 << self.bit]))
        try:
            yield
        finally:
            with self.file.open("r+b") as stream:
                stream.seek(self.position)
                stream.write(rest)


def files(folder: Path) -> list[Path]:
    """What a checkpoint consists of: the iteration, the description, the tokenizer."""
    weights = open_checkpoint(folder).weights
    inside = [*weights.rglob("*"), *(folder / TOKENIZER).glob("*"), folder / FILE_NAME]
    return sorted(path for path in inside if path.is_file())


def random_damages(folder: Path, count: int, seed: int) -> list[Damage]:
    """Flips and, one in four, truncations: of any file in turn, anywhere in it."""
    generator, all_files = random.Random(seed), files(folder)
    damages = []
    for number in range(count):
        file = all_files[number % len(all_files)]
        bit = None if generator.random() < 0.25 else generator.randrange(8)
        damages.append(Damage(file, generator.randrange(file.stat().st_size), bit))
    return damages


def refusal(folder: Path) -> str | None:
    """What every command says that loads `folder` up to its weights; None if it would load."""
    try:
        checkpoint = open_checkpoint(folder, verify=True)
        begin_check(checkpoint.weights, checkpoint.named)
        finish_check(checkpoint.weights)
    except ValueError as error:
        return str(error)
    return None
