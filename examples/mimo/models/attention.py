"""Core attention on `scaled_dot_product_attention`, for every device and without extensions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import divide
from torch.nn.functional import scaled_dot_product_attention

from examples.mimo.models.context_parallel import chunks_of, gather_sequence


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
        With `packed_seq_params` the tensors lack B: sequences follow one another along S.
        """
        causal = (attn_mask_type or self.attn_mask_type) != AttnMaskType.no_mask
        if self.cp_group is None and packed_seq_params is None:
            return self._attend(query, key, value, attention_mask, causal)
        assert causal, "only causal attention is packed or sharded along the sequence"
        assert attention_mask is None, "a whole mask does not fit packed or sharded rows"
        if packed_seq_params is None:
            bounds = [0, len(query) * self.cp_size]
            return self._attend_within(query, key, value, bounds)
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        return self._attend_within(query, key, value, packed_seq_params.cu_seqlens_q.tolist())

    @property
    def cp_size(self) -> int:
        """Over how many ranks a row is sharded."""
        return self.cp_group.size() if self.cp_group else 1

    def _attend_within(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int]
    ) -> torch.Tensor:
        """Within each sequence of a row, queries attend to the keys up to their own place."""
        if self.cp_group:
            key, value = (gather_sequence(t, self.cp_group, bounds) for t in (key, value))
        contexts = []
        for start, end in pairwise(bounds):
            mine = query[start // self.cp_size : end // self.cp_size]
            for queries, stop in self._chunks(mine, start, end):
                contexts.append(
                    self._attend(queries, key[start:stop], value[start:stop], None, causal=True)
                )
        return torch.cat(contexts)

    def _chunks(
        self, query: torch.Tensor, start: int, end: int
    ) -> Iterator[tuple[torch.Tensor, int]]:
        """A sequence's queries on this rank in connected chunks, each with its end in the row."""
        if not self.cp_group:
            yield query, end
            return
        numbers = chunks_of(self.cp_group.rank(), self.cp_size)
        for queries, number in zip(query.chunk(2), numbers, strict=True):
            yield queries, start + (number + 1) * len(queries)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
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
