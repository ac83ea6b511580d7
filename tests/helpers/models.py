"""Configs for tests of what a user adds: `--model-provider tests.helpers.models:FUNCTION`."""

from __future__ import annotations

import dataclasses

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.configs.tiny_avlm import tiny_avlm
from examples.mimo.modalities.image import VitConfig


class DepthConfig(VitConfig):
    """An encoder of one's own, which no Hugging Face family describes."""

    hf_families = None


def with_depth() -> MimoConfig:
    """`tiny_avlm` with a third modality."""
    base = tiny_avlm()
    pictures = base.modalities["images"]
    depth = dataclasses.replace(
        pictures,
        singular="depth",
        placeholder="<depth>",
        token_id=base.language.vocab_size - 1,
        encoder=DepthConfig(**dataclasses.asdict(pictures.encoder)),
    )
    return dataclasses.replace(
        base,
        name="tests.helpers.models:with_depth",
        modalities={**base.modalities, "depths": depth},
    )


def with_two_picture_modalities() -> MimoConfig:
    """`tiny_avlm` with a second modality whose encoder is a CLIP."""
    base = tiny_avlm()
    maps = dataclasses.replace(
        base.modalities["images"], singular="map", placeholder="<map>", token_id=6
    )
    return dataclasses.replace(
        base,
        name="tests.helpers.models:with_two_picture_modalities",
        modalities={**base.modalities, "maps": maps},
    )


def without_pictures() -> MimoConfig:
    """`tiny_avlm` with sound alone."""
    base = tiny_avlm()
    return dataclasses.replace(
        base,
        name="tests.helpers.models:without_pictures",
        modalities={"audios": base.modalities["audios"]},
    )


def tied_embeddings() -> MimoConfig:
    """`tiny_avlm` whose head is its token embedding."""
    base = tiny_avlm()
    return dataclasses.replace(
        base,
        name="tests.helpers.models:tied_embeddings",
        language=dataclasses.replace(base.language, tie_embeddings=True),
    )
