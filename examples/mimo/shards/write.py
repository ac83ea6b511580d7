"""Writes a folder of checked shards from a manifest: split, in parallel, whole or not at all.

In reading order: `prepare_shards` takes the entries of a manifest, `ShardPlanner` assigns them to
shards by split, `write_shard` checks and writes one shard in a worker process, and `index_shards`
adds what megatron-energon needs. Everything goes into a hidden draft folder beside the output,
which is renamed when it is complete. Each shard in it has a summary with a digest of what went in,
so that a run after an interruption takes over the shards whose digest it finds.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.mimo.checkpoint.description import ABOUT, DatasetModel
from examples.mimo.configs import check_codecs, copy_codecs
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import copy_tokenizer
from examples.mimo.data.turns import (
    ASSISTANT,
    conversation_of,
    files_of_parts,
    find_media,
    output_places,
    parse_turns,
)
from examples.mimo.modalities.files import Blob, Source
from examples.mimo.shards.manifest import (
    MAX_FILE_BYTES,
    META,
    Entry,
    TarParts,
    error_reason,
    read_entries,
)

SUMMARIES = ".summaries"
REJECTED = "rejected.jsonl"
CRUDE = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}

# {"place": ..., "key": ..., "reason": ...}
Rejected = dict[str, str]
# Called with a step's title, how much of it is done, and the total as soon as it is known.
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class WriteOptions:
    """What to write: `splits` are shares by name, `shard_bytes` and `shard_samples` bound a shard.

    `model` goes into about.json, so that the folder is read later as that model does.
    """

    manifest: Path
    media: Path
    output: Path
    splits: dict[str, float]
    shard_bytes: int
    shard_samples: int
    num_workers: int
    tokenizer: Path | None = None
    model: DatasetModel | None = None


def prepare_shards(
    options: WriteOptions,
    config: MimoConfig,
    progress: Progress = lambda title, done, total: None,
) -> dict[str, Any]:
    """Writes `options.output` and returns what its about.json says.

    ValueError when more than half of the entries were refused: the output is then left as it was,
    and the reasons are in OUTPUT.rejected.jsonl beside it.
    """
    # Used last, to index what was written; its absence should not cost the time of writing.
    if importlib.util.find_spec("megatron.energon") is None:
        raise ValueError("shards need megatron-energon; pip install -e '.[data]'")
    check_codecs(config)
    entries = read_entries(options.manifest, options.media, config)
    draft = options.output.with_name(f".{options.output.name}.draft")
    draft.mkdir(parents=True, exist_ok=True)
    planner = ShardPlanner(options.splits, options.shard_bytes, options.shard_samples)

    def report(samples: int) -> None:
        progress("samples checked", samples, planner.num_items if planner.is_complete else None)

    shards = planner.shards(entries)
    counts, refused = write_shards(shards, draft, config, options.num_workers, report)
    rejected = planner.rejected + refused
    written = sorted(name for name, samples in counts.items() if samples)
    # An interrupted run with other options may have left shards that this one does not have.
    for file in draft.iterdir():
        if file.name not in {*written, SUMMARIES}:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    with (draft / REJECTED).open("w", encoding="utf-8") as stream:
        for rejection in sorted(rejected, key=lambda rejection: rejection["place"]):
            stream.write(json.dumps(rejection) + "\n")
    samples: Counter[str] = Counter()
    for name in written:
        samples[name.rpartition("-")[0]] += counts[name]
    if not written or len(rejected) > samples.total():
        listing = options.output.with_name(f"{options.output.name}.{REJECTED}")
        shutil.copy(draft / REJECTED, listing)
        shutil.rmtree(draft)
        raise ValueError(_too_many_refused(options.manifest, samples.total(), rejected, config))
    index_shards(draft, written, list(options.splits), options.num_workers)
    about = {
        "manifest": options.manifest.name,
        "model": config.name,
        **(dataclasses.asdict(options.model) if options.model else {}),
        "samples": dict(samples),
        "shards": len(written),
        "rejected": len(rejected),
    }
    (draft / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if options.tokenizer:
        copy_tokenizer(options.tokenizer, draft)
    copy_codecs(config, draft)
    shutil.rmtree(draft / SUMMARIES)
    if options.output.exists():
        shutil.rmtree(options.output)
    draft.rename(options.output)
    return about


def _too_many_refused(
    manifest: Path, num_samples: int, rejected: Sequence[Rejected], config: MimoConfig
) -> str:
    if not num_samples:
        first = rejected[0]["reason"] if rejected else "it is empty"
        return f"--manifest {manifest}: no sample could be used; the first: {first}"
    reasons = Counter(generic_reason(rejection["reason"]) for rejection in rejected)
    common = "; ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(3))
    return (
        f"--manifest {manifest}: {config.name} can use {num_samples:,} samples of "
        f"{num_samples + len(rejected):,}, less than half ({common}); choose another "
        "--model-provider or mend the samples"
    )


def generic_reason(reason: str) -> str:
    """A reason without the file or sample that it begins with, so that equal ones are counted."""
    source, _, rest = reason.partition(": ")
    # A colon inside parentheses belongs to a library's own message.
    return rest if rest and "(" not in source else reason


@dataclass(frozen=True)
class Item:
    """An entry with the name that its parts have in the shard."""

    key: str
    entry: Entry


@dataclass
class Shard:
    """A shard that is being filled; `num_bytes` is the size of its media's files."""

    name: str
    items: list[Item] = field(default_factory=list)
    num_bytes: int = 0

    def digest(self, config: MimoConfig) -> str:
        """A digest of what goes into the shard and of the model that checks it."""
        digest = hashlib.sha256(repr(config).encode())
        for item in self.items:
            line: list[object] = [
                item.key,
                item.entry.place,
                item.entry.record,
                repr(item.entry.find),
            ]
            line += [_stamp(item.entry, name) for name in _files(item.entry)]
            digest.update(json.dumps(line, sort_keys=True, default=str).encode())
        return digest.hexdigest()


