"""Hugging Face folders -> one distributed checkpoint that trains and answers at any TP x PP."""

from __future__ import annotations

import functools
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from examples.mimo.checkpoint import stream
from examples.mimo.checkpoint.building import part_entries
from examples.mimo.checkpoint.description import RELEASE, TRACKER, save_description
from examples.mimo.checkpoint.families import family_of
from examples.mimo.checkpoint.families.rows import Family, Row
from examples.mimo.checkpoint.folder import Folder
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.models.mimo import part_prefix
from examples.mimo.training.freezing import part_names

Progress = Callable[[str], None]


def part_config(config: MimoConfig, part: str) -> Any:
    """The config of one part by its name."""
    if part == "language":
        return config.language
    name, side = part.split(".")
    return getattr(config.modalities[name], side)


def convert(
    config: MimoConfig, folders: Mapping[str, Folder], save: Path, progress: Progress
) -> None:
    """Write `save` from the folders of the parts that have one; the other parts start fresh.

    All names, shapes and sizes are checked before anything is written.
    """
    if save.exists() and any(save.iterdir()):
        raise ValueError(f"--save {save}: this folder is not empty; name a new one")
    chunks: list[stream.Chunk] = []
    objects: list[ShardedObject] = []
    sources: dict[str, Any] = {}
    for part in part_names(config):
        folder = folders.get(part)
        entries, others = part_entries(config, part, "cpu" if folder is None else "meta")
        objects += others
        if folder is None:
            progress(f"{part}: initialised, for no folder gives it")
            chunks += _fresh(entries)
            continue
        ours = part_config(config, part)
        family = family_of(folder.model_type, ours, str(folder.path))
        theirs = folder.section(family)
        check(ours, family, theirs, f"{folder.path}/config.json", f"{config.name}'s {part}")
        progress(f"{part}: {family.name} from {folder.path}")
        chunks += _read(ours, family, theirs, folder, part_prefix(part), entries)
        sources[part] = {"model_type": family.name, "config": theirs.to_dict()}
    _write(save, config, chunks, objects, sources, folders.get("language"))


def check(ours: Any, family: Family, theirs: Any, where: str, part: str) -> None:
    """ValueError naming field and both values where a config.json is not what `ours` is."""
    for name, wanted in family.required.items():
        found = getattr(theirs, name, wanted)
        if not _same(found, wanted):
            raise ValueError(
                f"{where}: {name} is {found!r}, but {family.name} is built with {wanted!r}"
            )
    for name, found in family.fields(theirs).items():
        wanted = getattr(ours, name)
        if not _same(found, wanted):
            raise ValueError(f"{where}: {name} is {found!r}, but {part} has {wanted!r}")
    size = getattr(theirs, "vocab_size", 0)
    if hasattr(ours, "vocab_size") and size > ours.vocab_size:
        raise ValueError(f"{where}: vocab_size is {size}, but {part} has {ours.vocab_size} rows")


def _same(found: Any, wanted: Any) -> bool:
    """Equal, numbers up to what a float32 keeps: some formats store them so."""
    if isinstance(found, float) and isinstance(wanted, (int, float)):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return found == wanted


def _read(
    ours: Any,
    family: Family,
    theirs: Any,
    folder: Folder,
    prefix: str,
    entries: dict[str, list[ShardedTensor]],
) -> Iterator[stream.Chunk]:
    """A chunk for each row and layer; every name on either side must be accounted for."""
    names = folder.names(family)
    asked: set[str] = set()
    table = family.table(ours, theirs)
    found = {prefix + row.ours for row in table}
    assert found == set(entries), (found ^ set(entries), "the family's table is not this model's")
    chunks = []
    for row in table:
        whole = tuple(entries[prefix + row.ours][0].global_shape)
        for layer in range(family.num_layers(ours)) if row.layered else [None]:
            wanted = [name.format(i=layer) for name in row.theirs]
            asked.update(wanted)
            _check_shapes(folder, names, wanted, row, whole)
            read = functools.partial(_join, folder, [names[name] for name in wanted], row)
            dtype = folder.dtype(names[wanted[0]])
            offsets = (layer, *[0] * (len(whole) - 1)) if layer is not None else (0,) * len(whole)
            shape = (1, *whole[1:]) if layer is not None else whole
            chunks.append(stream.Chunk(prefix + row.ours, offsets, shape, whole, dtype, read))
    _check_leftovers(ours, family, folder, names, asked)
    return iter(chunks)


def _join(folder: Folder, names: list[str], row: Row) -> torch.Tensor:
    return row.layout.join([folder.tensor(name) for name in names])


def _check_shapes(
    folder: Folder, names: dict[str, str], wanted: list[str], row: Row, whole: tuple[int, ...]
) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"{folder.path}: tensor {missing[0]} is missing")
    shape = whole[1:] if row.layered else whole
    shapes = [tuple(t.shape) for t in row.layout.split(torch.empty(shape, device="meta"))]
    for name, expected in zip(wanted, shapes, strict=True):
        found = folder.shape(names[name])
        if found != expected:
            raise ValueError(f"{folder.path}: {name} has shape {found}, but {expected} is needed")


def _check_leftovers(
    ours: Any, family: Family, folder: Folder, names: dict[str, str], asked: set[str]
) -> None:
    fixed = family.fixed(ours)
    for name, wanted in fixed.items():
        if name in names and not torch.allclose(
            folder.tensor(names[name]).float(), wanted, atol=1e-3
        ):
            raise ValueError(f"{folder.path}: {name} differs from the fixed table it should be")
    built = family.num_layers(ours)
    for name in sorted(set(names) - asked - set(fixed)):
        layer = re.search(r"layers?\.(\d+)\.", name)
        behind = layer is not None and int(layer[1]) >= built
        if not behind and not any(re.fullmatch(pattern, name) for pattern in family.unused):
            raise ValueError(
                f"{folder.path}: tensor {name} has no place in a {family.name}; this is another "
                "architecture"
            )


def _fresh(entries: dict[str, list[ShardedTensor]]) -> Iterator[stream.Chunk]:
    for key, pieces in entries.items():
        for piece in pieces:
            assert piece.data is not None
            shape = (*[1] * piece.prepend_axis_num, *piece.local_shape)
            yield stream.Chunk(
                key,
                tuple(piece.global_offset),
                shape,
                tuple(piece.global_shape),
                piece.data.dtype,
                functools.partial(torch.Tensor.detach, piece.data),
            )


def _write(
    save: Path,
    config: MimoConfig,
    chunks: list[stream.Chunk],
    objects: list[ShardedObject],
    sources: dict[str, Any],
    language: Folder | None,
) -> None:
    draft = save / f"{RELEASE}.partial"
    draft.mkdir(parents=True)
    try:
        stream.write(draft, chunks, objects)
        save_description(save, config, language.path if language else None, sources)
        draft.rename(save / RELEASE)
        (save / TRACKER).write_text(RELEASE)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
