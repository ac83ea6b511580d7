"""`TransformerEncoder`: a plain torch stem, Megatron's transformer layers, token selection."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.nn import functional

from examples.mimo.modalities.base import EncoderConfig
from examples.mimo.model.layers import block_submodules
from examples.mimo.model.parts import Norm, encoder_transformer_config


def split_over(
    transformer_config: TransformerConfig, tensor_parallel_size: int
) -> TransformerConfig:
    """The language model's config for layers that are split over another number of ranks."""
    config = copy.copy(transformer_config)
    config.tensor_model_parallel_size = tensor_parallel_size
    return config


class TransformerEncoder(MegatronModule):
    """Stem, optional norm, transformer layers, optional norm; then the tokens are selected.

    The layers are sharded by tensor parallelism like the language model's, and every position
    attends to every other. `encoder` says all else.
    """

    def __init__(
        self, encoder: EncoderConfig, transformer_config: TransformerConfig, pg_collection: Any
    ) -> None:
        fields = {
            "num_layers": encoder.built_layers,
            "hidden_size": encoder.hidden_size,
            "num_attention_heads": encoder.num_attention_heads,
            "ffn_hidden_size": encoder.ffn_hidden_size,
            "activation_func": functional.gelu,
            **encoder.transformer_fields(),
        }
        config = encoder_transformer_config(transformer_config, **fields)
        super().__init__(config=config)
        self.encoder_config = encoder
        self.tp_group = pg_collection.tp
        self.stem = encoder.stem()
        self.pre_norm = (
            Norm(config, config.hidden_size, config.layernorm_epsilon) if encoder.pre_norm else None
        )
        # Called `decoder` as in Megatron's CLIPViTModel, although its attention is full.
        self.decoder = TransformerBlock(
            config=config,
            spec=block_submodules(
                config.transformer_impl,
                AttnMaskType.no_mask,
                config.num_layers,
                layer_scale=encoder.layer_scale,
            ),
            post_layer_norm=encoder.final_norm,
            pg_collection=pg_collection,
        )
        # Last, so that the order in which modules draw random numbers is the modules' order.
        initialize = getattr(self.stem, "initialize", None)
        if initialize is not None:
            initialize(config.init_method)

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        """Called by Megatron's schedules; an encoder is always a whole stage."""
        self.decoder.set_input_tensor(input_tensor)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Preprocessed inputs, N along dim 0 -> (tokens, output_size), the inputs' order kept."""
        # Data is read in fp32, and the weights may be in 16 bits.
        dtype = next(self.parameters()).dtype
        hidden = self.stem(
            **{name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        )
        if self.pre_norm is not None:
            hidden = self.pre_norm(hidden)
        # Megatron's layers want (S, N, H), and contiguous.
        hidden = self.decoder(hidden.transpose(0, 1).contiguous(), attention_mask=None)
        return self.encoder_config.select(hidden.transpose(0, 1), **inputs)