@dataclass
class ShardPlanner:
    """Assigns entries to shards of at most `shard_bytes` and `shard_samples`, by split."""

    splits: dict[str, float]
    shard_bytes: int
    shard_samples: int
    rejected: list[Rejected] = field(default_factory=list)
    num_items: int = 0
    is_complete: bool = False
    _times_used: Counter[str] = field(default_factory=Counter)
    _open: dict[str, Shard] = field(default_factory=dict)
    _num_shards: Counter[str] = field(default_factory=Counter)

    def shards(self, entries: Iterable[Entry]) -> Iterator[Shard]:
        """Shards as soon as they are full, and at the end the partly filled ones."""
        for entry in entries:
            item = self._item(entry)
            if item is None:
                continue
            self.num_items += 1
            split = split_of(entry.record["key"], self.splits)
            if split not in self._open:
                self._open[split] = Shard(f"{split}-{self._num_shards[split]:06d}.tar")
                self._num_shards[split] += 1
            shard = self._open[split]
            shard.items.append(item)
            shard.num_bytes += sum(_stamp(entry, name)[0] for name in _files(entry))
            if shard.num_bytes >= self.shard_bytes or len(shard.items) >= self.shard_samples:
                yield self._open.pop(split)
        self.is_complete = True
        yield from self._open.values()

    def _item(self, entry: Entry) -> Item | None:
        key, reason = "", entry.problem
        if not reason:
            key = entry.record["key"]
            self._times_used[key] += 1
            if self._times_used[key] > 1 and not entry.may_repeat:
                reason = f"the key {key} was used before"
        if reason:
            self.rejected.append({"place": entry.place, "key": key, "reason": reason})
            return None
        return Item(_part_name(key, self._times_used[key]), entry)


