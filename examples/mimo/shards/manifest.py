"""What people have, as entries: a manifest's lines, LLaVA's JSON, or shards from elsewhere.

Nothing is decoded here, and one bad entry does not end the reading: it comes with its problem.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import FilesInside, FindFile
from examples.mimo.modalities.base import Blob
from examples.mimo.shards.read import MAX_RECORD_BYTES, record_of

MAX_LIST_BYTES = 4 * 2**30
MAX_FILE_BYTES = 2**30


@dataclass(frozen=True)
class Entry:
    """A sample to be; `place` is where it stands, `find` knows the files that the record names.

    With a `problem`, there is no sample.
    """

    place: str
    record: dict[str, Any] = field(default_factory=dict)
    find: FindFile = Path
    problem: str = ""
    may_repeat: bool = False


def read_entries(manifest: Path, media: Path, config: MimoConfig) -> Iterator[Entry]:
    """The entries of a .jsonl or .json file, or of the shards in a folder."""
    if manifest.is_dir():
        tars = sorted(manifest.rglob("*.tar"))
        if not tars:
            raise ValueError(f"--manifest {manifest}: no .tar files in this folder")
        return _shards(tars, config)
    if not manifest.is_file():
        raise ValueError(f"--manifest {manifest}: no such file or folder")
    if manifest.suffix == ".json":
        return _list(manifest, FilesInside(media), config)
    return _lines(manifest, FilesInside(media), config)


def _lines(manifest: Path, find: FindFile, config: MimoConfig) -> Iterator[Entry]:
    with manifest.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_RECORD_BYTES + 1):
            number += 1
            place = f"line {number}"
            if len(line) > MAX_RECORD_BYTES:
                size = len(line)
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_RECORD_BYTES)
                    size += len(line)
                yield Entry(
                    place, problem=f"{size:,} bytes in one line, more than {MAX_RECORD_BYTES:,}"
                )
            elif line.strip():
                try:
                    record = json.loads(line)
                # Numbers of too many digits are a ValueError too.
                except (ValueError, RecursionError) as error:
                    yield Entry(place, problem=f"not JSON ({error})")
                else:
                    yield _entry(place, record, find, config, f"line-{number:08d}")


def _list(manifest: Path, find: FindFile, config: MimoConfig) -> Iterator[Entry]:
    """LLaVA's format: one list, with a file's name where a manifest has a list of them."""
    if manifest.stat().st_size > MAX_LIST_BYTES:
        raise ValueError(f"--manifest {manifest}: larger than {MAX_LIST_BYTES:,} bytes; use .jsonl")
    try:
        records = json.loads(manifest.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--manifest {manifest}: not JSON ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"--manifest {manifest}: must hold a list of samples")
    for number, record in enumerate(records, start=1):
        # There, an id names the picture, and several conversations may be about one.
        yield _entry(f"item {number}", record, find, config, f"item-{number:08d}", may_repeat=True)


def _entry(
    place: str, record: Any, find: FindFile, config: MimoConfig, key: str, may_repeat: bool = False
) -> Entry:
    if not isinstance(record, dict):
        return Entry(place, problem="a sample must be a JSON object")
    named = record.get("key", record.get("id", key))
    if not _is_name(named):
        return Entry(place, problem=f"the key {named!r} is no name")
    known = {field: value for field, value in record.items() if field != "id"}
    for name, modality in config.modalities.items():
        if modality.singular in known:
            given = known.pop(modality.singular)
            if given is not None:
                known.setdefault(name, [given] if isinstance(given, str) else given)
    return Entry(place, {**known, "key": str(named)}, find, may_repeat=may_repeat)


def _is_name(key: Any) -> bool:
    """A number, or text that can be written."""
    if isinstance(key, int):
        return True
    return isinstance(key, str) and key != "" and key.encode(errors="replace").decode() == key


@dataclass(frozen=True)
class TarParts:
    """The parts of one sample inside a tar file: name -> (offset, bytes)."""

    tar: Path
    key: str
    parts: Mapping[str, tuple[int, int]]

    def place(self, name: str) -> tuple[int, int]:
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
        """The record of the sample, with a key that is a name; ValueError without one."""
        if self.place("json")[1] > MAX_RECORD_BYTES:
            raise ValueError(f"{self.key}.json is larger than {MAX_RECORD_BYTES:,} bytes")
        contents = dict.fromkeys(self.parts, b"")
        if "json" in contents:
            contents["json"] = self("json").data
        record = record_of(self.key, contents, config)
        if not _is_name(record["key"]):
            raise ValueError(f"the key {record['key']!r} is no name")
        return {**record, "key": str(record["key"])}


def _shards(tars: Sequence[Path], config: MimoConfig) -> Iterator[Entry]:
    for tar in tars:
        try:
            samples = list(members(tar))
        except (tarfile.TarError, OSError, EOFError) as error:
            yield Entry(tar.name, problem=f"a damaged tar file ({error})")
            continue
        for parts in samples:
            place = f"{tar.name}, {parts.key}"
            try:
                yield Entry(place, parts.record(config), parts)
            except ValueError as error:
                yield Entry(place, problem=str(error))


def members(tar: Path) -> Iterator[TarParts]:
    """The samples of a tar file, whose parts stand side by side."""
    key = ""
    parts: dict[str, tuple[int, int]] = {}
    # Offsets are used later, so a compressed file is none of these.
    with tarfile.open(tar, "r:") as found:
        for member in found:
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
