"""Parts of a model: what they are called, and which do not train."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.models.mimo import ENCODER, StageMimoModel


def part_names(config: MimoConfig) -> list[str]:
    """`images.encoder`, `images.projector`, ..., `language`."""
    sides = [f"{name}.{side}" for name in config.modalities for side in ("encoder", "projector")]
    return [*sides, "language"]


def check_freeze(names: Iterable[str], config: MimoConfig) -> None:
    """ValueError for a name that is no part of the model."""
    known = part_names(config)
    for name in names:
        if name not in known:
            raise ValueError(f"--freeze {name}: {config.name} has the parts {', '.join(known)}")


def parts(model: StageMimoModel) -> dict[str, torch.nn.Module]:
    """The parts that this stage holds."""
    found: dict[str, torch.nn.Module] = {}
    for name, modality in model.modality_submodules.items():
        found[f"{name}.encoder"] = modality.encoders[ENCODER]
        found[f"{name}.projector"] = modality.input_projections[0]
    if model.language_model is not None:
        found["language"] = model.language_model
    return found


def freeze_parts(model: StageMimoModel, names: Iterable[str]) -> None:
    """Stop the named parts from training; gradients still flow through them."""
    held = parts(model)
    for name in names:
        if name in held:
            held[name].requires_grad_(False)
