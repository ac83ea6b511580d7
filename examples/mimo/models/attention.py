"""Core attention on `scaled_dot_product_attention`, for every device and without extensions."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import divide
from torch.nn.functional import scaled_dot_product_attention


class SdpaCoreAttention(MegatronModule):
    """softmax(QK'/sqrt(d))V (arXiv:1706.03762) over this rank's heads; causal or full.

    Grouped queries share keys and values without copies. With more keys than queries the
    queries are the last ones, as in decoding from a key/value cache.
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
        if config.context_parallel_size > 1:
            raise ValueError(
                f"--context-parallel-size {config.context_parallel_size} needs Transformer Engine; "
                "without it use 1"
            )
        self.attn_mask_type = attn_mask_type
        self.tp_group = pg_collection.tp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.heads = divide(config.num_attention_heads, pg_collection.tp.size())

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> torch.Tensor:
        """(Sq, B, heads, d), (Sk, B, groups, d) twice -> (Sq, B, heads * d).

        `attention_mask` is Megatron's: True hides a key, broadcast over (B, heads, Sq, Sk).
        """
        if packed_seq_params is not None:
            raise ValueError("packed sequences need Transformer Engine; run without packing")
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        causal = (attn_mask_type or self.attn_mask_type) != AttnMaskType.no_mask
        mask = None if attention_mask is None else ~attention_mask
        if causal and (mask is not None or key.shape[2] != query.shape[2]):
            mask = _combine(mask, _last_rows_causal(query, key))
            causal = False
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Under tensor parallelism each rank drops its own heads' weights independently."""
        fork = self.dropout > 0 and self.training and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if fork else nullcontext():
            return super().__call__(*args, **kwargs)


def _last_rows_causal(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    queries, keys = query.shape[2], key.shape[2]
    rows = torch.arange(keys - queries, keys, device=query.device)
    return torch.arange(keys, device=query.device)[None, :] <= rows[:, None]


def _combine(mask: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if mask is None else mask & other
