"""A model that hears a number and draws it: `--model-provider demos.drawing.model:drawing_lm`."""

from __future__ import annotations

from dataclasses import replace

from demos.drawing.codec import DrawingCodec
from examples.mimo.configs.schema import MimoConfig, ModalityConfig
from examples.mimo.configs.tiny_avlm import tiny_avlm


def drawing_lm() -> MimoConfig:
    """The audio encoder and the language model of `tiny_avlm`, and drawings as its output."""
    base = tiny_avlm()
    drawings = ModalityConfig(singular="drawing", placeholder="<drawing>", codec=DrawingCodec())
    return replace(
        base,
        name="drawing_lm",
        modalities={"audios": base.modalities["audios"], "drawings": drawings},
        prompt="",
    )
