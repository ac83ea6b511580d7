"""Which shard folders a run reads: one, or several with weights.

A mixture is a file in the format of megatron-energon's `MetadatasetV2`. Energon's own reader makes
an instance of any class that such a file names, so this one takes plain values alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

META = ".nv-meta"
FIELDS = {"path", "weight", "split_part"}


@dataclass(frozen=True)
class Part:
    """One folder of a mixture; `weight` is how likely a sample is drawn from it."""

    path: Path
    split: str
    weight: float


def read_mixture(path: Path, split: str) -> list[Part]:
    """The folders behind `path`; ValueError says what is wrong with it."""
    if path.is_dir():
        return [_folder(path, split, 1.0)]
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ValueError(f"--data-path {path}: neither a folder of shards nor a mixture's .yaml")
    return list(_parts(path, split, 1.0, outer=()))


def _parts(path: Path, split: str, weight: float, outer: tuple[Path, ...]) -> Iterator[Part]:
    if path in outer:
        raise ValueError(f"{path}: this mixture holds itself")
    splits = _load(path).get("splits")
    if not isinstance(splits, dict) or split not in splits:
        known = ", ".join(map(str, splits)) if isinstance(splits, dict) else "none"
        raise ValueError(f"{path}: no split {split!r} in this mixture, which has {known}")
    entries = _entries(splits[split], path)
    total = sum(entry["weight"] for entry in entries)
    for entry in entries:
        place = (path.parent / entry["path"]).resolve()
        share, part = weight * entry["weight"] / total, entry.get("split_part", split)
        if place.is_file():
            yield from _parts(place, part, share, (*outer, path))
        else:
            yield _folder(place, part, share)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or content.get("__class__") != "MetadatasetV2":
        raise ValueError(f"{path}: not a mixture: it must say __class__: MetadatasetV2")
    return content


def _entries(content: Any, path: Path) -> list[dict[str, Any]]:
    """The weighted references of a split."""
    if isinstance(content, dict) and set(content) == {"blend"}:
        content = content["blend"]
    entries = content if isinstance(content, list) else [content]
    checked = []
    for entry in entries:
        understood = isinstance(entry, dict) and isinstance(entry.get("path"), str)
        if not understood or set(entry) - FIELDS:
            raise ValueError(
                f"{path}: {entry!r} is not understood; write path, and weight and split_part "
                "where needed, one or several under blend"
            )
        weight = entry.get("weight", 1.0)
        if not isinstance(weight, (int, float)) or weight <= 0:
            raise ValueError(f"{path}: weight {weight!r} of {entry['path']} must be above 0")
        checked.append({**entry, "weight": float(weight)})
    if not checked:
        raise ValueError(f"{path}: an empty mixture")
    return checked


def num_samples(part: Part) -> int:
    """How many samples energon counted in a folder, all splits together."""
    for name in (".info.json", ".info.yaml"):
        info = part.path / META / name
        if info.is_file():
            return sum(yaml.safe_load(info.read_text(encoding="utf-8"))["shard_counts"].values())
    raise ValueError(f"--data-path {part.path}: no .info.json in its {META}; prepare it again")


def _folder(path: Path, split: str, weight: float) -> Part:
    if not (path / META).is_dir():
        raise ValueError(
            f"--data-path {path}: no {META} in it; prepare_data.py webdataset makes such a folder"
        )
    splits = path / META / "split.yaml"
    if splits.is_file():
        known = _splits(splits)
        if not known.get(split):
            full = ", ".join(name for name, shards in known.items() if shards)
            raise ValueError(f"--data-path {path}: no split {split!r} in it; there is {full}")
    else:
        raise ValueError(f"--data-path {path}: no split.yaml in its {META}; prepare it again")
    return Part(path.resolve(), split, weight)


def _splits(file: Path) -> dict[str, Any]:
    """The shards of each split."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    known = content.get("split_parts") if isinstance(content, dict) else None
    if not isinstance(known, dict):
        raise ValueError(f"{file}: no split_parts in it; prepare the folder again")
    return known
