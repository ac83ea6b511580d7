"""Reads manifests: a .jsonl file, LLaVA's .json list, or a folder of shards made elsewhere.

Each sample comes as an `Entry`. No media are decoded here, and a bad entry does not end the
reading: it comes with its problem.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import FilesInside, FindFile
from examples.mimo.data.datasets import json_lines
from examples.mimo.modalities.base import Blob
from examples.mimo.shards.read import MAX_RECORD_BYTES, read_record

MAX_LIST_BYTES = 4 * 2**30
MAX_FILE_BYTES = 2**30


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
            key = _checked_key(record.get("key", record.get("id", f"{unit}-{number:08d}")))
        except ValueError as error:
            yield Entry(place, problem=str(error))
        else:
            known = _with_media_lists(record, config)
            yield Entry(place, {**known, "key": key}, find, may_repeat=may_repeat)


def _with_media_lists(record: Mapping[str, Any], config: MimoConfig) -> dict[str, Any]:
    """LLaVA's `"image": FILE` as `"images": [FILE]`, for every modality."""
    known = {name: value for name, value in record.items() if name != "id"}
    for name, modality in config.modalities.items():
        file = known.pop(modality.singular, None)
        if file is not None:
            known.setdefault(name, [file] if isinstance(file, str) else file)
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
