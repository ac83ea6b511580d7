"""From an encoder's width to the language model's: two tensor-parallel linear layers."""

from __future__ import annotations

from typing import Any

from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn import functional

from examples.mimo.configs.schema import ProjectorConfig
from examples.mimo.models.encoder_config import encoder_transformer_config
from examples.mimo.models.layer_specs import mlp_submodules


def projector_spec(
    projector: ProjectorConfig, input_size: int, language: TransformerConfig, pg_collection: Any
) -> ModuleSpec:
    """(tokens, input_size) -> (tokens, H_lm), GELU between, as in LLaVA-1.5."""
    config = encoder_transformer_config(
        language,
        num_layers=1,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        ffn_hidden_size=projector.ffn_hidden_size,
        activation_func=functional.gelu,
    )
    return ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": config,
            "submodules": mlp_submodules(),
            "projector_type": "mlp",
            "input_size": input_size,
            "pg_collection": pg_collection,
        },
    )
