"""Which modules a transformer layer is made of: Transformer Engine's, or torch's own."""

from __future__ import annotations

import functools
import importlib.util

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from examples.mimo.models.attention import SdpaCoreAttention
from examples.mimo.models.layer_scale import with_layer_scale
from examples.mimo.models.norm import Norm


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported here."""
    return importlib.util.find_spec("transformer_engine") is not None


def block_submodules(
    transformer_impl: str,
    mask: AttnMaskType,
    num_layers: int,
    qk_layernorm: bool = False,
    layer_scale: bool = False,
) -> TransformerBlockSubmodules:
    """A stack of `num_layers`; `mask` is causal for a decoder and no_mask for an encoder."""
    if transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        layer.submodules.self_attention.params["attn_mask_type"] = mask
        if layer_scale:
            raise ValueError(
                "an encoder with LayerScale runs on local layers; pass --transformer-impl local"
            )
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    row_parallel = with_layer_scale(RowParallelLinear) if layer_scale else RowParallelLinear
    layer = _local_layer_spec(mask, Norm if qk_layernorm else IdentityOp, row_parallel)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)


def mlp_submodules(row_parallel: type = RowParallelLinear) -> MLPSubmodules:
    """Two parallel linear layers: columns, then rows."""
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=row_parallel)


def _local_layer_spec(mask: AttnMaskType, qk_norm: type, row_parallel: type) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SdpaCoreAttention,
            linear_proj=row_parallel,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=functools.partial(MLP.as_mlp_submodule, submodules=mlp_submodules(row_parallel)),
            mlp_bda=get_bias_dropout_add,
            # The names Transformer Engine's fused layers have, so that one checkpoint fits both.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
