"""A distributed checkpoint -> a Hugging Face folder for each part, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from examples.mimo.checkpoint.description import Checkpoint
from examples.mimo.checkpoint.families import family_for_export, family_of
from examples.mimo.checkpoint.families.rows import Family
from examples.mimo.checkpoint.folder import INDEX, SINGLE
from examples.mimo.checkpoint.from_hf import part_config
from examples.mimo.checkpoint.stream import Reader
from examples.mimo.data.tokenizer import copy_tokenizer
from examples.mimo.models.mimo import part_prefix
from examples.mimo.training.freezing import part_names

SHARD_BYTES = 2 * 2**30


def convert(checkpoint: Checkpoint, save: Path, progress: Callable[[str], None]) -> None:
    """Write `save`/PART for every part of the checkpoint; transformers loads all but projectors."""
    if save.exists() and any(save.iterdir()):
        raise ValueError(f"--save {save}: this folder is not empty; name a new one")
    reader = Reader(checkpoint.weights)
    for part in part_names(checkpoint.config):
        ours = part_config(checkpoint.config, part)
        family, theirs = _their_config(checkpoint, part, ours)
        folder = save / part
        folder.mkdir(parents=True)
        kind = _write_tensors(folder, _tensors(reader, part, ours, family, theirs))
        _write_config(folder, family, ours, theirs, kind)
        progress(f"{part}: {family.name} in {folder}")
    if checkpoint.tokenizer.is_dir():
        copy_tokenizer(checkpoint.tokenizer, save / "language")


def _their_config(checkpoint: Checkpoint, part: str, ours: Any) -> tuple[Family, Any]:
    """What the part's config.json was, else one made from ours."""
    source = checkpoint.sources.get(part)
    if source is None:
        family = family_for_export(ours)
        return family, family.config(ours) if family.config else None
    from transformers import CONFIG_MAPPING

    family = family_of(source["model_type"], ours, f"{checkpoint.folder}: {part}")
    values = dict(source["config"])
    return family, CONFIG_MAPPING[values.get("model_type", family.name)].from_dict(values)


def _tensors(
    reader: Reader, part: str, ours: Any, family: Family, theirs: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    for row in family.table(ours, theirs):
        tensor = reader.tensor(part_prefix(part) + row.ours)
        layers = list(enumerate(tensor)) if row.layered else [(None, tensor)]
        for layer, piece in layers:
            for name, found in zip(row.theirs, row.layout.split(piece), strict=True):
                yield name.format(i=layer), found
    yield from family.fixed(ours).items()


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> torch.dtype:
    """Files of at most `SHARD_BYTES`, or one tensor; the type of the first tensor."""
    shard: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    kind = None
    for name, tensor in tensors:
        kind = kind or tensor.dtype
        size = sum(t.nbytes for t in shard.values())
        if shard and size + tensor.nbytes > SHARD_BYTES:
            _save(folder, shard, where)
        shard[name] = tensor.contiguous().clone()
    _save(folder, shard, where)
    assert kind is not None
    files = sorted(set(where.values()))
    if len(files) == 1:
        (folder / files[0]).rename(folder / SINGLE)
    else:
        total = sum((folder / file).stat().st_size for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    return kind


def _save(folder: Path, shard: dict[str, torch.Tensor], where: dict[str, str]) -> None:
    file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    where.update(dict.fromkeys(shard, file))
    shard.clear()


def _write_config(folder: Path, family: Family, ours: Any, theirs: Any, kind: torch.dtype) -> None:
    if family.config is None:
        values = {"model_type": family.name, "projector_hidden_act": "gelu"}
        (folder / "config.json").write_text(json.dumps(values, indent=1))
        return
    built = family.config(ours)
    # Layers that were never built, behind the one whose features are used, are not there.
    if hasattr(theirs, "num_hidden_layers"):
        theirs.num_hidden_layers = built.num_hidden_layers
    theirs.architectures = theirs.architectures or built.architectures
    theirs.dtype = kind
    theirs.save_pretrained(folder)
