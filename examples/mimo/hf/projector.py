"""The two linear layers between an encoder and the language model, as LLaVA-1.5 names them."""

from __future__ import annotations

from typing import Any

from examples.mimo.configs.schema import ProjectorConfig
from examples.mimo.hf.weights import Family, Row, rows


def table(projector: ProjectorConfig, config: Any) -> list[Row]:
    """Weights and biases."""
    return [
        *rows("encoder.linear_fc1.", "linear_1.", "weight", "bias"),
        *rows("encoder.linear_fc2.", "linear_2.", "weight", "bias"),
    ]


FAMILIES = (
    Family(
        name="llava",
        sections={"llava": ""},
        roots=("", "multi_modal_projector.", "model.multi_modal_projector."),
        anchor="linear_1.weight",
        required={
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_select_strategy": "default",
        },
        fields=lambda config: {},
        num_layers=lambda projector: 0,
        table=table,
        unused=(),
        config=None,
    ),
)