def _part_name(key: str, times_used: int) -> str:
    """How a sample's parts are named: by its key if a file can be, else by part of it and a hash.

    Dots separate a sample's name from a part's, so a key that holds one is changed too.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", key)[:60]
    if name == key and times_used == 1:
        return name
    digest = hashlib.sha256(f"{key}\n{times_used}".encode()).hexdigest()
    return f"{name}-{digest[:12]}"


def split_of(key: str, splits: dict[str, float]) -> str:
    """The split of a key: always the same, since its hash decides, however the data grow."""
    position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    position *= sum(splits.values())
    for name, share in splits.items():
        if position < share:
            return name
        position -= share
    return next(reversed(splits))


def _files(entry: Entry) -> list[str]:
    """The names of files in a record."""
    lists = [value for value in entry.record.values() if isinstance(value, list)]
    names = [name for value in lists for name in value if isinstance(name, str)]
    return names + files_of_parts(conversation_of(entry.record))


def _stamp(entry: Entry, name: str) -> tuple[int, int]:
    """Size of a file and when it changed; of a part of a tar file, its offset; 0 if missing."""
    if isinstance(entry.find, TarParts):
        offset, size = entry.find.extent(name)
        return size, offset
    try:
        status = os.stat(entry.find(name))  # type: ignore[arg-type]
    except (ValueError, OSError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


def write_shards(
    shards: Iterable[Shard],
    draft: Path,
    config: MimoConfig,
    num_workers: int,
    report: Callable[[int], None],
) -> tuple[dict[str, int], list[Rejected]]:
    """Samples by shard, and what was refused; `report` is told how many entries are done."""
    (draft / SUMMARIES).mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    rejected: list[Rejected] = []

    def collect(done: Iterable[concurrent.futures.Future[dict[str, Any]]]) -> None:
        for future in done:
            summary = future.result()
            counts[summary["name"]] = summary["samples"]
            rejected.extend(summary["rejected"])
            report(sum(counts.values()) + len(rejected))

    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
        pending: set[concurrent.futures.Future[dict[str, Any]]] = set()
        for shard in shards:
            pending.add(pool.submit(write_shard, shard, draft, config))
            # The manifest is read no faster than shards are written, so memory stays bounded.
            if len(pending) > num_workers:
                done, pending = concurrent.futures.wait(
                    pending, return_when=concurrent.futures.FIRST_COMPLETED
                )
                collect(done)
        collect(concurrent.futures.as_completed(pending))
    return counts, rejected


def write_shard(shard: Shard, draft: Path, config: MimoConfig) -> dict[str, Any]:
    """The summary of one shard, which is written unless an earlier run has finished it."""
    summary_file = draft / SUMMARIES / f"{shard.name}.json"
    digest = shard.digest(config)
    if summary_file.is_file():
        known = json.loads(summary_file.read_text(encoding="utf-8"))
        if known["digest"] == digest:
            return known
        summary_file.unlink()
    rejected: list[Rejected] = []
    samples = 0
    # Renaming is atomic, so a shard or summary under its final name is complete.
    unfinished = draft / f"{shard.name}.unfinished"
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for item in shard.items:
            try:
                parts = checked_parts(item.entry, config)
            # A damaged file can make a decoder fail in any way; only this sample is lost.
            except Exception as error:
                key = item.entry.record["key"]
                reason = error_reason(error).removeprefix(f"sample {key}: ")
                rejected.append({"place": item.entry.place, "key": key, "reason": reason})
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


def checked_parts(entry: Entry, config: MimoConfig) -> dict[str, bytes]:
    """The parts of a sample by name, after `config`'s encoders and codecs have read all its media.

    ValueError for a malformed conversation, for placeholders without files or the other way round,
    and for files that cannot be read.
    """
    record = dict(entry.record)
    turns = parse_turns(conversation_of(record), config)
    if not any(turn.role == ASSISTANT for turn in turns):
        raise ValueError("no turn is an answer")
    media = find_media(turns, record, config, entry.find)
    parts: dict[str, bytes] = {}
    for modality, sources in media.items():
        names = []
        outputs = output_places(turns, modality)
        for number, (source, is_output) in enumerate(zip(sources, outputs, strict=True)):
            blob = _read_file(source)
            if is_output:
                config.outputs[modality].tokens_of(blob)
            else:
                config.inputs[modality].encoder.read(blob)
            suffix = Path(str(source)).suffix.lower()
            has_suffix = re.fullmatch(r"\.[a-z0-9]{1,8}", suffix)
            names.append(f"{modality}.{number}{suffix if has_suffix else ''}")
            parts[names[-1]] = blob.data
        if names:
            record[modality] = names
    record.pop("messages", None)  # the other name of the same turns
    record["conversations"] = without_files(conversation_of(entry.record))
    record.pop("messages", None)  # the other name of the turns
    return {"json": json.dumps(record, ensure_ascii=False).encode(), **parts}


def without_files(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns that parse, without the files that their parts name; the places stay."""
    bare = []
    for turn in conversation:
        name = "content" if turn.get("value") is None else "value"
        content = turn.get(name)
        if isinstance(content, list):
            content = [p if p["type"] == "text" else {"type": p["type"]} for p in content]
        bare.append({**turn, name: content})
    return bare


def _read_file(source: Source) -> Blob:
    if isinstance(source, Blob):
        return source
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    size = source.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{source}: {size:,} bytes, more than {MAX_FILE_BYTES:,}")
    return Blob(str(source), source.read_bytes())


def index_shards(
    folder: Path, shards: Sequence[str], splits: Sequence[str], num_workers: int
) -> None:
    """Writes energon's index of shards that are named SPLIT-NUMBER: where their samples begin."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    # Its own progress goes to stdout, which is for results.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        BaseWebdatasetFactory.prepare_dataset(
            folder,
            list(shards),
            split_parts_patterns=[(split, f"{split}-[0-9]*") for split in splits],
            workers=num_workers,
        )
    (folder / META / "dataset.yaml").write_text(yaml.dump(CRUDE), encoding="utf-8")
