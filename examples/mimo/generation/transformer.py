"""Forward pass of the language model with a key/value cache, at any tensor-parallel size.

It computes with the parameters of Megatron's modules, of either layer spec, each rank with its
shard. Megatron's own static inference context rotates every cached key again for every token; here
keys are cached after rotation.
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

from examples.mimo.modalities.values import upload
from examples.mimo.model.mimo import StageMimoModel

# Up to so many new tokens of a sequence plain matrix products are faster than the fused attention.
MAX_DECODE_TOKENS = 64
# The cache grows in steps of so many tokens, as growing copies its tensors.
LENGTH_STEP = 128
# The logits of a long prompt do not fit memory at once.
LOGPROB_TOKENS = 256

# Megatron's parameter names, of the local and the Transformer Engine layer spec.
PARAMETER_NAMES = {
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
        self.scaled_epsilon = torch.tensor(math.sqrt(len(weight) * epsilon), dtype=weight.dtype)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension.

        On CPUs torch's rms_norm runs ten operations; sqrt(|x|^2 + n * epsilon) is one `hypot`.
        """
        if hidden.is_cuda:
            return rms_norm(hidden, hidden.shape[-1:], self.weight, self.epsilon)
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        return (hidden / torch.hypot(norm, self.scaled_epsilon)).mul_(self.scaled)


@dataclass(frozen=True)
class LayerWeights:
    """The parameters of one layer on this rank; matrices are (in, out) views."""

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
    """Collect the parameters of a Megatron layer; ValueError for a parameter not known here."""
    weights: dict[str, Any] = {}
    for megatron_name, parameter in layer.named_parameters():
        if megatron_name not in PARAMETER_NAMES:
            raise ValueError(
                f"generation does not know the parameter {megatron_name} of a language layer; "
                "teach generation/transformer.py what it does"
            )
        name = PARAMETER_NAMES[megatron_name]
        if parameter.dim() == 2:
            weights[name] = _transposed(parameter)
        else:
            vector = parameter.detach()
            weights[name] = RmsNorm(vector, epsilon) if name.endswith("norm") else vector
    return LayerWeights(**weights)


def _transposed(parameter: torch.Tensor) -> torch.Tensor:
    """(out, in) -> (in, out), a view of the same memory.

    CPUs multiply a batch of 4 to 16 tokens 1.1 to 1.3 times as fast by a matrix stored this way,
    and a batch of 2 or 3 a little slower. The parameter itself takes the new layout; Megatron's
    modules compute with it too, but an optimizer that holds the old memory would not train it.
    """
    if not parameter.is_cuda and parameter.is_contiguous():
        parameter.data = parameter.data.t().contiguous().t()
    return parameter.detach().t()


