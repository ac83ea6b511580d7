"""The parts of a model one by one on one process, with or without memory behind them.

Hugging Face folders -> one distributed checkpoint that trains and answers at any TP x PP.

A distributed checkpoint -> a Hugging Face folder for each part, tensor by tensor.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.training.checkpointing import _build_sharded_state_dict_metadata
from safetensors.torch import save_file

from examples.mimo.checkpoint.description import RELEASE, TRACKER, Checkpoint, save_description
from examples.mimo.cli.arguments import parse_with_preset
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import copy_tokenizer
from examples.mimo.hf import io
from examples.mimo.hf.io import INDEX, SINGLE, Folder, Reader
from examples.mimo.hf.weights import Family, Row, family_for_export, family_of
from examples.mimo.model.mimo import build_part, part_names, part_prefix
from examples.mimo.training.providers import transformer_config


def start_alone(seed: int) -> None:
    """Parallel state for one process that talks to nobody."""
    if not parallel_state.model_parallel_is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def part_entries(
    config: MimoConfig, part: str, device: str
) -> tuple[dict[str, list[ShardedTensor]], list[ShardedObject]]:
    """What Megatron would save of a part: key -> its pieces, and the objects beside them.

    On `device` "meta" the pieces have shapes and no memory; on "cpu" they are freshly initialised.
    """
    args = parse_with_preset(config, [])
    args.params_dtype = torch.float32
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device(device):
        module = build_part(config, part, transformer_config(args), groups)
    metadata = _build_sharded_state_dict_metadata(args)
    state: dict[str, Any] = {
        "part": sharded_state_dict_default(module, part_prefix(part), metadata=metadata)
    }
    apply_factories(state)
    tensors: dict[str, list[ShardedTensor]] = {}
    objects = []
    for found in nested_values(state):
        if isinstance(found, ShardedTensor):
            tensors.setdefault(found.key, []).append(found)
        elif isinstance(found, ShardedObject):
            objects.append(found)
    return tensors, objects


Progress = Callable[[str], None]


def part_config(config: MimoConfig, part: str) -> Any:
    """The config of one part by its name."""
    if part == "language":
        return config.language
    name, side = part.split(".")
    return getattr(config.modalities[name], side)


def from_hf(
    config: MimoConfig, folders: Mapping[str, Folder], save: Path, progress: Progress
) -> None:
    """Write `save` from the folders of the parts that have one; the other parts start fresh.

    All names, shapes and sizes are checked before anything is written.
    """
    if save.exists() and any(save.iterdir()):
        raise ValueError(f"--save {save}: this folder is not empty; name a new one")
    chunks: list[io.Chunk] = []
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
) -> Iterator[io.Chunk]:
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
            chunks.append(io.Chunk(prefix + row.ours, offsets, shape, whole, dtype, read))
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


def _fresh(entries: dict[str, list[ShardedTensor]]) -> Iterator[io.Chunk]:
    for key, pieces in entries.items():
        for piece in pieces:
            assert piece.data is not None
            shape = (*[1] * piece.prepend_axis_num, *piece.local_shape)
            yield io.Chunk(
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
    chunks: list[io.Chunk],
    objects: list[ShardedObject],
    sources: dict[str, Any],
    language: Folder | None,
) -> None:
    draft = save / f"{RELEASE}.partial"
    draft.mkdir(parents=True)
    try:
        io.write(draft, chunks, objects)
        save_description(save, config, language.path if language else None, sources)
        draft.rename(save / RELEASE)
        (save / TRACKER).write_text(RELEASE)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


SHARD_BYTES = 2 * 2**30


def to_hf(checkpoint: Checkpoint, save: Path, progress: Callable[[str], None]) -> None:
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
        if family is None:
            raise ValueError(f"no Hugging Face family describes {ours}")
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
