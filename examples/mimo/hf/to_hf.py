"""Export: a distributed checkpoint to one Hugging Face folder per part, a tensor at a time.

transformers loads the parts that have a Hugging Face family, all but projectors. Every other part
is written under this package's own names; `from-hf` reads both kinds back.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from examples.mimo.checkpoint.description import Checkpoint
from examples.mimo.checkpoint.integrity import begin_check, finish_check
from examples.mimo.configs import copy_codecs
from examples.mimo.data.tokenizer import copy_tokenizer
from examples.mimo.hf.from_hf import Progress
from examples.mimo.hf.io import (
    CONFIG,
    INDEX,
    OUTPUT_IDS,
    OWN_MODEL_TYPE,
    PREPROCESSOR,
    REMAINDER,
    SINGLE,
    CheckpointReader,
    draft_folder,
    output_ids,
)
from examples.mimo.hf.weights import Family, WeightMapping, family_for_export, family_of
from examples.mimo.model.parts import part_config_of, part_names, part_prefix

SHARD_BYTES = 2 * 2**30
PROCESSOR_TYPES = ("image_processor_type", "feature_extractor_type")


def to_hf(checkpoint: Checkpoint, save: Path, progress: Progress) -> None:
    """Write `save`/PART for every part of the checkpoint; nothing is left there after an error."""
    if checkpoint.verify:
        begin_check(checkpoint.weights, checkpoint.named)
        finish_check(checkpoint.weights)
    reader = CheckpointReader(checkpoint.weights)
    with draft_folder(save) as draft:
        for part in part_names(checkpoint.config):
            folder = draft / part
            folder.mkdir()
            part_config = part_config_of(checkpoint.config, part)
            family, hf_config = _hf_config(checkpoint, part, part_config)
            if family is None:
                _write_own(folder, reader, part, part_config)
                progress(
                    f"{part}: no Hugging Face family describes it, so its tensors keep this "
                    f"package's names in {save / part}"
                )
            else:
                if part == "language" and checkpoint.config.outputs:
                    # All rows, under the ids that they have here.
                    hf_config.vocab_size = checkpoint.config.vocab_size
                    setattr(hf_config, OUTPUT_IDS, output_ids(checkpoint.config))
                _write_family(folder, reader, part, part_config, family, hf_config)
                _write_preprocessor(folder, checkpoint, part, part_config, family)
                progress(f"{part}: {family.name} in {save / part}")
        if checkpoint.tokenizer.is_dir():
            copy_tokenizer(checkpoint.tokenizer, draft / "language")
        copy_codecs(checkpoint.config, draft)


def _hf_config(checkpoint: Checkpoint, part: str, part_config: Any) -> tuple[Family | None, Any]:
    """The part's family and config.json: where it came from, else what describes it, else None."""
    source = checkpoint.sources.get(part)
    if source is None:
        family = family_for_export(part_config)
        return family, family.config(part_config) if family and family.config else None
    from transformers import CONFIG_MAPPING

    family = family_of(source["model_type"], part_config, f"{checkpoint.folder}: {part}")
    values = dict(source["config"])
    return family, CONFIG_MAPPING[values.get("model_type", family.name)].from_dict(values)


def _write_own(folder: Path, reader: CheckpointReader, part: str, part_config: Any) -> None:
    prefix = part_prefix(part)
    keys = [key for key in reader.tensors if key.startswith(prefix)]
    _write_tensors(folder, ((key.removeprefix(prefix), reader.tensor(key)) for key in keys))
    values = {"model_type": OWN_MODEL_TYPE, **dataclasses.asdict(part_config)}
    (folder / CONFIG).write_text(json.dumps(values, indent=1))


