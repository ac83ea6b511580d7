"""Manifests of samples, records inside shards, and mixtures of shard folders."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.turns import (
    FilesInside,
    FindFile,
    check_num_files,
    conversation_of,
    files_of_parts,
    first_of,
)
from examples.mimo.modalities.files import Blob, json_lines

MAX_LIST_BYTES = 4 * 2**30
MAX_FILE_BYTES = 2**30
MAX_RECORD_BYTES = 4 * 2**20
# Energon's folder of indices in a folder of shards, and what an entry of a mixture may say.
META = ".nv-meta"
ENTRY_FIELDS = {"path", "weight", "split_part"}


@dataclass(frozen=True)
class Entry:
    """A sample of a manifest before it is checked.

    `place` says where in the manifest it stands, and `find` finds the files that its record names.
    An entry with a `problem` has no record. `may_repeat` allows a key that was used before.
    """

    place: str
    record: dict[str, Any] = field(default_factory=dict)
    find: FindFile = Path
    problem: str = ""
    may_repeat: bool = False


def read_entries(manifest: Path, media: Path, config: MimoConfig) -> Iterator[Entry]:
    """The entries of a .jsonl or .json file whose media lie in `media`, or of shards."""
    if manifest.is_dir():
        tars = sorted(manifest.rglob("*.tar"))
        if not tars:
            raise ValueError(f"--manifest {manifest}: no .tar files in this folder")
        return _shard_entries(tars, config)
    if not manifest.is_file():
        raise ValueError(f"--manifest {manifest}: no such file or folder")
    if manifest.suffix == ".json":
        # LLaVA's id names the picture, and several conversations may be about one.
        return _entries(_llava_records(manifest), "item", FilesInside(media), config, True)
    records = json_lines(manifest, MAX_RECORD_BYTES)
    return _entries(records, "line", FilesInside(media), config, False)


def _llava_records(manifest: Path) -> Iterator[tuple[int, Any]]:
    if manifest.stat().st_size > MAX_LIST_BYTES:
        raise ValueError(f"--manifest {manifest}: larger than {MAX_LIST_BYTES:,} bytes; use .jsonl")
    try:
        records = json.loads(manifest.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--manifest {manifest}: not JSON ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"--manifest {manifest}: must hold a list of samples")
    return enumerate(records, start=1)


def _entries(
    records: Iterable[tuple[int, Any]],
    unit: str,
    find: FindFile,
    config: MimoConfig,
    may_repeat: bool,
) -> Iterator[Entry]:
    for number, record in records:
        place = f"{unit} {number}"
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError("a sample must be a JSON object")
            key = first_of(record, "key", "id")
            key = f"{unit}-{number:08d}" if key is None else _checked_key(key)
            known = _with_media_lists(record, config)
            check_num_files(known, config)
        except ValueError as error:
            yield Entry(place, problem=str(error))
        else:
            yield Entry(place, {**known, "key": key}, find, may_repeat=may_repeat)


def _with_media_lists(record: Mapping[str, Any], config: MimoConfig) -> dict[str, Any]:
    """LLaVA's `"image": FILE` as `"images": [FILE]`, for every modality."""
    known = {name: value for name, value in record.items() if name != "id"}
    for name, modality in config.modalities.items():
        file = known.pop(modality.singular, None)
        if file is not None and known.get(name) is None:
            known[name] = [file] if isinstance(file, str) else file
    return known


def _checked_key(key: Any) -> str:
    """A key as text; ValueError unless it is a number or text that UTF-8 can write."""
    if isinstance(key, int):
        return str(key)
    if isinstance(key, str) and key and key.encode(errors="replace").decode() == key:
        return key
    raise ValueError(f"the key {key!r} is not usable; give a number or text without half pairs")


@dataclass(frozen=True)
class TarParts:
    """The parts of one sample inside a tar file: name -> (offset, bytes)."""

    tar: Path
    key: str
    parts: Mapping[str, tuple[int, int]]

    def extent(self, name: str) -> tuple[int, int]:
        """Offset and bytes of a part, whose name may begin with the key; zeros without it."""
        return self.parts.get(name.removeprefix(f"{self.key}."), (0, 0))

    def __call__(self, name: str) -> Blob:
        part = name.removeprefix(f"{self.key}.")
        if part not in self.parts:
            raise ValueError(f"{name}: no such part in {self.tar.name}")
        offset, size = self.parts[part]
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{name}: {size:,} bytes, more than {MAX_FILE_BYTES:,}")
        with self.tar.open("rb") as stream:
            stream.seek(offset)
            return Blob(f"{self.key}.{part}", stream.read(size))

    def record(self, config: MimoConfig) -> dict[str, Any]:
        """The record of the sample with its key as text; ValueError without one."""
        if self.extent("json")[1] > MAX_RECORD_BYTES:
            raise ValueError(f"{self.key}.json is larger than {MAX_RECORD_BYTES:,} bytes")
        contents = dict.fromkeys(self.parts, b"")
        if "json" in contents:
            contents["json"] = self("json").data
        record = read_record(self.key, contents, config)
        check_num_files(record, config)
        return {**record, "key": _checked_key(record["key"])}


