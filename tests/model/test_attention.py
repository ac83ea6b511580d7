from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from examples.mimo.model.layers import SdpaCoreAttention
from examples.mimo.parallel.context import pack_sequence, shard_sequence


@pytest.fixture
def attention():
    config = SimpleNamespace(
        context_parallel_size=1,
        attention_dropout=0.0,
        kv_channels=8,
        num_attention_heads=4,
        sequence_parallel=False,
    )
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    module = SdpaCoreAttention.__new__(SdpaCoreAttention)
    torch.nn.Module.__init__(module)
    module.config, module.attn_mask_type = config, AttnMaskType.causal
    module.cp_group = None
    module.tp_group, module.dropout, module.scale = groups.tp, 0.0, 8**-0.5
    return module


def by_hand(query, key, value, hidden):
    """softmax(QK'/sqrt(d))V with repeated groups; `hidden` (Sq, Sk) is True where a key hides."""
    repeat = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(repeat, dim=2) for t in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


@pytest.mark.parametrize("queries", [6, 1, 2])
def test_causal_grouped_queries_and_cached_keys(attention, queries):
    torch.manual_seed(0)
    query, key, value = (torch.randn(s, 2, n, 8) for s, n in ((queries, 4), (6, 2), (6, 2)))
    hidden = torch.ones(queries, 6, dtype=torch.bool).triu(6 - queries + 1)
    context = attention(query, key, value, None)
    assert (context - by_hand(query, key, value, hidden)).abs().max() < 1e-6


def test_full_attention_with_a_mask(attention):
    torch.manual_seed(0)
    query, key, value = (torch.randn(5, 2, 4, 8) for _ in range(3))
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[:, 3:] = True
    context = attention(query, key, value, hidden, AttnMaskType.no_mask)
    assert (context - by_hand(query, key, value, hidden)).abs().max() < 1e-6


def test_packed_sequences_attend_to_themselves(attention):
    torch.manual_seed(0)
    query, key, value = (torch.randn(9, 1, n, 8) for n in (4, 2, 2))
    segment = torch.tensor([0] * 2 + [1] * 6 + [2])
    hidden = (segment[:, None] != segment) | torch.ones(9, 9, dtype=torch.bool).triu(1)
    alone = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    packed = pack_sequence([0, 2, 8, 9], alone, query.device)
    assert packed.positions.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 0]
    context = attention(query, key, value, None, packed_seq_params=packed)
    assert (context - by_hand(query, key, value, hidden)).abs().max() < 1e-6


def test_packed_samples_of_any_lengths_get_the_gradients_of_each_alone(attention):
    """Those of similar lengths are computed side by side, padded; the order stays."""
    torch.manual_seed(0)
    lengths = [7, 40, 1, 8, 39, 6, 1, 13]
    alone = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    packed = pack_sequence([0, *accumulate(lengths)], alone, torch.device("cpu"))
    assert packed.batches.shapes == [(40, 2), (13, 1), (8, 3), (1, 2)]
    inputs = [torch.randn(sum(lengths), 1, n, 8, requires_grad=True) for n in (4, 2, 2)]
    weights = torch.randn(sum(lengths), 1, 32)
    context = attention(*inputs, None, packed_seq_params=packed)
    gradients = torch.autograd.grad((context * weights).sum(), inputs)
    parts = zip(*(tensor.split(lengths) for tensor in inputs), strict=True)
    expected = torch.cat([attention(*part, None) for part in parts])
    assert (context - expected).abs().max() < 1e-6
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert (gradient - other).abs().max() < 1e-6


@pytest.mark.parametrize("size", [1, 2, 4])
def test_pieces_of_a_packed_sequence_are_its_samples_on_every_rank(size):
    """What a kernel for variable lengths is told, with the keys it gets, is the whole's attention.

    Every rank of a context-parallel group attends with its chunks of the samples.
    """
    torch.manual_seed(0)
    cu_seqlens = [0, 8, 32, 40]
    query, key, value = (torch.randn(40, 1, heads, 8) for heads in (4, 2, 2))
    segment = torch.bucketize(torch.arange(40), torch.tensor(cu_seqlens[1:]), right=True)
    hidden = (segment[:, None] != segment) | torch.ones(40, 40, dtype=torch.bool).triu(1)
    expected = by_hand(query, key, value, hidden)
    positions = torch.cat([torch.arange(8), torch.arange(24), torch.arange(8)])
    groups = [SimpleNamespace(rank=lambda r=r: r, size=lambda: size) for r in range(size)]

    def shard(whole, group):
        return shard_sequence(whole, 0, group, cu_seqlens)

    keys, values = (torch.cat([shard(t, group) for group in groups]) for t in (key, value))
    for group in groups:
        packed = pack_sequence(cu_seqlens, group, query.device)
        assert torch.equal(packed.positions, shard(positions, group))
        queries = shard(query, group)
        starts, key_starts = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_kv.tolist()
        assert (starts[-1], packed.max_seqlen_q) == (40 // size, max(packed.query_lengths))
        rows = torch.arange(40) if packed.key_rows is None else packed.key_rows
        contexts = []
        for (start, end), (first, last) in zip(pairwise(starts), pairwise(key_starts), strict=True):
            queried, seen = end - start, last - first
            later = torch.ones(queried, seen, dtype=torch.bool).triu(seen - queried + 1)
            piece = keys[rows[first:last]], values[rows[first:last]]
            contexts.append(by_hand(queries[start:end], *piece, later))
        assert (torch.cat(contexts) - shard(expected, group)).abs().max() < 1e-6