def _write_family(
    folder: Path,
    reader: CheckpointReader,
    part: str,
    part_config: Any,
    family: Family,
    hf_config: Any,
) -> None:
    remainder: dict[str, torch.Tensor] = {}
    mappings = family.mappings(part_config, hf_config)
    tensors = _split(reader, part_prefix(part), mappings, remainder)
    # Tables that are computed here are stored there.
    fixed = family.fixed(part_config).items()
    dtype = _write_tensors(folder, itertools.chain(tensors, fixed))
    if remainder:
        save_file(remainder, folder / REMAINDER, metadata={"format": "pt"})
    if family.config is None:
        values = {"model_type": family.name, "projector_hidden_act": "gelu"}
        (folder / CONFIG).write_text(json.dumps(values, indent=1))
        return
    built = family.config(part_config)
    # Layers that were never built, behind the one whose features are used, are not there.
    if hasattr(hf_config, "num_hidden_layers"):
        hf_config.num_hidden_layers = built.num_hidden_layers
    hf_config.architectures = hf_config.architectures or built.architectures
    hf_config.dtype = dtype
    hf_config.save_pretrained(folder)


def _write_preprocessor(
    folder: Path, checkpoint: Checkpoint, part: str, part_config: Any, family: Family
) -> None:
    """The file that the part came with, with what has changed since; else one that describes it."""
    preprocessor = family.preprocessor
    values = preprocessor.values(part_config) if preprocessor else None
    if preprocessor is None or values is None:
        return
    original = checkpoint.sources.get(part, {}).get("preprocessor")
    if isinstance(original, dict):
        where = f"{checkpoint.folder}: {PREPROCESSOR} of {part}"
        fields = preprocessor.fields(original, part_config, where, part)
        is_same = all(getattr(part_config, name) == value for name, value in fields.items())
        # Without its type transformers goes by the model type, which is the encoder's alone here.
        kinds = {name: values[name] for name in PROCESSOR_TYPES if name in values}
        typed = original if any(map(original.get, PROCESSOR_TYPES)) else {**kinds, **original}
        values = typed if is_same else {**typed, **values}
    (folder / PREPROCESSOR).write_text(json.dumps(values, indent=1), encoding="utf-8")


def _split(
    reader: CheckpointReader,
    prefix: str,
    mappings: Iterable[WeightMapping],
    remainder: dict[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face's tensors by name; what of ours they do not hold goes into `remainder`.

    That is the bias of Whisper's keys, which softmax does not see, and the token embeddings
    beyond the vocabulary of an imported config.json.
    """
    for mapping in mappings:
        tensor = reader.tensor(prefix + mapping.ours)
        positions, values = [], []
        for layer, piece in enumerate(tensor) if mapping.layered else [(0, tensor)]:
            hf_tensors = mapping.layout.split(piece)
            for name, hf_tensor in zip(mapping.theirs, hf_tensors, strict=True):
                yield name.format(i=layer), hf_tensor
            lost = (mapping.layout.join(hf_tensors) != piece).flatten()
            positions.append(lost.nonzero().flatten() + layer * piece.numel())
            values.append(piece.flatten()[lost])
        if any(len(positions_of_layer) for positions_of_layer in positions):
            remainder[f"{mapping.ours}.at"] = torch.cat(positions)
            remainder[mapping.ours] = torch.cat(values)


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> torch.dtype | None:
    """Files of at most `SHARD_BYTES`, or one tensor; the type of the first tensor."""
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    files: list[str] = []
    dtype = None

    def save_shard() -> None:
        files.append(f"model-{len(files) + 1:05d}.safetensors")
        save_file(shard, folder / files[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, files[-1]))
        shard.clear()

    for name, tensor in tensors:
        dtype = dtype or tensor.dtype
        size = sum(t.nbytes for t in shard.values())
        if shard and size + tensor.nbytes > SHARD_BYTES:
            save_shard()
        shard[name] = tensor.contiguous().clone()
    save_shard()
    if len(files) == 1:
        (folder / files[0]).rename(folder / SINGLE)
    else:
        total = sum((folder / file).stat().st_size for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    return dtype
