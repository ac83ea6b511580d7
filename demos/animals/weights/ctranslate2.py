"""Whisper's encoder from a CTranslate2 model file (format version 6)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file

from examples.mimo.modalities.audio import sinusoids

VERSION = 6
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
MAX_NAME_BYTES, MAX_RANK = 1024, 8

# CTranslate2's name inside a layer -> Hugging Face's.
LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
ENDING = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def read_variables(file: Path, prefix: str) -> dict[str, np.ndarray]:
    """The variables whose names begin with `prefix`; sizes are checked before they are read."""
    size = file.stat().st_size
    variables = {}
    with file.open("rb") as stream:
        (version,) = _unpack(stream, "<I", file)
        if version != VERSION:
            raise ValueError(f"{file}: CTranslate2 format {version}; {VERSION} is read")
        _name(stream, file)
        _, count = _unpack(stream, "<II", file)
        for _ in range(count):
            name = _name(stream, file)
            (rank,) = _unpack(stream, "<B", file)
            if rank > MAX_RANK:
                raise ValueError(f"{file}: {name} has {rank} dimensions; the file is damaged")
            shape = _unpack(stream, f"<{rank}I", file)
            kind, num_bytes = _unpack(stream, "<BI", file)
            if kind not in DTYPES or stream.tell() + num_bytes > size:
                raise ValueError(f"{file}: {name} does not fit the file; it is damaged")
            data = stream.read(num_bytes) if name.startswith(prefix) else b""
            if name.startswith(prefix):
                variables[name] = np.frombuffer(data, DTYPES[kind]).reshape(shape)
            else:
                stream.seek(num_bytes, 1)
    return variables


def write_whisper(file: Path, folder: Path) -> None:
    """The encoder as a Hugging Face folder, in float32."""
    from transformers import WhisperConfig

    variables = read_variables(file, "encoder/")
    tensors: dict[str, torch.Tensor] = {}
    for name, values in variables.items():
        if not np.issubdtype(values.dtype, np.floating):
            continue
        for ours, tensor in _tensors(name.removeprefix("encoder/"), values):
            tensors[f"model.encoder.{ours}"] = tensor
    width, mels, _ = tensors["model.encoder.conv1.weight"].shape
    layers = sum(name.endswith("fc1.weight") for name in tensors)
    config = WhisperConfig(
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=layers,
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        encoder_ffn_dim=tensors["model.encoder.layers.0.fc1.weight"].shape[0],
        max_source_positions=tensors["model.encoder.embed_positions.weight"].shape[0],
        decoder_layers=0,
        architectures=["WhisperEncoder"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensors(name: str, values: np.ndarray) -> list[tuple[str, torch.Tensor]]:
    tensor = torch.from_numpy(values.astype(np.float32))
    if name == "position_encodings/encodings":
        # Whisper's table is exact; the file keeps it rounded to fp16.
        return [("embed_positions.weight", sinusoids(*tensor.shape))]
    path, _, ending = name.rpartition("/")
    if not path.startswith("layer_") or path == "layer_norm":
        return [(f"{path}.{ENDING[ending]}", tensor)]
    layer, _, inside = path.partition("/")
    ours = f"layers.{layer.removeprefix('layer_')}."
    if inside != "self_attention/linear_0":
        return [(f"{ours}{LAYER[inside]}.{ENDING[ending]}", tensor)]
    projections = zip("qkv", tensor.chunk(3), strict=True)
    # Whisper's keys have no bias; CTranslate2 keeps zeros in its place.
    kept = [(side, part) for side, part in projections if (side, ending) != ("k", "bias")]
    return [(f"{ours}self_attn.{side}_proj.{ending}", part.clone()) for side, part in kept]


def _unpack(stream: BinaryIO, form: str, file: Path) -> tuple[int, ...]:
    data = stream.read(struct.calcsize(form))
    if len(data) < struct.calcsize(form):
        raise ValueError(f"{file}: ends too soon; it is damaged")
    return struct.unpack(form, data)


def _name(stream: BinaryIO, file: Path) -> str:
    (length,) = _unpack(stream, "<H", file)
    data = stream.read(length)
    if not 0 < length <= MAX_NAME_BYTES or len(data) < length:
        raise ValueError(f"{file}: a name of {length} bytes; it is damaged")
    return data[:-1].decode("utf-8", errors="replace")
