"""Tux Paint's stamps: captioned pictures, some with a spoken name and a sound (GPL-2)."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "tuxpaint-stamps-default"
SYSTEM = Path("/")
INSTALLED = Path("usr/share/tuxpaint/stamps")
# Captions whose last word is not the animal's name.
NAMES = {
    "A mountaingoat.": "mountain goat",
    # A rhea by another name; it is the one that the recording says.
    "A rhea.": "nandu",
    "A sea lion.": "sea lion",
    "Two wild boars.": "wild boar",
}


@dataclass
class Animal:
    """`pictures` begins with the one that belongs to the recordings."""

    name: str
    spoken: Path
    call: Path | None
    pictures: list[Path] = field(default_factory=list)

    @property
    def phrase(self) -> str:
        """The name with its article."""
        return f"{'an' if self.name[0] in 'aeio' else 'a'} {self.name}"


@contextmanager
def open_stamps(path: Path | None) -> Iterator[Path]:
    """The folder of stamps: `path` (a folder, or the .deb), else installed, else fetched."""
    if path and not path.exists():
        raise ValueError(f"--stamps {path}: no such folder or file")
    if path and path.is_dir():
        yield _stamps_below(path)
    elif path is None and (SYSTEM / INSTALLED).is_dir():
        yield SYSTEM / INSTALLED
    else:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            package = path.resolve() if path else _fetch(folder)
            _run(["dpkg-deb", "-x", str(package), "unpacked"], folder)
            yield _stamps_below(folder / "unpacked")


def read_animals(stamps: Path) -> list[Animal]:
    """The animals that have a picture and an English recording of their name, by name."""
    animals: dict[str, Animal] = {}
    others: dict[str, list[Path]] = {}
    for picture in sorted((stamps / "animals").rglob("*.png")):
        name = _name(picture.with_suffix(".txt"))
        spoken = picture.with_name(f"{picture.stem}_desc.ogg")
        if not name or "cartoon" in picture.parts or "toys" in picture.parts:
            continue
        if spoken.is_file() and name not in animals:
            call = picture.with_suffix(".ogg")
            animals[name] = Animal(name, spoken, call if call.is_file() else None, [picture])
        else:
            others.setdefault(name, []).append(picture)
    for name, animal in animals.items():
        animal.pictures += others.get(name, [])
    if not animals:
        raise ValueError(f"{stamps}: no animal with a picture (.png) and a name (_desc.ogg)")
    return [animals[name] for name in sorted(animals)]


def _name(caption: Path) -> str:
    """The last word of the caption's first line, which is its English one."""
    if not caption.is_file():
        return ""
    first = caption.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    words = re.findall(r"[a-z]+", first.partition("(")[0].lower())
    return NAMES.get(first, words[-1] if words else "")


def _stamps_below(folder: Path) -> Path:
    for candidate in (folder, folder / INSTALLED, folder / "stamps"):
        if (candidate / "animals").is_dir():
            return candidate
    raise ValueError(f"{folder}: no stamps in it; it should hold the folder animals")


def _fetch(folder: Path) -> Path:
    """The Debian package, downloaded without installing it; needs no special rights."""
    _run(["apt-get", "download", PACKAGE], folder)
    return next(folder.glob(f"{PACKAGE}_*.deb"))


def _run(command: list[str], folder: Path) -> None:
    remedy = (
        f"get {PACKAGE} from Debian or Ubuntu and name the .deb, or its unpacked folder, "
        "with --stamps"
    )
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]} is not on this machine; {remedy}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"{' '.join(command)}: {lines[-1]}; {remedy}")
