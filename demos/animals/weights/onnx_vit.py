"""A DINOv2 backbone from an ONNX graph that was traced with its names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import interpolate

ROOT = "backbone."
IMAGE_SIZE = 224


def write_dinov2(file: Path, folder: Path, image_size: int = IMAGE_SIZE) -> None:
    """A Hugging Face folder in float32, its position table resized for `image_size` pixels."""
    from transformers import Dinov2Config

    tensors = _backbone(file)
    width, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    positions = tensors["embeddings.position_embeddings"]
    side = image_size // patch
    tensors["embeddings.position_embeddings"] = resize_positions(positions, side)
    layers = sum(name.endswith("mlp.fc1.weight") for name in tensors)
    inner = tensors["encoder.layer.0.mlp.fc1.weight"].shape[0]
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        mlp_ratio=inner // width,
        image_size=image_size,
        patch_size=patch,
        architectures=["Dinov2Model"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def resize_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """(1, 1 + n * n, H) -> (1, 1 + side * side, H), bicubic, as DINOv2 resizes its table."""
    first, table = positions[:, :1], positions[:, 1:]
    old = round(table.shape[1] ** 0.5)
    grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _backbone(file: Path) -> dict[str, torch.Tensor]:
    """Hugging Face name -> tensor; the tracer renamed the weights of products and the positions."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        from demos.animals.weights import INSTALL

        raise ValueError(f"the package onnx is not installed; {INSTALL}") from None
    graph = onnx.load(str(file)).graph
    values = {
        entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy())
        for entry in graph.initializer
    }
    tensors = {n.removeprefix(ROOT): t for n, t in values.items() if n.startswith(ROOT)}
    for node in graph.node:
        path = node.name.strip("/").replace("/", ".")
        if node.op_type == "MatMul" and path.startswith(ROOT) and node.input[1] in values:
            name = path.removeprefix(ROOT).removesuffix(".MatMul")
            tensors[f"{name}.weight"] = values[node.input[1]].T
    width = tensors["embeddings.cls_token"].shape[-1]
    tables = [t for n, t in values.items() if n.startswith("onnx::") and t.shape[:1] == (1,)]
    tables = [t for t in tables if t.ndim == 3 and t.shape[-1] == width]
    if len(tables) != 2:
        raise ValueError(f"{file}: {len(tables)} position tables, but 2 are expected")
    tensors["embeddings.position_embeddings"] = torch.cat(
        sorted(tables, key=lambda table: table.shape[1]), dim=1
    )
    return tensors