def _shard_entries(tars: Sequence[Path], config: MimoConfig) -> Iterator[Entry]:
    for tar in tars:
        try:
            samples = list(tar_samples(tar))
        except (tarfile.TarError, OSError, EOFError) as error:
            yield Entry(tar.name, problem=f"a damaged tar file ({error})")
            continue
        for parts in samples:
            place = f"{tar.name}, {parts.key}"
            try:
                yield Entry(place, parts.record(config), parts)
            except ValueError as error:
                yield Entry(place, problem=str(error))


def tar_samples(tar: Path) -> Iterator[TarParts]:
    """The samples of an uncompressed tar file, whose parts stand side by side."""
    key = ""
    parts: dict[str, tuple[int, int]] = {}
    # A compressed file has no offsets to read parts at later, so it counts as damaged.
    with tarfile.open(tar, "r:") as members:
        for member in members:
            base, dot, part = member.name.rpartition("/")[2].partition(".")
            if not member.isreg() or member.issparse() or not dot or not base:
                continue
            if base != key and parts:
                yield TarParts(tar, key, parts)
                parts = {}
            key = base
            parts[part] = (member.offset_data, member.size)
    if parts:
        yield TarParts(tar, key, parts)


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
    entries = _mixture_entries(splits[split], path)
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


def _mixture_entries(content: Any, path: Path) -> list[dict[str, Any]]:
    """The weighted references of a split; ValueError for anything that is not plain values."""
    if isinstance(content, dict) and set(content) == {"blend"}:
        content = content["blend"]
    entries = content if isinstance(content, list) else [content]
    checked = []
    for entry in entries:
        has_path = isinstance(entry, dict) and isinstance(entry.get("path"), str)
        if not has_path or set(entry) - ENTRY_FIELDS:
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


def read_record(key: str, parts: Mapping[str, bytes], config: MimoConfig) -> dict[str, Any]:
    """The record of a sample, from its parts by name; only the JSON part's content is read.

    A record that names no media takes all parts whose names end with a modality's suffixes. A
    list is taken for the conversation's turns. ValueError without a record that can be read.
    """
    if "json" not in parts:
        raise ValueError(f"sample {key}: no {key}.json in the shard")
    text = parts["json"]
    if len(text) > MAX_RECORD_BYTES:
        raise ValueError(
            f"sample {key}: {key}.json has {len(text):,} bytes, more than {MAX_RECORD_BYTES:,}"
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"sample {key}: {key}.json is not JSON ({error})") from None
    if isinstance(record, list):
        record = {"conversations": record}
    if not isinstance(record, dict):
        raise ValueError(f"sample {key}: {key}.json must hold an object or a list of turns")
    if record.get("key") is None:
        record["key"] = key
    named = first_of(record, *config.modalities)
    if named is not None or files_of_parts(conversation_of(record)):
        return record
    for name in config.inputs:  # outputs are named: their files may be of an input's kind
        suffixes = _own_suffixes(config, name)
        files = [part for part in parts if part.lower().endswith(suffixes)]
        files.sort(key=_numeric_order)
        # A part may be named by its suffix alone, as KEY.mp4.
        files += [part for part in parts if f".{part.lower()}" in suffixes]
        if files:
            record[name] = files
    return record


def _own_suffixes(config: MimoConfig, name: str) -> tuple[str, ...]:
    """The suffixes of a modality that no other lists nearer its beginning: .mp4 is video first."""
    listed = {other: item.encoder.suffixes for other, item in config.inputs.items()}
    return tuple(
        suffix
        for place, suffix in enumerate(listed[name])
        if all(suffix not in others[:place] for others in listed.values())
    )


def error_reason(error: Exception) -> str:
    """Why a sample was refused; the class of any error but a ValueError is named too."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{error}"


def _numeric_order(part: str) -> list[tuple[int, str]]:
    """Sorts 2.jpg before 10.jpg."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", part)]
