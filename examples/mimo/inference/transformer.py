"""The language model for answering: the keys and values of earlier tokens are kept.

It works on the parameters of Megatron's modules, of either layer spec, by this rank's share. What
it leaves out is what costs: Megatron's static context rotates all kept keys again for every token,
and its modules take longer to call than a row of a small model takes to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from examples.mimo.models.mimo import StageMimoModel

# From so many rows on CPUs multiply weights by columns faster than rows by weights.
COLUMNS_FROM, COLUMNS_TO = 8, 64
# A cache grows in steps, as its tensors are copied each time.
LENGTH_STEP = 128

# What Megatron's layers call the parameters, built locally and by Transformer Engine.
NAMES = {
    "input_layernorm.weight": "input_norm",
    "self_attention.linear_qkv.layer_norm_weight": "input_norm",
    "self_attention.linear_qkv.weight": "qkv",
    "self_attention.linear_qkv.bias": "qkv_bias",
    "self_attention.q_layernorm.weight": "query_norm",
    "self_attention.k_layernorm.weight": "key_norm",
    "self_attention.linear_proj.weight": "projection",
    "pre_mlp_layernorm.weight": "mlp_norm",
    "mlp.linear_fc1.layer_norm_weight": "mlp_norm",
    "mlp.linear_fc1.weight": "gate_and_up",
    "mlp.linear_fc2.weight": "down",
}


@dataclass(frozen=True)
class LayerWeights:
    """One layer's parameters: this rank's heads and features."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    projection: torch.Tensor
    mlp_norm: torch.Tensor
    gate_and_up: torch.Tensor
    down: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


def layer_weights(layer: torch.nn.Module) -> LayerWeights:
    """The parameters of a Megatron layer; ValueError for a kind of layer not known here."""
    found = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    unknown = sorted(found.keys() - NAMES.keys())
    if unknown:
        raise ValueError(
            f"answering does not know the parameter {unknown[0]} of a language layer; teach "
            "inference/transformer.py what it does"
        )
    return LayerWeights(**{NAMES[name]: tensor for name, tensor in found.items()})


