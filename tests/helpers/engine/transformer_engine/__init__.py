"""A stand-in for Transformer Engine that computes with torch on one process, in full precision.

Constructors, parameter names and extra states are those of Transformer Engine 2.20.2, as Megatron
takes them; nothing says how fast or how exact the real layers are. On PYTHONPATH it is an installed
`transformer_engine`: Megatron builds its own Transformer Engine layers from it.
"""

from __future__ import annotations

import contextlib
import sys
import types
from itertools import pairwise

import torch
from torch.nn import functional

__version__ = "2.20.2"


class WithExtraState(torch.nn.Module):
    """What layers hold for FP8; without it an empty tensor."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or not state.numel()


def normalize(x, normalization, weight, bias, eps):
    if normalization == "RMSNorm":
        return functional.rms_norm(x, weight.shape, weight, eps)
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


class RMSNorm(WithExtraState):
    normalization = "RMSNorm"

    def __init__(
        self,
        normalized_shape,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        device=None,
    ):
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        ones = torch.ones(normalized_shape, dtype=params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones)
        self.bias = torch.nn.Parameter(torch.zeros_like(ones)) if self.has_bias() else None
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel

    def has_bias(self):
        return self.normalization == "LayerNorm"

    def forward(self, x):
        return normalize(x, self.normalization, self.weight, self.bias, self.eps)


class LayerNorm(RMSNorm):
    normalization = "LayerNorm"


class Linear(WithExtraState):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        super().__init__()
        assert tp_size == 1, "the stand-in runs on one process"
        # As in the real layers this needs no Apex, unlike in Megatron's own.
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.in_features, self.out_features = in_features, out_features
        self.parallel_mode, self.tp_size = parallel_mode, tp_size
        self.use_bias, self.return_bias = bias, return_bias
        weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        if init_method:
            init_method(self.weight)
        zeros = torch.zeros(out_features, dtype=params_dtype, device=device)
        self.bias = torch.nn.Parameter(zeros) if bias else None
        for parameter, dim in ((self.weight, parallel_mode == "row"), (self.bias, 0)):
            if parameter is not None and parallel_mode:
                parameter.tensor_model_parallel = True
                parameter.partition_dim, parameter.partition_stride = int(dim), 1

    def forward(self, x, is_first_microbatch=None):
        if self.return_bias:
            return functional.linear(x, self.weight), self.bias
        return functional.linear(x, self.weight, self.bias)


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        normalization="LayerNorm",
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        zero_centered_gamma=False,
        params_dtype=None,
        device="cuda",
        **linear,
    ):
        super().__init__(
            in_features, out_features, params_dtype=params_dtype, device=device, **linear
        )
        assert not zero_centered_gamma
        self.eps, self.normalization = eps, normalization
        ones = torch.ones(in_features, dtype=params_dtype, device=device)
        self.layer_norm_weight = torch.nn.Parameter(ones)
        zeros = torch.zeros_like(ones)
        self.layer_norm_bias = torch.nn.Parameter(zeros) if normalization == "LayerNorm" else None

    def forward(self, x, is_first_microbatch=None):
        weight, bias = self.layer_norm_weight, self.layer_norm_bias
        return super().forward(normalize(x, self.normalization, weight, bias, self.eps))


class DotProductAttention(WithExtraState):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        bottom_right_diagonal=None,
        softcap=0.0,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
        softmax_type="vanilla",
        return_max_logit=False,
        name=None,
    ):
        super().__init__()
        assert tp_size == 1
        assert cp_group is None
        assert not attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format="sbhd",
        cu_seqlens_q=None,
        attn_mask_type=None,
        **packed,
    ):
        """(S, B, heads, d) -> (S, B, heads * d), or packed (T, heads, d) -> (T, heads * d)."""
        assert attention_mask is None
        tensors = (query_layer, key_layer, value_layer)
        if qkv_format == "thd":
            samples = pairwise(cu_seqlens_q.tolist())
            outputs = [
                self.attend([t[a:b, None] for t in tensors], attn_mask_type) for a, b in samples
            ]
            return torch.cat(outputs)[:, 0]
        return self.attend(tensors, attn_mask_type)

    def attend(self, tensors, mask):
        query, key, value = (t.permute(1, 2, 0, 3) for t in tensors)
        context = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal="causal" in mask,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def apply_rotary_pos_emb(
    t,
    freqs,
    tensor_format="sbhd",
    interleaved=False,
    fused=False,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    """Angles (S, 1, 1, d), from every sample's first position on where samples are packed."""
    assert not interleaved
    assert cp_size == 1
    if tensor_format == "thd":
        samples = pairwise(cu_seqlens.tolist())
        turned = [apply_rotary_pos_emb(t[a:b, None], freqs) for a, b in samples]
        return torch.cat(turned)[:, 0]
    angles = freqs[: len(t)]
    first, second = t.chunk(2, dim=-1)
    return t * angles.cos().to(t.dtype) + torch.cat((-second, first), -1) * angles.sin().to(t.dtype)


class Unused:
    """A name that Megatron imports, or derives a class from, and this package's models do not."""

    def __init__(self, *args, **named):
        raise NotImplementedError(type(self).__name__)


def module(name, **names):
    """`transformer_engine.NAME` with `names` in it."""
    added = types.ModuleType(f"{__name__}.{name}")
    vars(added).update(names)
    sys.modules[added.__name__] = added
    parent, _, last = added.__name__.rpartition(".")
    setattr(sys.modules[parent], last, added)


module("common")
module("common.recipe", DelayedScaling=Unused)
module(
    "pytorch",
    RMSNorm=RMSNorm,
    LayerNorm=LayerNorm,
    Linear=Linear,
    LayerNormLinear=LayerNormLinear,
    DotProductAttention=DotProductAttention,
    GroupedLinear=Unused,
)
context = contextlib.nullcontext
module("pytorch.fp8", FP8GlobalStateManager=Unused, fp8_autocast=context, fp8_model_init=context)
module("pytorch.distributed", CudaRNGStatesTracker=Unused, activation_recompute_forward=context)
module("pytorch.attention")
module("pytorch.attention.rope", apply_rotary_pos_emb=apply_rotary_pos_emb)
module("pytorch.tensor", QuantizedTensor=Unused)
module(
    "pytorch.router",
    fused_compute_score_for_moe_aux_loss=Unused,
    fused_moe_aux_loss=Unused,
    fused_topk_with_score_function=Unused,
)
