"""Import: Hugging Face folders to one distributed checkpoint, loadable at any TP x PP.

A part without a folder starts with random weights, as Megatron would initialise it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import sharded_state_dict_default

from examples.mimo.checkpoint.description import RELEASE, TRACKER, save_description
from examples.mimo.checkpoint.integrity import write_manifest
from examples.mimo.checkpoint.loading import language_transformer_config, sharding_metadata
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import listed_end_ids
from examples.mimo.hf.io import (
    CONFIG,
    OUTPUT_IDS,
    OWN_MODEL_TYPE,
    REMAINDER,
    Chunk,
    Folder,
    draft_folder,
    output_ids,
    write_checkpoint,
)
from examples.mimo.hf.weights import (
    REMEDY,
    Family,
    WeightMapping,
    families_for,
    family_of,
    unchosen,
)
from examples.mimo.model.mimo import language_spec
from examples.mimo.model.parts import is_empty_state, part_config_of, part_names, part_prefix

# What a user is told while a conversion runs, a line at a time.
Progress = Callable[[str], None]
# Megatron key -> the pieces of that tensor.
ShardedTensors = dict[str, list[ShardedTensor]]
# Flat positions in a tensor, and the values there.
Elements = tuple[torch.Tensor, torch.Tensor]


def initialize_single_process(seed: int) -> None:
    """Set up Megatron's parallel state for one process that communicates with no other."""
    if not parallel_state.model_parallel_is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def from_hf(
    config: MimoConfig,
    folders: Mapping[str, Folder],
    save: Path,
    progress: Progress,
    chosen: Collection[str] = (),
) -> None:
    """Write the checkpoint `save` from the folders of the parts that have one.

    What a folder's preprocessor_config.json says of an encoder's inputs goes into the config, but
    for the fields named in `chosen`, such as `images.encoder.fit`.

    ValueError, one line, and nothing at `save`, when a folder's names, shapes or sizes are not
    those of `config`. All are checked before the first tensor is read.
    """
    config, preprocessors = _with_preprocessors(config, folders, progress, chosen)
    language = folders.get("language")
    if language:  # its tokenizer is read later, by whoever trains or answers
        listed_end_ids(language.path, config.language.vocab_size)
    chunks: list[Chunk] = []
    objects: list[ShardedObject] = []
    sources: dict[str, Any] = {}
    with draft_folder(save) as draft:
        for part in part_names(config):
            folder = folders.get(part)
            tensors, part_objects = sharded_state(config, part, "meta" if folder else "cpu")
            objects += part_objects
            if folder is None:
                progress(f"{part}: starts with random weights, as no folder is given for it")
                chunks += _initialized(tensors)
            elif folder.model_type == OWN_MODEL_TYPE:
                progress(f"{part}: this package's own names, from {folder.path}")
                chunks += _read_own(config, part, folder, tensors)
            else:
                part_config = part_config_of(config, part)
                family = family_of(folder.model_type, part_config, str(folder.path))
                hf_config = folder.hf_config(family)
                where = f"{folder.path}/{CONFIG}"
                check(part_config, family, hf_config, where, f"{config.name}'s {part}")
                if part == "language":
                    check_vocabulary(config, hf_config, where)
                progress(f"{part}: {family.name} from {folder.path}")
                prefix = part_prefix(part)
                chunks += _read_family(part_config, family, hf_config, folder, prefix, tensors)
                sources[part] = {"model_type": family.name, "config": hf_config.to_dict()}
                if part in preprocessors:
                    sources[part]["preprocessor"] = preprocessors[part]
        (draft / RELEASE).mkdir()
        write_checkpoint(draft / RELEASE, chunks, objects)
        write_manifest(draft / RELEASE)
        save_description(draft, config, language.path if language else None, sources)
        (draft / TRACKER).write_text(RELEASE)