def round_length(length: int) -> int:
    """The tokens that a slot of a cache has for a sequence of `length`."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


class KeyValueCache:
    """Keys and values of a number of slots, for this rank's L layers and G query groups.

    A slot holds one sequence. `keys` are (L, slots, G, d, S), after rotation; `values`
    (L, slots, G, S, d). Scores of a new token then read the keys in the order of memory.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, max_tokens: float = math.inf
    ) -> None:
        self.keys, self.values, self.max_tokens = keys, values, max_tokens

    @property
    def batch_size(self) -> int:
        """The number of slots."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """The number of tokens that fit a slot."""
        return self.keys.shape[-1]

    def reserve(self, slots: int, length: int) -> None:
        """Grow to at least `slots` slots of `length` tokens, whose content stays.

        Where that, with the slots and the length there are, came to more than `max_tokens`, what
        is not needed any more is given back.
        """
        slots, length = self._size(slots, length)
        if (slots, length) == (self.batch_size, self.length):
            return
        layers, old_slots, groups, head_dim, old_length = self.keys.shape
        keys = self.keys.new_zeros(layers, slots, groups, head_dim, length)
        values = self.values.new_zeros(layers, slots, groups, length, head_dim)
        kept = slice(min(old_slots, slots)), slice(min(old_length, length))
        keys[:, kept[0], ..., kept[1]] = self.keys[:, kept[0], ..., kept[1]]
        values[:, kept[0], :, kept[1]] = self.values[:, kept[0], :, kept[1]]
        self.keys, self.values = keys, values

    def changes(self, slots: int, length: int) -> bool:
        """Whether `reserve` would take other tensors."""
        return self._size(slots, length) != (self.batch_size, self.length)

    def _size(self, slots: int, length: int) -> tuple[int, int]:
        needed = slots, round_length(length)
        size = max(slots, self.batch_size), max(needed[1], self.length)
        return size if size[0] * size[1] <= self.max_tokens else needed

    def copy_slot(self, slot: int, length: int) -> KeyValueCache:
        """The first `length` tokens of a slot, as a cache of one slot."""
        keys = self.keys[:, slot : slot + 1, ..., :length].clone()
        return KeyValueCache(keys, self.values[:, slot : slot + 1, :, :length].clone())

    def clear_slot(self, slot: int) -> None:
        """Overwrite a slot with zeros."""
        self.keys[:, slot] = 0
        self.values[:, slot] = 0

    def write_slot(self, slot: int, source: KeyValueCache, source_slot: int, length: int) -> None:
        """Copy the first `length` tokens of a slot of `source` into `slot`."""
        self.keys[:, slot, ..., :length] = source.keys[:, source_slot, ..., :length]
        self.values[:, slot, :, :length] = source.values[:, source_slot, :, :length]


class CachedTransformer:
    """The language layers of this rank's pipeline stage, with a key/value cache.

    Layers like Llama's, as `LanguageConfig` describes them: RMSNorm, rotary positions
    (arXiv:2104.09864), grouped queries (arXiv:2305.13245), SwiGLU (arXiv:2002.05202).
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
        self.max_cache_tokens = math.inf
        self.tp_group = model.pg_collection.tp
        self.head_dim: int = self.config.kv_channels
        self.groups = self.config.num_query_groups // self.tp_group.size()
        self.queries_per_group = self.config.num_attention_heads // self.config.num_query_groups
        self.device = self.layers[0].qkv.device
        self.dtype = self.layers[0].qkv.dtype
        self.cos = self.sin = torch.empty(0, self.head_dim, device=self.device, dtype=self.dtype)

    def new_cache(self) -> KeyValueCache:
        """An empty cache; `reserve` gives it slots."""
        shape = (len(self.layers), 0, self.groups, self.head_dim, 0)
        keys = torch.empty(shape, device=self.device, dtype=self.dtype)
        return KeyValueCache(keys, keys.transpose(-1, -2), self.max_cache_tokens)

    @property
    def bytes_per_token(self) -> int:
        """What a token takes in a cache of this rank."""
        size = torch.empty((), dtype=self.dtype).element_size()
        return 2 * len(self.layers) * self.groups * self.head_dim * size

    def forward(
        self, hidden: torch.Tensor, cache: KeyValueCache, first_slot: int, starts: Sequence[int]
    ) -> torch.Tensor:
        """(B, S, H) -> (B, S, H): S new tokens for each of B slots, from `first_slot` on.

        Slot `first_slot + i` holds `starts[i]` tokens already; all the same number where S > 1.
        """
        batch_size, new_tokens, _ = hidden.shape
        same_start = min(starts) == max(starts)
        assert same_start or new_tokens == 1, "prompts of different lengths are prefilled apart"
        index = upload(torch.tensor(starts), self.device)[:, None]
        index = index + torch.arange(new_tokens, device=self.device)
        positions = Positions(
            self,
            slice(first_slot, first_slot + batch_size),
            index,
            length=max(starts) + new_tokens,
            start=starts[0] if same_start else None,
        )
        return self.run_layers(hidden, cache, positions)

    def run_layers(
        self, hidden: torch.Tensor, cache: KeyValueCache, positions: Positions
    ) -> torch.Tensor:
        """(B, S, H) -> (B, S, H); control flow depends on no tensor's values (CUDA graphs)."""
        batch_size, new_tokens, _ = hidden.shape
        attention: _DecodeAttention | _PrefillAttention
        if new_tokens <= MAX_DECODE_TOKENS:
            attention = _DecodeAttention(positions, cache, self.queries_per_group)
        else:
            attention = _PrefillAttention(positions, cache)
        flat = hidden.reshape(batch_size * new_tokens, -1).clone()
        for number, layer in enumerate(self.layers):
            qkv = torch.mm(layer.input_norm(flat), layer.qkv)
            context = attention(number, *self._query_key_value(qkv, layer, positions))
            flat += self._all_reduce(torch.mm(context, layer.projection))
            gate, up = torch.mm(layer.mlp_norm(flat), layer.gate_and_up).chunk(2, dim=-1)
            flat += self._all_reduce(torch.mm(silu(gate) * up, layer.down))
        return flat.view(batch_size, new_tokens, -1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) -> (N, V), the whole vocabulary on every rank of the last stage."""
        assert self.final_norm is not None, "only the last stage has the output layer"
        shard = torch.mm(self.final_norm(hidden), self._output_weight().t())
        if self.tp_group.size() == 1:
            return shard
        shards = [torch.empty_like(shard.contiguous()) for _ in range(self.tp_group.size())]
        dist.all_gather(shards, shard.contiguous(), group=self.tp_group)
        return torch.cat(shards, dim=-1)

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(N, H) and (N,) -> (N,): the log-probabilities of the targets, in fp32."""
        pieces = []
        for part, ids in zip(
            hidden.split(LOGPROB_TOKENS), targets.split(LOGPROB_TOKENS), strict=True
        ):
            logprobs = self.logits(part).float().log_softmax(dim=-1)
            pieces.append(logprobs.gather(1, ids[:, None])[:, 0])
        return torch.cat(pieces)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) ids of text tokens -> (B, 1, H), on the first stage."""
        return self.language.embedding.word_embeddings(tokens[:, None])

    def receive(self, batch_size: int, new_tokens: int) -> torch.Tensor:
        """Receive (B, S, H) from the previous pipeline stage."""
        shape = (batch_size, new_tokens, self.config.hidden_size)
        hidden = torch.empty(shape, dtype=self.dtype, device=self.device)
        dist.recv(hidden, src=mpu.get_pipeline_model_parallel_prev_rank())
        return hidden

    def send(self, hidden: torch.Tensor) -> None:
        """Send (B, S, H) to the next pipeline stage."""
        dist.send(hidden.contiguous(), dst=mpu.get_pipeline_model_parallel_next_rank())

    def rotary_table(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the rotary angles, (S, d) each with S >= `length`.

        Rotation is x * cos + swap_halves(x) * sin, so the sine of the left half is negative.
        """
        if len(self.cos) < length:
            longer = max(length, 2 * len(self.cos))
            angles = self.language.rotary_pos_emb.get_freqs_non_repeated(longer).to(self.device)
            cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
            self.cos, self.sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return self.cos, self.sin

    def _query_key_value(
        self, qkv: torch.Tensor, layer: LayerWeights, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, G * (R + 2) * d) in Megatron's order -> (N, G, R, d), and (N, G, d) twice."""
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        qkv = qkv.reshape(len(qkv), self.groups, self.queries_per_group + 2, self.head_dim)
        query_key, value = qkv[:, :, :-1], qkv[:, :, -1]
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = query_key[:, :, :-1], query_key[:, :, -1:]
            query_key = torch.cat((layer.query_norm(query), layer.key_norm(key)), dim=2)
        swapped = query_key.roll(self.head_dim // 2, dims=-1)
        rotated = torch.addcmul(query_key * positions.cos, swapped, positions.sin)
        return rotated[:, :, :-1], rotated[:, :, -1], value

    def _all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        if self.tp_group.size() > 1:
            partial = partial.contiguous()
            dist.all_reduce(partial, group=self.tp_group)
        return partial

    def _output_weight(self) -> torch.Tensor:
        if self.language.share_embeddings_and_output_weights:
            return self.language.shared_embedding_or_output_weight()
        return self.language.output_layer.weight


class Positions:
    """Positions of the new tokens of one forward pass: `index` (B, S), for the slots `slots`.

    Attention reads the first `length` tokens of a slot. `start` is the position of the first new
    token where all sequences have the same, else None. `cos` and `sin`, (N, 1, R + 1, d), rotate R
    queries and a key; the queries' part includes the softmax scale.
    """

    def __init__(
        self,
        transformer: CachedTransformer,
        slots: slice,
        index: torch.Tensor,
        length: int,
        start: int | None,
    ) -> None:
        self.slots, self.index, self.length, self.start = slots, index, length, start
        self.shape = index.shape
        table = transformer.rotary_table(length)
        queries = transformer.queries_per_group
        scale = torch.ones(queries + 1, 1, device=table[0].device, dtype=table[0].dtype)
        scale[:-1] = transformer.head_dim**-0.5
        self.cos, self.sin = (t[index.flatten()][:, None, None] * scale for t in table)


class _PrefillAttention:
    """Causal attention of many new tokens, by torch's fused kernel."""

    def __init__(self, positions: Positions, cache: KeyValueCache) -> None:
        self.positions, self.cache = positions, cache

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """(N, G, R, d), (N, G, d) twice -> (N, G * R * d); keys and values are cached."""
        (_, new_tokens), length = self.positions.shape, self.positions.length
        start = length - new_tokens
        slots, shape = self.positions.slots, self.positions.shape
        key, value = (t.unflatten(0, shape).transpose(1, 2) for t in (key, value))
        keys, values = self.cache.keys[layer, slots], self.cache.values[layer, slots]
        keys[..., start:length] = key.transpose(-1, -2)
        values[:, :, start:length] = value
        mask = None
        if start:
            key, value = keys[..., :length].transpose(-1, -2), values[:, :, :length]
            mask = torch.ones(new_tokens, length, dtype=torch.bool, device=key.device).tril(start)
        context = scaled_dot_product_attention(
            query.unflatten(0, shape).permute(0, 2, 3, 1, 4).flatten(1, 2),
            key.contiguous(),
            value.contiguous(),
            attn_mask=mask,
            is_causal=mask is None,
            scale=1.0,
            enable_gqa=query.shape[2] > 1,
        )
        return context.transpose(1, 2).reshape(len(query), -1)


class _DecodeAttention:
    """Causal attention of one new token of each sequence, or a few, by matrix products."""

    def __init__(self, positions: Positions, cache: KeyValueCache, queries_per_group: int) -> None:
        self.positions, self.cache = positions, cache
        slots, length, start = positions.slots, positions.length, positions.start
        keys, values = cache.keys[:, slots], cache.values[:, slots]
        # (B * G, d, T) and (B * G, T, d) of each layer, as `bmm` takes them.
        self.keys = keys[..., :length].flatten(1, 2).unbind(0)
        self.values = values[:, :, :, :length].flatten(1, 2).unbind(0)
        if start is not None:
            self.new_keys = keys[..., start:length].unbind(0)
            self.new_values = values[:, :, :, start:length].unbind(0)
        self.slot_index = torch.arange(slots.start, slots.stop, device=positions.index.device)
        self.mask = None
        if start is None or positions.shape[1] > 1:
            self.mask = self._mask(queries_per_group)

    def _mask(self, queries_per_group: int) -> torch.Tensor:
        """(B * G, S * R, T) with minus infinity where a key is later than the query."""
        index = self.positions.index
        later = torch.arange(self.positions.length, device=index.device) > index[..., None]
        later = later.repeat_interleave(queries_per_group, dim=1)
        mask = torch.zeros(later.shape, dtype=self.cache.keys.dtype, device=later.device)
        mask.masked_fill_(later, float("-inf"))
        return mask.repeat_interleave(self.cache.keys.shape[2], dim=0)

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """(N, G, R, d), (N, G, d) twice -> (N, G * R * d); keys and values are cached."""
        (batch, new), (_, groups, queries, head_dim) = self.positions.shape, query.shape
        self._store(layer, key.view(batch, new, groups, head_dim), value.unflatten(0, (batch, new)))
        query = query.unflatten(0, (batch, new)).transpose(1, 2)
        scores = torch.bmm(query.reshape(batch * groups, new * queries, head_dim), self.keys[layer])
        if self.mask is not None:
            scores += self.mask
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        context = torch.bmm(weights, self.values[layer])
        context = context.view(batch, groups, new, queries * head_dim).transpose(1, 2)
        return context.reshape(batch * new, -1)

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Cache (B, S, G, d) twice; S is 1 where the sequences differ in length."""
        if self.positions.start is not None:
            self.new_keys[layer].copy_(key.permute(0, 2, 3, 1))
            self.new_values[layer].copy_(value.transpose(1, 2))
            return
        position = self.positions.index[:, 0]
        self.cache.keys[layer][self.slot_index, :, :, position] = key[:, 0]
        self.cache.values[layer][self.slot_index, :, position] = value[:, 0]
