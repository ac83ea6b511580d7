"""Entries -> checked, split and written as shards, by several processes.

Every shard is written under another name first and then renamed, beside a summary with a digest
of what went in. A run that was interrupted leaves its draft behind, and the next one takes over
the shards whose digest it finds.

A folder of checked shards, whole or not at all.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import (
    check_media,
    find_media,
    parse_turns,
    to_pieces,
)
from examples.mimo.data.tokenizer import copy_tokenizer
from examples.mimo.modalities.base import Blob, Source
from examples.mimo.shards.manifest import MAX_FILE_BYTES, Entry, TarParts, read_entries
from examples.mimo.shards.mixtures import META
from examples.mimo.shards.read import words_of

SUMMARIES = ".summaries"

Rejected = dict[str, str]


@dataclass(frozen=True)
class Item:
    """An entry with the name that its parts have in the shard."""

    key: str
    entry: Entry


@dataclass
class Shard:
    """A shard that is being filled; `num_bytes` is what its media's files weigh."""

    name: str
    items: list[Item] = field(default_factory=list)
    num_bytes: int = 0

    def digest(self, config: MimoConfig) -> str:
        """A name for what goes in, and for the model that checks it."""
        found = hashlib.sha256(repr(config).encode())
        for item in self.items:
            line: list[object] = [
                item.key,
                item.entry.place,
                item.entry.record,
                repr(item.entry.find),
            ]
            line += [_stamp(item.entry, name) for name in _files(item.entry)]
            found.update(json.dumps(line, sort_keys=True, default=str).encode())
        return found.hexdigest()


@dataclass
class Planner:
    """Deals entries out to shards of `shard_bytes`, by split."""

    splits: dict[str, float]
    shard_bytes: int
    shard_samples: int
    rejected: list[Rejected] = field(default_factory=list)
    num_items: int = 0
    all_dealt: bool = False
    _used: Counter[str] = field(default_factory=Counter)
    _open: dict[str, Shard] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def shards(self, entries: Iterable[Entry]) -> Iterator[Shard]:
        """Shards as soon as they are full, and at last the rest."""
        for entry in entries:
            item = self._item(entry)
            if item is None:
                continue
            self.num_items += 1
            split = split_of(entry.record["key"], self.splits)
            if split not in self._open:
                self._open[split] = Shard(f"{split}-{self._counts[split]:06d}.tar")
                self._counts[split] += 1
            shard = self._open[split]
            shard.items.append(item)
            shard.num_bytes += _weight(entry)
            if shard.num_bytes >= self.shard_bytes or len(shard.items) >= self.shard_samples:
                yield self._open.pop(split)
        self.all_dealt = True
        yield from self._open.values()

    def _item(self, entry: Entry) -> Item | None:
        if entry.problem:
            self.rejected.append({"place": entry.place, "key": "", "reason": entry.problem})
            return None
        name = entry.record["key"]
        self._used[name] += 1
        if self._used[name] > 1 and not entry.may_repeat:
            reason = f"the key {name} was used before"
            self.rejected.append({"place": entry.place, "key": name, "reason": reason})
            return None
        return Item(_part_name(name, self._used[name]), entry)


def _part_name(key: str, time: int) -> str:
    """What a sample's parts are called: its key if it can be, else a part of it and its hash."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", key)[:60]
    if name == key and time == 1:
        return name
    digest = hashlib.sha256(f"{key}\n{time}".encode()).hexdigest()
    return f"{name}-{digest[:12]}"


def split_of(key: str, splits: dict[str, float]) -> str:
    """The split of a key, the same for ever: its hash on a line that the splits share."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64 * sum(splits.values())
    for name, share in splits.items():
        if place < share:
            return name
        place -= share
    return next(reversed(splits))


def _files(entry: Entry) -> list[str]:
    """The names of files in a record."""
    lists = [value for value in entry.record.values() if isinstance(value, list)]
    return [name for value in lists for name in value if isinstance(name, str)]


def _weight(entry: Entry) -> int:
    """Bytes of the files that a record names; nothing for what is not there."""
    return sum(_stamp(entry, name)[0] for name in _files(entry))


