"""Data folders: the model that one was prepared for, and weighted mixtures of several.

A mixture is a file in the format of megatron-energon's `MetadatasetV2`. Energon's own reader makes
an instance of any class that such a file names, so this one accepts plain values only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from examples.mimo.configs import MODEL_PROVIDERS

ABOUT = "about.json"
META = ".nv-meta"
FIELDS = {"path", "weight", "split_part"}


@dataclass(frozen=True)
class DatasetModel:
    """The model that a data folder is for: its `--model-provider` and the fields of `--set`."""

    model_provider: str
    config_fields: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes the folder's about.json."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (folder / ABOUT).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> DatasetModel | None:
        """The model in the folder's about.json; None where it names none.

        ValueError for a model outside the registry: data from elsewhere must not choose which code
        is imported.
        """
        file = folder / ABOUT
        if not file.is_file():
            return None
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            if "model_provider" not in about:
                return None
            name, fields = str(about["model_provider"]), tuple(map(str, about["config_fields"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}: damaged ({error!r})") from None
        if name not in MODEL_PROVIDERS:
            raise ValueError(
                f"{file}: these data are for {name}, which is no model of this package; if you "
                f"trust it, add --model-provider {name}"
            )
        return cls(name, fields)


@dataclass(frozen=True)
class Part:
    """One folder of a mixture; `weight` is the probability that a sample is drawn from it."""

    path: Path
    split: str
    weight: float


def read_mixture(path: Path, split: str) -> list[Part]:
    """The folders behind `path`, a folder of shards or a mixture; ValueError if it is neither."""
    if path.is_dir():
        return [_folder_part(path, split, 1.0)]
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ValueError(f"--data-path {path}: neither a folder of shards nor a mixture's .yaml")
    return list(_parts(path, split, 1.0, outer=()))


def _parts(path: Path, split: str, weight: float, outer: tuple[Path, ...]) -> Iterator[Part]:
    if path in outer:
        raise ValueError(f"{path}: this mixture includes itself")
    splits = _load(path).get("splits")
    if not isinstance(splits, dict) or split not in splits:
        known = ", ".join(map(str, splits)) if isinstance(splits, dict) else "none"
        raise ValueError(f"{path}: no split {split!r} in this mixture, which has {known}")
    entries = _entries(splits[split], path)
    total = sum(entry["weight"] for entry in entries)
    for entry in entries:
        folder = (path.parent / entry["path"]).resolve()
        share, split_part = weight * entry["weight"] / total, entry.get("split_part", split)
        if folder.is_file():
            yield from _parts(folder, split_part, share, (*outer, path))
        else:
            yield _folder_part(folder, split_part, share)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or content.get("__class__") != "MetadatasetV2":
        raise ValueError(f"{path}: not a mixture: it must say __class__: MetadatasetV2")
    return content


def _entries(content: Any, path: Path) -> list[dict[str, Any]]:
    """The weighted references of a split; ValueError for anything that is not plain values."""
    if isinstance(content, dict) and set(content) == {"blend"}:
        content = content["blend"]
    entries = content if isinstance(content, list) else [content]
    checked = []
    for entry in entries:
        has_path = isinstance(entry, dict) and isinstance(entry.get("path"), str)
        if not has_path or set(entry) - FIELDS:
            raise ValueError(
                f"{path}: {entry!r} is not an entry of a mixture; give path, and weight and "
                "split_part if needed, one or several under blend"
            )
        weight = entry.get("weight", 1.0)
        if not isinstance(weight, (int, float)) or weight <= 0:
            raise ValueError(f"{path}: weight {weight!r} of {entry['path']} must be above 0")
        checked.append({**entry, "weight": float(weight)})
    if not checked:
        raise ValueError(f"{path}: this mixture has no entries")
    return checked


def num_samples(part: Part) -> int:
    """The number of samples in a folder, all splits together, as energon counted them."""
    for name in (".info.json", ".info.yaml"):
        info = part.path / META / name
        if info.is_file():
            return sum(yaml.safe_load(info.read_text(encoding="utf-8"))["shard_counts"].values())
    raise ValueError(f"--data-path {part.path}: no .info.json in its {META}; prepare it again")


def _folder_part(path: Path, split: str, weight: float) -> Part:
    if not (path / META).is_dir():
        raise ValueError(
            f"--data-path {path}: no {META} in it; prepare_data.py webdataset makes such a folder"
        )
    splits = path / META / "split.yaml"
    if splits.is_file():
        known = _splits(splits)
        if not known.get(split):
            names = ", ".join(name for name, shards in known.items() if shards)
            raise ValueError(f"--data-path {path}: no split {split!r} in it; it has {names}")
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
