from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from examples.mimo.model.layers import SdpaCoreAttention
from examples.mimo.parallel.context import pack_sequence


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
