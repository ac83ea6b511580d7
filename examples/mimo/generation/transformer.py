"""The language model for answering: the keys and values of earlier tokens are kept.

It works on the parameters of Megatron's modules, of either layer spec, by this rank's share.
Megatron's static context rotates all kept keys again for every token; here they are kept rotated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from examples.mimo.model.mimo import StageMimoModel

# So few new tokens of a row take less time when all scores are worked out at once.
FEW_COLUMNS = 64
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


class RmsNorm:
    """(..., size) -> x * weight / sqrt(mean(x^2) + epsilon) (arXiv:1910.07467)."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self.weight, self.epsilon = weight, epsilon
        self.scaled = weight * math.sqrt(len(weight))
        self.least = torch.tensor(math.sqrt(len(weight) * epsilon), dtype=weight.dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """On CPUs torch's own takes ten operations; here a hypotenuse adds epsilon to |x|."""
        if rows.is_cuda:
            return rms_norm(rows, rows.shape[-1:], self.weight, self.epsilon)
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return (rows / torch.hypot(length, self.least)).mul_(self.scaled)


@dataclass(frozen=True)
class LayerWeights:
    """One layer's parameters: this rank's heads and features; matrices are (in, out) views."""

    input_norm: RmsNorm
    qkv: torch.Tensor
    projection: torch.Tensor
    mlp_norm: RmsNorm
    gate_and_up: torch.Tensor
    down: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    query_norm: RmsNorm | None = None
    key_norm: RmsNorm | None = None


def layer_weights(layer: torch.nn.Module, epsilon: float) -> LayerWeights:
    """The parameters of a Megatron layer; ValueError for a kind of layer not known here."""
    found: dict[str, Any] = {}
    for name, parameter in layer.named_parameters():
        if name not in NAMES:
            raise ValueError(
                f"answering does not know the parameter {name} of a language layer; teach "
                "inference/transformer.py what it does"
            )
        ours = NAMES[name]
        if parameter.dim() == 2:
            found[ours] = _columns_first(parameter)
        else:
            vector = parameter.detach()
            found[ours] = RmsNorm(vector, epsilon) if ours.endswith("norm") else vector
    return LayerWeights(**found)


def _columns_first(parameter: torch.Tensor) -> torch.Tensor:
    """(out, in) -> (in, out), of the same memory, so changing one changes both.

    CPUs multiply 4 to 16 rows 1.1 to 1.3 times as fast by a matrix that lies so in memory, and 2
    or 3 a little slower. The parameter takes that layout: Megatron's modules compute with it too,
    but an optimizer that holds the old memory would no longer train it.
    """
    if not parameter.is_cuda and parameter.is_contiguous():
        parameter.data = parameter.data.t().contiguous().t()
    return parameter.detach().t()


class KeyValueCache:
    """The keys and values of some rows of tokens, for this rank's L layers and G groups of heads.

    `keys` are (L, rows, G, d, S), rotated; `values` (L, rows, G, S, d). A token's scores then read
    the keys in the order in which they lie.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    @property
    def batch_size(self) -> int:
        """How many rows there is room for."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """How many tokens of a row there is room for."""
        return self.keys.shape[-1]

    def reserve(self, rows: int, length: int) -> None:
        """Make room; what is kept stays."""
        rows = max(rows, self.batch_size)
        length = max(-(-length // LENGTH_STEP) * LENGTH_STEP, self.length)
        if (rows, length) == (self.batch_size, self.length):
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
        epsilon = self.config.layernorm_epsilon
        layers = self.language.decoder.layers
        self.layers = [layer_weights(layer, epsilon) for layer in layers]
        self.final_norm = None
        if model.post_process:
            self.final_norm = RmsNorm(self.language.decoder.final_layernorm.weight, epsilon)
        self.tp_group = model.pg_collection.tp
        self.head_dim: int = self.config.kv_channels
        self.groups = self.config.num_query_groups // self.tp_group.size()
        self.queries = self.config.num_attention_heads // self.config.num_query_groups
        self.device = self.layers[0].qkv.device
        self.dtype = self.layers[0].qkv.dtype
        self.cos = self.sin = torch.empty(0, self.head_dim, device=self.device, dtype=self.dtype)

    def new_cache(self) -> KeyValueCache:
        """A cache without room yet."""
        size = (len(self.layers), 0, self.groups)
        kept = torch.empty(*size, self.head_dim, 0, device=self.device, dtype=self.dtype)
        return KeyValueCache(kept, kept.transpose(-1, -2))

    def forward(
        self, hidden: torch.Tensor, cache: KeyValueCache, first: int, starts: Sequence[int]
    ) -> torch.Tensor:
        """(B, S, H) -> (B, S, H): S more tokens of B rows of the cache, from row `first` on.

        Row i has `starts[i]` tokens already; for more than one new token all have as many.
        """
        rows, columns, _ = hidden.shape
        alike = min(starts) == max(starts)
        assert alike or columns == 1, "rows of different lengths are prefilled apart"
        begin = torch.tensor(starts, device=self.device)[:, None]
        places = begin + torch.arange(columns, device=self.device)
        length = max(starts) + columns
        of_rows = slice(first, first + rows)
        at = Places(self, of_rows, places, length, starts[0] if alike else None)
        return self.through_layers(hidden, cache, at)

    def through_layers(
        self, hidden: torch.Tensor, cache: KeyValueCache, at: Places
    ) -> torch.Tensor:
        """(B, S, H) -> (B, S, H), on tensors alone: nothing here depends on their values."""
        rows, columns, _ = hidden.shape
        few = columns <= FEW_COLUMNS
        attend = _FewTokens(at, cache, self.queries) if few else _ManyTokens(at, cache)
        flat = hidden.reshape(rows * columns, -1).clone()
        for number, layer in enumerate(self.layers):
            normed = layer.input_norm(flat)
            query, key, value = self._query_key_value(torch.mm(normed, layer.qkv), layer, at)
            context = attend(number, query, key, value)
            flat += self._reduced(torch.mm(context, layer.projection))
            normed = layer.mlp_norm(flat)
            gate, up = torch.mm(normed, layer.gate_and_up).chunk(2, dim=-1)
            flat += self._reduced(torch.mm(silu(gate) * up, layer.down))
        return flat.view(rows, columns, -1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) -> (N, V), over the whole vocabulary, on the last stage."""
        assert self.final_norm is not None, "the last stage has the head"
        shard = torch.mm(self.final_norm(hidden), self._output_weight().t())
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
        """Cosine and sine, (S, d) each with S >= `length`, of the places in a row.

        The left half of a head turns against the right one, so its sine is negative.
        """
        if len(self.cos) < length:
            longer = max(length, 2 * len(self.cos))
            angles = self.language.rotary_pos_emb.get_freqs_non_repeated(longer).to(self.device)
            cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
            self.cos, self.sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return self.cos, self.sin

    def _query_key_value(
        self, mixed: torch.Tensor, layer: LayerWeights, at: Places
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, G * (R + 2) * d) as Megatron mixes it -> (N, G, R, d), and (N, G, d) twice."""
        if layer.qkv_bias is not None:
            mixed = mixed + layer.qkv_bias
        mixed = mixed.reshape(len(mixed), self.groups, self.queries + 2, self.head_dim)
        turning, value = mixed[:, :, :-1], mixed[:, :, -1]
        if layer.query_norm is not None and layer.key_norm is not None:
            normed = layer.query_norm(turning[:, :, :-1]), layer.key_norm(turning[:, :, -1:])
            turning = torch.cat(normed, dim=2)
        halves_swapped = turning.roll(self.head_dim // 2, dims=-1)
        turned = torch.addcmul(turning * at.cos, halves_swapped, at.sin)
        return turned[:, :, :-1], turned[:, :, -1], value

    def _reduced(self, partial: torch.Tensor) -> torch.Tensor:
        if self.tp_group.size() > 1:
            partial = partial.contiguous()
            dist.all_reduce(partial, group=self.tp_group)
        return partial

    def _output_weight(self) -> torch.Tensor:
        if self.language.share_embeddings_and_output_weights:
            return self.language.shared_embedding_or_output_weight()
        return self.language.output_layer.weight


class Places:
    """Where the new tokens of some rows belong: `places` (B, S) of the rows `rows` of the cache.

    The first `length` tokens of a row are read. `start` is the first new one's place in every row,
    or None where rows differ. `cos` and `sin`, (N, 1, R + 1, d), turn R queries and a key; queries
    are scaled on the way.
    """

    def __init__(
        self,
        transformer: CachedTransformer,
        rows: slice,
        places: torch.Tensor,
        length: int,
        start: int | None,
    ) -> None:
        self.rows, self.places, self.length, self.start = rows, places, length, start
        self.shape = places.shape
        table = transformer.positions(length)
        scale = torch.ones(transformer.queries + 1, 1, device=table[0].device, dtype=table[0].dtype)
        scale[:-1] = transformer.head_dim**-0.5
        self.cos, self.sin = (t[places.flatten()][:, None, None] * scale for t in table)


class _ManyTokens:
    """Attention of many tokens of each row, each of which sees those up to itself."""

    def __init__(self, at: Places, cache: KeyValueCache) -> None:
        self.at, self.cache = at, cache

    def __call__(
        self, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """(N, G, R, d), (N, G, d) twice -> (N, G * R * d), and the cache holds the new ones."""
        at = self.at
        columns, start = at.shape[1], at.length - at.shape[1]
        key, value = (t.unflatten(0, at.shape).transpose(1, 2) for t in (key, value))
        keys, values = self.cache.keys[number, at.rows], self.cache.values[number, at.rows]
        keys[..., start : at.length] = key.transpose(-1, -2)
        values[:, :, start : at.length] = value
        mask = None
        if start:
            key, value = keys[..., : at.length].transpose(-1, -2), values[:, :, : at.length]
            last = torch.ones(columns, at.length, dtype=torch.bool, device=key.device)
            mask = last.tril(start)
        context = scaled_dot_product_attention(
            query.unflatten(0, at.shape).permute(0, 2, 3, 1, 4).flatten(1, 2),
            key.contiguous(),
            value.contiguous(),
            attn_mask=mask,
            is_causal=mask is None,
            scale=1.0,
            enable_gqa=query.shape[2] > 1,
        )
        return context.transpose(1, 2).reshape(len(query), -1)


class _FewTokens:
    """Attention of one token of each row, or a few, which see their row up to themselves."""

    def __init__(self, at: Places, cache: KeyValueCache, queries: int) -> None:
        self.at, self.cache = at, cache
        keys, values = cache.keys[:, at.rows], cache.values[:, at.rows]
        # (B * G, d, T) and (B * G, T, d) of each layer, as `bmm` takes them.
        self.keys = keys[..., : at.length].flatten(1, 2).unbind(0)
        self.values = values[:, :, :, : at.length].flatten(1, 2).unbind(0)
        if at.start is not None:
            self.new_keys = keys[..., at.start : at.length].unbind(0)
            self.new_values = values[:, :, :, at.start : at.length].unbind(0)
        self.index = torch.arange(at.rows.start, at.rows.stop, device=at.places.device)
        self.mask = None
        if at.start is None or at.shape[1] > 1:
            self.mask = self._mask(queries)

    def _mask(self, queries: int) -> torch.Tensor:
        """(B * G, S * R, T) with minus infinity where a token is later than the query's."""
        places = torch.arange(self.at.length, device=self.at.places.device)
        later = (places > self.at.places[..., None]).repeat_interleave(queries, dim=1)
        mask = torch.zeros(later.shape, dtype=self.cache.keys.dtype, device=later.device)
        mask.masked_fill_(later, float("-inf"))
        return mask.repeat_interleave(self.cache.keys.shape[2], dim=0)

    def __call__(
        self, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """(N, G, R, d), (N, G, d) twice -> (N, G * R * d), and the cache holds the new ones."""
        rows, columns = self.at.shape
        tokens, groups, queries, size = query.shape
        self._keep(number, key.view(rows, columns, groups, size), value.unflatten(0, self.at.shape))
        query = query.unflatten(0, self.at.shape).transpose(1, 2)
        scores = torch.bmm(query.reshape(rows * groups, columns * queries, size), self.keys[number])
        if self.mask is not None:
            scores += self.mask
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        context = torch.bmm(weights, self.values[number])
        context = context.view(rows, groups, columns, queries * size).transpose(1, 2)
        return context.reshape(tokens, -1)

    def _keep(self, number: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """(B, S, G, d) twice into the cache; one token where rows differ in length."""
        if self.at.start is not None:
            self.new_keys[number].copy_(key.permute(0, 2, 3, 1))
            self.new_values[number].copy_(value.transpose(1, 2))
            return
        places = self.at.places[:, 0]
        self.cache.keys[number][self.index, :, :, places] = key[:, 0]
        self.cache.values[number][self.index, :, places] = value[:, 0]