class KeyValueCache:
    """The keys and values of some rows of tokens, for this rank's L layers and G groups of heads.

    `keys` are (L, rows, G, d, S), rotated; `values` (L, rows, G, S, d). A token's scores then read
    the keys in the order in which they lie.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    @property
    def num_rows(self) -> int:
        """How many rows there is room for."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """How many tokens of a row there is room for."""
        return self.keys.shape[-1]

    def reserve(self, rows: int, length: int) -> None:
        """Make room; what is kept stays."""
        rows = max(rows, self.num_rows)
        length = max(-(-length // LENGTH_STEP) * LENGTH_STEP, self.length)
        if (rows, length) == (self.num_rows, self.length):
            return
        layers, had_rows, groups, size, had_length = self.keys.shape
        keys = self.keys.new_zeros(layers, rows, groups, size, length)
        values = self.values.new_zeros(layers, rows, groups, length, size)
        keys[:, :had_rows, ..., :had_length] = self.keys
        values[:, :had_rows, :, :had_length] = self.values
        self.keys, self.values = keys, values

    def copy_of(self, row: int, length: int) -> KeyValueCache:
        """The first `length` tokens of a row, as a cache of their own."""
        keys = self.keys[:, row : row + 1, ..., :length].clone()
        return KeyValueCache(keys, self.values[:, row : row + 1, :, :length].clone())

    def put(self, row: int, other: KeyValueCache, other_row: int, length: int) -> None:
        """Copy the first `length` tokens of a row of `other` to `row`."""
        self.keys[:, row, ..., :length] = other.keys[:, other_row, ..., :length]
        self.values[:, row, :, :length] = other.values[:, other_row, :, :length]


class CachedTransformer:
    """The layers of this rank's stage of `model`, from hidden states to hidden states.

    Llama's shape, as `LanguageConfig` says it: RMSNorm, rotary positions (arXiv:2104.09864),
    grouped queries (arXiv:2305.13245), SwiGLU (arXiv:2002.05202).
    """

    def __init__(self, model: StageMimoModel) -> None:
        self.model = model
        self.language = model.language_model
        self.config = model.config
        self.layers = [layer_weights(layer) for layer in self.language.decoder.layers]
        self.tp_group = model.pg_collection.tp
        self.head_size: int = self.config.kv_channels
        self.groups = self.config.num_query_groups // self.tp_group.size()
        self.queries = self.config.num_attention_heads // self.config.num_query_groups
        self.device = self.layers[0].qkv.device
        self.dtype = self.layers[0].qkv.dtype
        self.cos = self.sin = torch.empty(0, self.head_size, device=self.device, dtype=self.dtype)

    def new_cache(self) -> KeyValueCache:
        """A cache without room yet."""
        size = (len(self.layers), 0, self.groups)
        kept = torch.empty(*size, self.head_size, 0, device=self.device, dtype=self.dtype)
        return KeyValueCache(kept, kept.transpose(-1, -2))

    def forward(
        self, hidden: torch.Tensor, cache: KeyValueCache, first: int, starts: Sequence[int]
    ) -> torch.Tensor:
        """(B, S, H) -> (B, S, H): S more tokens of B rows of the cache, from row `first` on.

        Row i has `starts[i]` tokens already; for more than one new token all have as many.
        """
        rows, columns, _ = hidden.shape
        step = (_Decode if columns == 1 else _Prefill)(self, cache, first, rows, columns, starts)
        flat = hidden.reshape(rows * columns, -1)
        epsilon = self.config.layernorm_epsilon
        for number, layer in enumerate(self.layers):
            normed = rms_norm(flat, flat.shape[1:], layer.input_norm, epsilon)
            query, key, value = self._query_key_value(_linear(normed, layer.qkv), layer, step)
            context = step.attend(number, query, key, value)
            flat = flat + self._reduced(_linear(context, layer.projection))
            normed = rms_norm(flat, flat.shape[1:], layer.mlp_norm, epsilon)
            gate, up = _linear(normed, layer.gate_and_up).chunk(2, dim=-1)
            flat = flat + self._reduced(_linear(silu(gate) * up, layer.down))
        return flat.view(rows, columns, -1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) -> (N, V), over the whole vocabulary, on the last stage."""
        norm = self.language.decoder.final_layernorm.weight
        normed = rms_norm(hidden, hidden.shape[1:], norm, self.config.layernorm_epsilon)
        shard = _linear(normed, self._output_weight())
        if self.tp_group.size() == 1:
            return shard
        shards = [torch.empty_like(shard.contiguous()) for _ in range(self.tp_group.size())]
        dist.all_gather(shards, shard.contiguous(), group=self.tp_group)
        return torch.cat(shards, dim=-1)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) tokens of text -> (B, 1, H), on the first stage."""
        return self.language.embedding.word_embeddings(tokens[:, None])

    def receive(self, rows: int, columns: int) -> torch.Tensor:
        """(B, S, H) from the stage before."""
        size = (rows, columns, self.config.hidden_size)
        hidden = torch.empty(size, dtype=self.dtype, device=self.device)
        dist.recv(hidden, src=mpu.get_pipeline_model_parallel_prev_rank())
        return hidden

    def send(self, hidden: torch.Tensor) -> None:
        """(B, S, H) to the next stage."""
        dist.send(hidden.contiguous(), dst=mpu.get_pipeline_model_parallel_next_rank())

    def positions(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, (S, d) each with S >= `length`, of the places in a row."""
        if len(self.cos) < length:
            longer = max(length, 2 * len(self.cos))
            angles = self.language.rotary_pos_emb.get_freqs_non_repeated(longer).to(self.device)
            angles = torch.cat((angles, angles), dim=-1)
            self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return self.cos, self.sin

    def _query_key_value(
        self, mixed: torch.Tensor, layer: LayerWeights, step: _Step
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, G * (R + 2) * d) as Megatron mixes it -> (N, G, R, d), and (N, G, d) twice."""
        if layer.qkv_bias is not None:
            mixed = mixed + layer.qkv_bias
        mixed = mixed.reshape(len(mixed), self.groups, self.queries + 2, self.head_size)
        turning, value = mixed[:, :, :-1], mixed[:, :, -1]
        if layer.query_norm is not None:
            turning = self._normed_heads(turning, layer)
        left, right = turning.chunk(2, dim=-1)
        turned = turning * step.cos + torch.cat((-right, left), dim=-1) * step.sin
        return turned[:, :, :-1], turned[:, :, -1], value

    def _normed_heads(self, heads: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        epsilon, size = self.config.layernorm_epsilon, (self.head_size,)
        query = rms_norm(heads[:, :, :-1], size, layer.query_norm, epsilon)
        key = rms_norm(heads[:, :, -1:], size, layer.key_norm, epsilon)
        return torch.cat((query, key), dim=2)

    def _reduced(self, partial: torch.Tensor) -> torch.Tensor:
        if self.tp_group.size() > 1:
            partial = partial.contiguous()
            dist.all_reduce(partial, group=self.tp_group)
        return partial

    def _output_weight(self) -> torch.Tensor:
        if self.language.share_embeddings_and_output_weights:
            return self.language.shared_embedding_or_output_weight()
        return self.language.output_layer.weight


class _Step:
    """Where the new tokens of some rows belong, worked out once for all layers."""

    def __init__(
        self,
        transformer: CachedTransformer,
        cache: KeyValueCache,
        first: int,
        rows: int,
        columns: int,
        starts: Sequence[int],
    ) -> None:
        self.cache = cache
        self.rows = slice(first, first + rows)
        self.shape = (rows, columns)
        self.scale = transformer.head_size**-0.5
        self.length = max(starts) + columns
        self.alike = min(starts) == max(starts)
        self.start = starts[0]
        table = transformer.positions(self.length)
        places = torch.tensor(starts, device=transformer.device)[:, None]
        places = (places + torch.arange(columns, device=transformer.device)).flatten()
        self.cos, self.sin = (t[places][:, None, None] for t in table)

    def attend(
        self, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """(N, G, R, d), (N, G, d) twice -> (N, G * R * d), and the cache holds the new ones."""
        raise NotImplementedError


class _Prefill(_Step):
    """Several tokens of each row, each of which sees those up to itself."""

    def attend(
        self, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        assert self.alike, "rows of different lengths are prefilled apart"
        rows, columns = self.shape
        key, value = (t.unflatten(0, self.shape).transpose(1, 2) for t in (key, value))
        keys, values = self.cache.keys[number, self.rows], self.cache.values[number, self.rows]
        keys[..., self.start : self.length] = key.transpose(-1, -2)
        values[:, :, self.start : self.length] = value
        mask = None
        if self.start:
            key, value = keys[..., : self.length].transpose(-1, -2), values[:, :, : self.length]
            last = torch.ones(columns, self.length, dtype=torch.bool, device=key.device)
            mask = last.tril(self.start)
        context = scaled_dot_product_attention(
            query.unflatten(0, self.shape).permute(0, 2, 3, 1, 4).flatten(1, 2),
            key.contiguous(),
            value.contiguous(),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[2] > 1,
        )
        return context.transpose(1, 2).reshape(rows * columns, -1)


class _Decode(_Step):
    """One token of each row, which sees all of its row."""

    def __init__(
        self,
        transformer: CachedTransformer,
        cache: KeyValueCache,
        first: int,
        rows: int,
        columns: int,
        starts: Sequence[int],
    ) -> None:
        super().__init__(transformer, cache, first, rows, columns, starts)
        self.mask = None
        row: slice | torch.Tensor = self.rows
        place: int | torch.Tensor = self.start
        if not self.alike:
            row = torch.arange(first, first + rows, device=transformer.device)
            place = torch.tensor(starts, device=transformer.device)
            after = torch.arange(self.length, device=place.device) > place[:, None]
            self.mask = torch.zeros(rows, 1, 1, self.length, device=place.device)
            self.mask.masked_fill_(after[:, None, None], float("-inf"))
        self.at_key = (row, slice(None), slice(None), place)
        self.at_value = (row, slice(None), place)

    def attend(
        self, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self.cache.keys[number], self.cache.values[number]
        keys[self.at_key] = key
        values[self.at_value] = value
        scores = torch.matmul(query * self.scale, keys[self.rows, ..., : self.length])
        if self.mask is not None:
            scores = scores + self.mask
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        context = torch.matmul(weights, values[self.rows, :, : self.length])
        return context.reshape(len(query), -1)


def _linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(N, in), (out, in) -> (N, out)."""
    if not rows.is_cuda and COLUMNS_FROM <= len(rows) <= COLUMNS_TO:
        return torch.mm(weight, rows.t()).t()
    return linear(rows, weight)