def _stamp(entry: Entry, name: str) -> tuple[int, int]:
    """Bytes of a file and when it changed; of a part of a tar file, where it lies."""
    if isinstance(entry.find, TarParts):
        offset, size = entry.find.place(name)
        return size, offset
    try:
        found = os.stat(entry.find(name))  # type: ignore[arg-type]
    except (ValueError, OSError):
        return 0, 0
    return found.st_size, found.st_mtime_ns


def write_shards(
    shards: Iterable[Shard],
    draft: Path,
    config: MimoConfig,
    num_workers: int,
    progress: Callable[[int], None],
) -> tuple[dict[str, int], list[Rejected]]:
    """Samples by shard, and what was refused; `progress` learns how many entries are done."""
    (draft / SUMMARIES).mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    rejected: list[Rejected] = []

    def take(done: concurrent.futures.Future[dict[str, Any]]) -> None:
        summary = done.result()
        counts[summary["name"]] = summary["samples"]
        rejected.extend(summary["rejected"])
        progress(sum(counts.values()) + len(rejected))

    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
        pending: set[concurrent.futures.Future[dict[str, Any]]] = set()
        for shard in shards:
            pending.add(pool.submit(write_shard, shard, draft, config))
            if len(pending) > num_workers:
                done, pending = concurrent.futures.wait(
                    pending, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for one in done:
                    take(one)
        for one in concurrent.futures.as_completed(pending):
            take(one)
    return counts, rejected


def write_shard(shard: Shard, draft: Path, config: MimoConfig) -> dict[str, Any]:
    """One shard, or what an earlier run wrote of it."""
    summary_file = draft / SUMMARIES / f"{shard.name}.json"
    digest = shard.digest(config)
    if summary_file.is_file():
        known = json.loads(summary_file.read_text(encoding="utf-8"))
        if known["digest"] == digest:
            return known
        summary_file.unlink()
    rejected: list[Rejected] = []
    samples = 0
    unfinished = draft / f"{shard.name}.unfinished"
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for item in shard.items:
            try:
                parts = checked_parts(item.key, item.entry, config)
            # A damaged file can make a decoder fail in any way; only this sample is lost.
            except Exception as error:
                rejected.append(_rejected(item.entry, error))
                continue
            for name, content in parts.items():
                member = tarfile.TarInfo(f"{item.key}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            samples += 1
    if samples:
        unfinished.replace(draft / shard.name)
    else:
        unfinished.unlink()
    summary = {"name": shard.name, "digest": digest, "samples": samples, "rejected": rejected}
    unfinished.write_text(json.dumps(summary), encoding="utf-8")
    unfinished.replace(summary_file)
    return summary


def _rejected(entry: Entry, error: Exception) -> Rejected:
    key = entry.record["key"]
    reason = words_of(error).removeprefix(f"sample {key}: ")
    return {"place": entry.place, "key": key, "reason": reason}


def checked_parts(key: str, entry: Entry, config: MimoConfig) -> dict[str, bytes]:
    """The parts of a sample by name, after `config`'s encoders have read all of its media.

    ValueError for a conversation that is none, for placeholders without files or the other way
    round, and for files that cannot be read.
    """
    record = dict(entry.record)
    turns = parse_turns(record.get("conversations"))
    if not any(turn.is_answer for turn in turns):
        raise ValueError("no turn is an answer")
    media = find_media(record, config, entry.find)
    check_media(to_pieces(turns, config), media, config)
    parts: dict[str, bytes] = {}
    for modality, sources in media.items():
        names = []
        for number, source in enumerate(sources):
            blob = _read(source)
            config.modalities[modality].encoder.read(blob)
            names.append(f"{modality}.{number}{_suffix(record[modality][number])}")
            parts[names[-1]] = blob.data
        if names:
            record[modality] = names
    return {"json": json.dumps(record, ensure_ascii=False).encode(), **parts}


def _read(source: Source) -> Blob:
    if isinstance(source, Blob):
        return source
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    size = source.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{source}: {size:,} bytes, more than {MAX_FILE_BYTES:,}")
    return Blob(str(source), source.read_bytes())


def _suffix(file: str) -> str:
    """The last suffix of a name, if it is one."""
    suffix = Path(file).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ""


ABOUT = "about.json"
REJECTED = "rejected.jsonl"
Progress = Callable[[str, int, int | None], None]
CRUDE = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}


@dataclass(frozen=True)
class Options:
    """What `prepare_data.py webdataset` was asked for."""

    manifest: Path
    media: Path
    output: Path
    splits: dict[str, float]
    shard_bytes: int
    shard_samples: int
    num_workers: int
    tokenizer: Path | None = None


def prepare(
    options: Options, config: MimoConfig, progress: Progress = lambda step, done, total: None
) -> dict[str, Any]:
    """Write `options.output`; what about.json then says.

    `progress` learns of every shard: what is done, how many samples, and of how many once the
    manifest has been read.

    ValueError when nothing could be used. What was finished stays in a hidden folder beside the
    output when this is interrupted, and is taken over the next time.
    """
    entries = read_entries(options.manifest, options.media, config)
    draft = options.output.with_name(f".{options.output.name}.draft")
    draft.mkdir(parents=True, exist_ok=True)
    planner = Planner(options.splits, options.shard_bytes, options.shard_samples)

    def checked(samples: int) -> None:
        progress("samples checked", samples, planner.num_items if planner.all_dealt else None)

    shards = planner.shards(entries)
    counts, refused = write_shards(shards, draft, config, options.num_workers, checked)
    rejected = planner.rejected + refused
    _remove_strangers(draft, {name for name, samples in counts.items() if samples})
    _write_rejected(draft, rejected)
    if not any(counts.values()):
        shutil.copy(draft / REJECTED, options.output.with_name(f"{options.output.name}.{REJECTED}"))
        shutil.rmtree(draft)
        first = rejected[0]["reason"] if rejected else "it is empty"
        raise ValueError(
            f"--manifest {options.manifest}: no sample could be used; the first: {first}"
        )
    written = sorted(name for name, samples in counts.items() if samples)
    index_shards(draft, written, list(options.splits), options.num_workers)
    about = _about(options, config, counts, len(rejected))
    (draft / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if options.tokenizer:
        copy_tokenizer(options.tokenizer, draft)
    shutil.rmtree(draft / SUMMARIES)
    if options.output.exists():
        shutil.rmtree(options.output)
    draft.rename(options.output)
    return about


def _about(
    options: Options, config: MimoConfig, counts: dict[str, int], rejected: int
) -> dict[str, Any]:
    samples: Counter[str] = Counter()
    for name, count in counts.items():
        samples[name.rpartition("-")[0]] += count
    return {
        "manifest": options.manifest.name,
        "model": config.name,
        "samples": dict(samples),
        "shards": sum(count > 0 for count in counts.values()),
        "rejected": rejected,
    }


def _remove_strangers(draft: Path, shards: set[str]) -> None:
    """Shards of an interrupted run with other options."""
    for file in draft.iterdir():
        if file.name not in shards and file.name != SUMMARIES:
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def _write_rejected(draft: Path, rejected: list[Rejected]) -> None:
    with (draft / REJECTED).open("w", encoding="utf-8") as stream:
        for row in sorted(rejected, key=lambda row: row["place"]):
            stream.write(json.dumps(row) + "\n")


def index_shards(folder: Path, shards: list[str], splits: list[str], num_workers: int) -> None:
    """Energon's description of shards, each named by its split: where their samples begin."""
    try:
        from megatron.energon.flavors import BaseWebdatasetFactory
    except ImportError as error:
        raise ValueError(
            f"megatron-energon is needed ({error}): pip install 'mimo-examples[data]'"
        ) from None
    # What it says of its own progress says nothing that matters here.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        BaseWebdatasetFactory.prepare_dataset(
            folder,
            shards,
            split_parts_patterns=[(split, f"{split}-[0-9]*") for split in splits],
            workers=num_workers,
        )
    (folder / META / "dataset.yaml").write_text(yaml.dump(CRUDE), encoding="utf-8")
