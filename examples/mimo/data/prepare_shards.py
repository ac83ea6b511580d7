"""A folder of checked shards, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.manifest import read_entries
from examples.mimo.data.mixtures import META
from examples.mimo.data.shard_writer import SUMMARIES, Planner, Rejected, write_shards
from examples.mimo.data.tokenizer import copy_tokenizer

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
