"""Weight tables: which Hugging Face tensor is which of ours. A family is an entry."""

from __future__ import annotations

from typing import Any

from examples.mimo.configs.schema import LanguageConfig, ProjectorConfig
from examples.mimo.hf import audio, language, projector, vision
from examples.mimo.hf.weights import Family
from examples.mimo.modalities.audio import WhisperConfig
from examples.mimo.modalities.image import VitConfig
from examples.mimo.modalities.video import VideoConfig

# Our config's type -> the families its weights may come from.
FAMILIES: dict[type, tuple[Family, ...]] = {
    LanguageConfig: language.FAMILIES,
    VitConfig: vision.FAMILIES,
    VideoConfig: vision.FAMILIES,
    WhisperConfig: audio.FAMILIES,
    ProjectorConfig: projector.FAMILIES,
}


def family_of(model_type: str, config: Any, where: str) -> Family:
    """The family a folder's `model_type` belongs to; ValueError when `config` takes no such."""
    takes = [family for family in FAMILIES.get(type(config), ()) if family.describes(config)]
    for family in takes:
        if model_type in family.sections:
            return family
    known = ", ".join(name for family in takes for name in family.sections) or "none"
    raise ValueError(f"{where}: model type {model_type!r} is none of {known}")


def family_for_export(config: Any) -> Family:
    """The family whose tables describe `config` when it came from no folder."""
    for family in FAMILIES.get(type(config), ()):
        if family.describes(config):
            return family
    raise ValueError(f"no Hugging Face family describes {config}")