def _with_preprocessors(
    config: MimoConfig,
    folders: Mapping[str, Folder],
    progress: Progress,
    chosen: Collection[str],
) -> tuple[MimoConfig, dict[str, dict[str, Any]]]:
    """`config` with what the folders' preprocessors say, and those by part."""
    modalities = dict(config.modalities)
    found: dict[str, dict[str, Any]] = {}
    for name, modality in config.inputs.items():
        part = f"{name}.encoder"
        folder = folders.get(part)
        if folder is None or folder.model_type == OWN_MODEL_TYPE:
            continue
        encoder: Any = modality.encoder
        family = family_of(folder.model_type, encoder, str(folder.path))
        preprocessor = folder.preprocessor(family)
        if preprocessor is None or family.preprocessor is None:
            continue
        file, found[part] = preprocessor
        where = f"{folder.path}/{file}"
        fields = family.preprocessor.fields(found[part], encoder, where, f"{config.name}'s {part}")
        changes = {
            field: value
            for field, value in unchosen(fields, part, chosen).items()
            if value != getattr(encoder, field)
        }
        if changes:
            said = ", ".join(f"{field} {value}" for field, value in changes.items())
            progress(f"{part}: as {file} says, {said}")
        try:
            encoder = dataclasses.replace(encoder, **changes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; {REMEDY}") from None
        modalities[name] = dataclasses.replace(modalities[name], encoder=encoder)
    return dataclasses.replace(config, modalities=modalities), found


def modalities_that_take(model_type: str, config: MimoConfig) -> list[str]:
    """The modalities whose encoder takes weights out of a folder of this model type."""
    return [
        name
        for name, modality in config.inputs.items()
        if any(model_type in family.sections for family in families_for(modality.encoder))
    ]


def sharded_state(
    config: MimoConfig, part: str, device: str
) -> tuple[ShardedTensors, list[ShardedObject]]:
    """What Megatron saves of a part: its tensors by key, and the objects beside them.

    On `device` "meta" the tensors have shapes and no memory; on "cpu" they are initialised.
    Layers are local ones, which have the names of Transformer Engine's and need no GPU.
    """
    transformer_config = language_transformer_config(
        config.language, 1, 1, torch.float32, local_layers=True
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device(device):
        module = build_part(config, part, transformer_config, groups)
    prefix, metadata = part_prefix(part), sharding_metadata()
    state: dict[str, Any] = {"part": sharded_state_dict_default(module, prefix, metadata=metadata)}
    apply_factories(state)
    tensors: ShardedTensors = {}
    objects = []
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            tensors.setdefault(value.key, []).append(value)
        elif isinstance(value, ShardedObject) and not is_empty_state(value.key, value):
            objects.append(value)
    return tensors, objects


def check(part_config: Any, family: Family, hf_config: Any, where: str, part: str) -> None:
    """ValueError naming field and both values where a config.json does not describe the part."""
    for name, required in family.required.items():
        value = getattr(hf_config, name, required)
        if not _same(value, required):
            raise ValueError(
                f"{where}: {name} is {value!r}, but {family.name} is built with {required!r}"
            )
    for name, value in family.fields(hf_config).items():
        expected = getattr(part_config, name)
        if not _same(value, expected):
            raise ValueError(f"{where}: {name} is {value!r}, but {part} has {expected!r}")


def check_vocabulary(config: MimoConfig, hf_config: Any, where: str) -> None:
    """ValueError unless the tokens of a config.json are the text's, or the text's and all codes."""
    ids, ours = getattr(hf_config, OUTPUT_IDS, {}), output_ids(config)
    if ids and ids != ours:
        raise ValueError(f"{where}: {OUTPUT_IDS} is {ids}, but {config.name} has {ours or 'none'}")
    size, most = hf_config.vocab_size, config.vocab_size if ids else config.language.vocab_size
    if size > most:
        raise ValueError(
            f"{where}: vocab_size is {size}, but {config.name}'s language has {most}"
            + " for text" * bool(config.outputs)
        )


def _same(value: Any, expected: Any) -> bool:
    """Equal, numbers up to what a float32 keeps: some formats store them so."""
    if isinstance(value, float) and isinstance(expected, (int, float)):
        return math.isclose(value, expected, rel_tol=1e-6)
    return value == expected


def _initialized(tensors: ShardedTensors) -> Iterator[Chunk]:
    for key, pieces in tensors.items():
        for piece in pieces:
            assert piece.data is not None
            yield Chunk(
                key,
                tuple(piece.global_offset),
                (*[1] * piece.prepend_axis_num, *piece.local_shape),
                tuple(piece.global_shape),
                piece.data.dtype,
                functools.partial(torch.Tensor.detach, piece.data),
            )


def _read_own(
    config: MimoConfig, part: str, folder: Folder, tensors: ShardedTensors
) -> Iterator[Chunk]:
    """Chunks of a folder whose tensors have Megatron's names and shapes, all layers in one."""
    part_config = part_config_of(config, part)
    # As config.json has them: JSON knows no tuples.
    expected = json.loads(json.dumps(dataclasses.asdict(part_config)))
    for field in dataclasses.fields(part_config):
        value = folder.settings.get(field.name)
        if field.metadata.get("shapes_weights", True) and value != expected[field.name]:
            raise ValueError(
                f"{folder.path}/{CONFIG}: {field.name} is {value!r}, but {config.name}'s {part} "
                f"has {expected[field.name]!r}"
            )
    shapes = {
        key.removeprefix(part_prefix(part)): tuple(pieces[0].global_shape)
        for key, pieces in tensors.items()
    }
    for name in sorted(set(folder.tensors) - set(shapes)):
        raise ValueError(f"{folder.path}: tensor {name} has no place in {config.name}'s {part}")
    for name, shape in shapes.items():
        _check_shape(folder, name, name, shape)
    for name, shape in shapes.items():
        yield Chunk(
            part_prefix(part) + name,
            (0,) * len(shape),
            shape,
            shape,
            folder.dtype(name),
            functools.partial(folder.tensor, name),
        )


def _read_family(
    part_config: Any,
    family: Family,
    hf_config: Any,
    folder: Folder,
    prefix: str,
    tensors: ShardedTensors,
) -> Iterator[Chunk]:
    """A chunk for each mapping and layer; every tensor on either side must be accounted for."""
    names = folder.names(family)
    read: set[str] = set()
    mappings = family.mappings(part_config, hf_config)
    mapped = {prefix + mapping.ours for mapping in mappings}
    assert mapped == set(tensors), (
        mapped ^ set(tensors),
        "the family's mappings are not this model's",
    )
    remainder = _checked_remainder(folder, prefix, tensors)
    chunks = []
    for mapping in mappings:
        key = prefix + mapping.ours
        whole = tuple(tensors[key][0].global_shape)
        shape = whole[1:] if mapping.layered else whole
        hf_tensors = mapping.layout.split(torch.empty(shape, device="meta"))
        for layer in range(family.num_layers(part_config)) if mapping.layered else [None]:
            hf_names = [name.format(i=layer) for name in mapping.theirs]
            read.update(hf_names)
            for name, tensor in zip(hf_names, hf_tensors, strict=True):
                _check_shape(folder, names.get(name, ""), name, tuple(tensor.shape))
            files_names = [names[name] for name in hf_names]
            first = (layer or 0) * math.prod(shape)
            rest = _within(remainder.get(mapping.ours), first, first + math.prod(shape))
            chunks.append(
                Chunk(
                    key,
                    (layer, *[0] * len(shape)) if layer is not None else (0,) * len(shape),
                    (1, *shape) if layer is not None else shape,
                    whole,
                    folder.dtype(files_names[0]),
                    functools.partial(_join, folder, files_names, mapping, rest),
                )
            )
    _check_leftovers(part_config, family, folder, names, read)
    return iter(chunks)


def _checked_remainder(folder: Folder, prefix: str, tensors: ShardedTensors) -> dict[str, Elements]:
    """What the folder's `REMAINDER` has of each tensor; ValueError when it is of another part."""
    stored = folder.remainder()
    remainder = {}
    for name in [name for name in stored if f"{name}.at" in stored]:
        positions = stored[f"{name}.at"]
        pieces = tensors.get(prefix + name)
        size = math.prod(pieces[0].global_shape) if pieces else 0
        if (
            positions.shape != stored[name].shape
            or not ((positions >= 0) & (positions < size)).all()
        ):
            raise ValueError(
                f"{folder.path}/{REMAINDER}: {name} does not fit this part; remove the file if "
                "the folder was changed"
            )
        remainder[name] = positions, stored[name]
    return remainder


def _within(elements: Elements | None, start: int, stop: int) -> Elements | None:
    """Those from `start` to `stop`, counted from `start`."""
    if elements is None:
        return None
    positions, values = elements
    inside = (positions >= start) & (positions < stop)
    return positions[inside] - start, values[inside]


def _join(
    folder: Folder, names: list[str], mapping: WeightMapping, rest: Elements | None
) -> torch.Tensor:
    tensor = mapping.layout.join([folder.tensor(name) for name in names])
    if rest is None:
        return tensor
    positions, values = rest
    tensor = tensor.clone()
    tensor.view(-1)[positions] = values.to(tensor.dtype)
    return tensor


def _check_shape(folder: Folder, stored_name: str, name: str, expected: tuple[int, ...]) -> None:
    if stored_name not in folder.tensors:
        raise ValueError(f"{folder.path}: tensor {name} is missing")
    shape = folder.tensors[stored_name].shape
    if shape != expected:
        raise ValueError(f"{folder.path}: {name} has shape {shape}, but {expected} is needed")


def _check_leftovers(
    part_config: Any, family: Family, folder: Folder, names: dict[str, str], read: set[str]
) -> None:
    """ValueError for a tensor that was not read and is not known to be unused."""
    fixed = family.fixed(part_config)
    for name, table in fixed.items():
        if name in names and not torch.allclose(
            folder.tensor(names[name]).float(), table, atol=1e-3
        ):
            raise ValueError(f"{folder.path}: {name} differs from the fixed table it should be")
    num_layers = family.num_layers(part_config)
    for name in sorted(set(names) - read - set(fixed)):
        layer = re.search(r"layers?\.(\d+)\.", name)
        # Layers behind the one whose features are used are not built.
        not_built = layer is not None and int(layer[1]) >= num_layers
        if not not_built and not any(re.fullmatch(pattern, name) for pattern in family.unused):
            raise ValueError(
                f"{folder.path}: tensor {name} has no place in a {family.name}; this is another "
                "architecture"
            )


def build_part(
    config: MimoConfig, part: str, transformer_config: TransformerConfig, pg_collection: Any
) -> torch.nn.Module:
    """One part by its name (`images.encoder`, `images.projector`, `language`), whole."""
    if part == "language":
        language = config.built_language
        spec = language_spec(language, transformer_config, pg_collection, True, True, None)
        return build_module(spec)
    name, side = part.split(".")
    modality = config.inputs[name]
    if side == "encoder":
        return modality.encoder.build(transformer_config, pg_collection)
    return modality.projector.build(modality.encoder.output_size, transformer_config, pg_collection)
