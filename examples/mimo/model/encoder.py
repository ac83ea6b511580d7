"""The TransformerConfig of an encoder: its own sizes, the language model's numerics.

From an encoder's width to the language model's: two tensor-parallel linear layers.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn import functional

from examples.mimo.configs.schema import ProjectorConfig
from examples.mimo.model.layers import mlp_submodules

# Fields that say how to compute, not what: an encoder shares them with the language model.
# Pipeline, sequence- and context-parallel fields and fusions stay at their defaults.
SHARED_FIELDS = (
    "tensor_model_parallel_size",
    "params_dtype",
    "fp16",
    "bf16",
    "autocast_dtype",
    "use_cpu_initialization",
    "perform_initialization",
    "gradient_accumulation_fusion",
    "transformer_impl",
    "recompute_granularity",
    "recompute_method",
    "recompute_modules",
    "deterministic_mode",
)


def encoder_transformer_config(
    language: TransformerConfig, layernorm_epsilon: float = 1e-5, **sizes: Any
) -> TransformerConfig:
    """LayerNorm, biases, no dropout; `sizes` are TransformerConfig fields."""
    shared = {name: getattr(language, name) for name in SHARED_FIELDS}
    if shared["recompute_method"]:
        shared["recompute_num_layers"] = 1
    return TransformerConfig(
        **shared,
        normalization="LayerNorm",
        layernorm_epsilon=layernorm_epsilon,
        persist_layer_norm=shared["transformer_impl"] == "transformer_engine",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **sizes,
    )


def split_over(language: TransformerConfig, tensor_parallel_size: int) -> TransformerConfig:
    """The language model's config for layers that are split over another number of ranks."""
    config = copy.copy(language)
    config.tensor_model_parallel_size = tensor_parallel_size
    return config


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
