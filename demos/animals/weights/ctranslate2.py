"""Whisper from a CTranslate2 model file (format version 6)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file

from examples.mimo.modalities.audio import sinusoids

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

VERSION = 6
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
MAX_NAME_BYTES, MAX_RANK = 1024, 8

# CTranslate2's name inside a layer -> Hugging Face's.
LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
# Projections of queries, keys and values in one matrix.
FUSED = {
    "self_attention/linear_0": ("self_attn", "qkv"),
    "attention/linear_0": ("encoder_attn", "q"),
    "attention/linear_1": ("encoder_attn", "kv"),
}
SIDES = ("encoder", "decoder")
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
    tensors = _all_tensors(variables)
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


def load_whisper(file: Path) -> WhisperForConditionalGeneration:
    """The whole recogniser, in float32."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    variables = read_variables(file, "")
    tensors = _all_tensors(variables)
    width, mels, _ = tensors["model.encoder.conv1.weight"].shape
    layers = [sum(name.endswith("fc1.bias") for name in tensors if side in name) for side in SIDES]
    inner = [len(tensors[f"model.{side}.layers.0.fc1.bias"]) for side in SIDES]
    heads = [int(variables[f"{side}/num_heads"]) for side in SIDES]
    positions = [len(tensors[f"model.{side}.embed_positions.weight"]) for side in SIDES]
    config = WhisperConfig(
        vocab_size=len(tensors["model.decoder.embed_tokens.weight"]),
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=layers[0],
        decoder_layers=layers[1],
        encoder_attention_heads=heads[0],
        decoder_attention_heads=heads[1],
        encoder_ffn_dim=inner[0],
        decoder_ffn_dim=inner[1],
        max_source_positions=positions[0],
        max_target_positions=positions[1],
        pad_token_id=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or missing != ["proj_out.weight"]:  # which is tied to the embeddings
        raise ValueError(f"{file}: no Whisper; it lacks {missing} and has {unexpected}")
    model.tie_weights()
    return model


def _all_tensors(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The floating-point variables under Hugging Face's names."""
    tensors: dict[str, torch.Tensor] = {}
    for name, values in variables.items():
        side, _, inside = name.partition("/")
        if np.issubdtype(values.dtype, np.floating):
            tensor = torch.from_numpy(values.astype(np.float32))
            for ours, part in _tensors(side, inside, tensor):
                tensors[f"model.{side}.{ours}"] = part
    return tensors


def _tensors(side: str, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if name == "embeddings/weight":
        return [("embed_tokens.weight", tensor)]
    if name == "position_encodings/encodings":
        # The encoder's table is exact; the file keeps it rounded to fp16.
        is_exact = side == "encoder"
        return [("embed_positions.weight", sinusoids(*tensor.shape) if is_exact else tensor)]
    path, _, ending = name.rpartition("/")
    if not path.startswith("layer_") or path == "layer_norm":
        return [(f"{path}.{ENDING[ending]}", tensor)]
    layer, _, inside = path.partition("/")
    ours = f"layers.{layer.removeprefix('layer_')}."
    if inside not in FUSED:
        return [(f"{ours}{LAYER[inside]}.{ENDING[ending]}", tensor)]
    attention, roles = FUSED[inside]
    projections = zip(roles, tensor.chunk(len(roles)), strict=True)
    # Whisper's keys have no bias; CTranslate2 keeps zeros in its place.
    kept = [(role, part) for role, part in projections if (role, ending) != ("k", "bias")]
    return [(f"{ours}{attention}.{role}_proj.{ending}", part.clone()) for role, part in kept]


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
