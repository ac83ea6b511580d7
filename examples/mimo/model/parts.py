"""Names of a model's parts (`images.encoder`, `images.projector`, `language`), and freezing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from examples.mimo.configs.schema import MimoConfig

if TYPE_CHECKING:
    from examples.mimo.model.mimo import StageMimoModel


ENCODER = "encoder"


def part_prefix(part: str) -> str:
    """What the names of a part's weights begin with in a checkpoint."""
    if part == "language":
        return "language_model."
    name, side = part.split(".")
    inside = "input_projections.0" if side == "projector" else f"encoders.{ENCODER}"
    return f"modality_submodules.{name}.{inside}."


def part_config_of(config: MimoConfig, part: str) -> Any:
    """The config of one part by its name."""
    if part == "language":
        return config.language
    name, side = part.split(".")
    return getattr(config.modalities[name], side)


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
    held: dict[str, torch.nn.Module] = {}
    for name, modality in model.modality_submodules.items():
        held[f"{name}.encoder"] = modality.encoders[ENCODER]
        held[f"{name}.projector"] = modality.input_projections[0]
    if model.language_model is not None:
        held["language"] = model.language_model
    return held


def freeze_parts(model: StageMimoModel, names: Iterable[str]) -> None:
    """Stop the named parts from training; gradients still flow through them."""
    held = parts(model)
    for name in names:
        if name in held:
            held[name].requires_grad_(False)
