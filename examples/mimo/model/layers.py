"""Layer specs for Megatron's transformer block, core attention, and the encoders' transformer.

With Transformer Engine its fused layers are used. Without it, on GPUs and CPUs alike, Megatron's
own parallel linear layers are, with the attention of this file and the norms of parts.py:
Megatron's local ones refuse sequence parallelism, packed sequences and context parallelism.
"""

from __future__ import annotations

import copy
import functools
import math
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_cuda_rng_tracker,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from examples.mimo.modalities.base import EncoderConfig
from examples.mimo.model.parts import Norm, encoder_transformer_config, with_layer_scale
from examples.mimo.parallel.context import PackedSequence, chunks_of, gather_sequence

# Of torch's flash attention.
FLASH_DTYPES = (torch.float16, torch.bfloat16)


def device() -> torch.device:
    """The device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class SdpaCoreAttention(MegatronModule):
    """softmax(QK'/sqrt(d))V (arXiv:1706.03762) over this rank's heads; causal or full.

    Grouped queries share keys and values without copies. With more keys than queries the
    queries are the last ones, as in decoding from a key/value cache. Under context parallelism
    the inputs are shards of the sequence, and keys and values are gathered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        # An encoder's items are not sharded along their sequence: its config says 1.
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.attn_mask_type = attn_mask_type
        # Megatron's `sharded_state_dict` reads it, else it takes the global group.
        self.tp_group = pg_collection.tp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequence | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """(Sq, B, heads, d), (Sk, B, groups, d) twice -> (Sq, B, heads * d).

        `attention_mask` is Megatron's: True hides a key, broadcast over (B, heads, Sq, Sk).
        With `packed_seq_params` B is 1: samples follow one another along S.
        """
        if packed_seq_params is not None:
            return self._attend_packed(query, key, value, packed_seq_params)
        causal = (attn_mask_type or self.attn_mask_type) != AttnMaskType.no_mask
        if self.cp_group is None:
            return self._attend(query, key, value, attention_mask, causal)
        assert causal, "only causal attention is sharded along the sequence"
        assert attention_mask is None, "a whole mask does not fit a sharded sequence"
        key, value = (gather_sequence(t, self.cp_group) for t in (key, value))
        # Of the front and of the back: under a causal mask chunks at the back cost more.
        numbers = chunks_of(self.cp_group.rank(), self.cp_group.size())
        contexts = []
        for queries, number in zip(query.chunk(2), numbers, strict=True):
            end = (number + 1) * len(queries)
            contexts.append(self._attend(queries, key[:end], value[:end], None, causal=True))
        return torch.cat(contexts)

    def _attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence
    ) -> torch.Tensor:
        """Causal attention within each sample, (S / c, 1, heads, d) -> (S / c, 1, heads * d)."""
        key, value = (packed.gather_keys(t, self.cp_group) for t in (key, value))
        if query.is_cuda and query.dtype in FLASH_DTYPES and not (self.training and self.dropout):
            heads = query.squeeze(1), key.squeeze(1), value.squeeze(1)
            starts = packed.cu_seqlens_q, packed.cu_seqlens_kv
            longest = packed.max_seqlen_q, packed.max_seqlen_kv
            causal = (-1, 0)  # the queries are the last ones
            context = varlen_attn(*heads, *starts, *longest, scale=self.scale, window_size=causal)
            assert isinstance(context, torch.Tensor), "without log-sum-exp"
            return context.flatten(1)[:, None]
        pieces = packed.split(query, key, value)
        return packed.join([self._attend(*piece, None, causal=True) for piece in pieces])

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        # Megatron's values are a view of queries, keys and values; a copy lets go of the others.
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value.contiguous()))
        mask = None if attention_mask is None else ~attention_mask  # torch's True shows a key
        if causal and (mask is not None or key.shape[2] != query.shape[2]):
            # torch aligns its own causal mask with the first key, but queries are the last ones.
            if mask is None and query.is_cuda:
                mask = causal_lower_right(query.shape[2], key.shape[2])  # flash attention takes it
            else:
                positions = torch.arange(key.shape[2], device=query.device)
                visible = positions <= positions[-query.shape[2] :, None]
                mask = visible if mask is None else mask & visible
            causal = False
        dropout = self.dropout if self.training else 0.0
        # As in Megatron's DotProductAttention: each tensor-parallel rank drops weights of its own
        # heads. Under sequence parallelism the default generators of the ranks differ already.
        fork = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if fork else nullcontext():
            context = scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return context.permute(2, 0, 1, 3).flatten(2)


def has_transformer_engine() -> bool:
    """Whether Megatron could import Transformer Engine, and there is a GPU, which it needs."""
    return HAVE_TE and torch.cuda.is_available()


def block_submodules(
    transformer_impl: str,
    mask: AttnMaskType,
    num_layers: int,
    qk_layernorm: bool = False,
    layer_scale: bool = False,
) -> TransformerBlockSubmodules:
    """The spec of a stack of layers; `mask` is causal for a decoder, no_mask for an encoder.

    Transformer Engine's linear layers have no LayerScale: with it the layers are local.
    """
    if transformer_impl == "transformer_engine" and not layer_scale:
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        layer.submodules.self_attention.params["attn_mask_type"] = mask  # Megatron's spec is causal
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    row_parallel = with_layer_scale(RowParallelLinear) if layer_scale else RowParallelLinear
    layer = _local_layer_spec(mask, Norm if qk_layernorm else IdentityOp, row_parallel)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)


def mlp_submodules(row_parallel: type = RowParallelLinear) -> MLPSubmodules:
    """The spec of an MLP: a column-parallel linear layer, then a row-parallel one."""
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
