"""What CPUs compute in few passes is what torch's and Megatron's formulas say."""

import pytest
import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.models.common.embeddings import rope_utils
from torch.nn import functional

# Of numbers around 1 in fp32.
BOUND = 5e-6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def random(*shape):
    return torch.randn(shape, requires_grad=True)


def check(ours, formula, *inputs):
    """Output and gradients of `ours` in fp32 beside those of `formula` in fp64."""
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    result, exact = ours(*inputs), formula(*exact_inputs)
    upstream = torch.randn_like(result)
    result.backward(upstream)
    exact.backward(upstream.double())
    assert (result - exact).abs().max() < BOUND
    for x, exact_input in zip(inputs, exact_inputs, strict=True):
        scale = exact_input.grad.abs().max().clamp(min=1)
        assert ((x.grad - exact_input.grad) / scale).abs().max() < BOUND


def rms_norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(40,), (7, 40), (5, 3, 40), (4, 3, 2, 40), (0, 3, 40)])
def test_rms_norm(shape):
    if not shape[0]:
        x, weight = random(*shape), random(40)
        functional.rms_norm(x, (40,), weight, 1e-5).sum().backward()
        assert torch.equal(weight.grad, torch.zeros(40))
        return
    check(lambda x, w: functional.rms_norm(x, (40,), w, 1e-5), rms_norm, random(*shape), random(40))


def test_rms_norm_of_a_view_that_is_not_contiguous():
    whole = torch.randn(6, 4, 40)
    x = whole.transpose(0, 1).detach().requires_grad_()
    check(lambda x, w: functional.rms_norm(x, (40,), w, 1e-5), rms_norm, x, random(40))


def test_rms_norm_of_tiny_and_of_large_numbers_is_finite():
    for size in (0.0, 1e-20, 1e15):
        x = torch.full((3, 40), size, requires_grad=True)
        functional.rms_norm(x, (40,), random(40), 1e-5).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("has_bias", [False, True])
def test_swiglu(has_bias):
    def formula(y, bias=0.0):
        gate, up = (y + bias).chunk(2, dim=-1)
        return gate * gate.sigmoid() * up

    inputs = [random(5, 3, 40)] + [random(40)] * has_bias
    check(lambda y, bias=None: bias_swiglu_impl(y, bias), formula, *inputs)


def rotary(t, freqs):
    first, second = t.chunk(2, dim=-1)
    return t * freqs.to(t.dtype).cos() + torch.cat((-second, first), -1) * freqs.to(t.dtype).sin()


def test_rotary_positions_also_with_halves_that_turn_by_other_angles():
    freqs = torch.randn(7, 1, 1, 16)

    def ours(t):
        return rope_utils._apply_rotary_pos_emb_bshd(t, freqs)

    check(ours, lambda t: rotary(t, freqs), random(7, 3, 4, 16))
    # The angles are remembered, and are the same the second time.
    check(ours, lambda t: rotary(t, freqs), random(7, 3, 4, 16))


def test_rotary_positions_that_are_rarely_used_are_megatrons():
    t, freqs = torch.randn(7, 3, 4, 16), torch.randn(7, 1, 1, 16)
    half = freqs[..., :8].contiguous()
    turned = rope_utils._apply_rotary_pos_emb_bshd(t, half)
    assert torch.equal(turned[..., 8:], t[..., 8:])
    assert (turned[..., :8] - rotary(t[..., :8], half)).abs().max() < BOUND
    interleaved = rope_utils._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=True)
    even, odd = t[..., 0::2], t[..., 1::2]
    expected = even * freqs.cos()[..., 0::2] - odd * freqs.sin()[..., 0::2]
    assert (interleaved[..., 0::2] - expected).abs().max() < BOUND
    twice = rope_utils._apply_rotary_pos_emb_bshd(t, freqs, mscale=2.0)
    assert (twice - 2 * rotary(t, freqs)).abs().max() < 2 * BOUND


def attention(query, key, value, is_causal, scale):
    repeat = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeat, dim=1) for t in (key, value))
    scores = query @ key.mT * scale
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ value


# A causal mask of other sizes is aligned with the first key, by torch.
SQUARE = [(n, n, is_causal) for n in (1, 17, 150, 151) for is_causal in (False, True)]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("queries", "keys", "is_causal"), [*SQUARE, (3, 40, False)])
def test_attention(heads, groups, queries, keys, is_causal):
    """Both sides of the length from which on it is torch's; as views that are not contiguous."""
    query = random(queries, 3, heads, 8)
    key, value = random(keys, 3, groups, 8), random(keys, 3, groups, 12)
    options = {"is_causal": is_causal, "enable_gqa": heads != groups}

    def ours(*tensors):
        tensors = (t.permute(1, 2, 0, 3) for t in tensors)
        return functional.scaled_dot_product_attention(*tensors, scale=0.3, **options)

    def formula(*tensors):
        return attention(*(t.permute(1, 2, 0, 3) for t in tensors), is_causal, 0.3)

    check(ours, formula, query, key, value)


def test_short_attention_trains_and_answers_alike():
    """Answers, which need no gradient, are torch's, bit for bit."""
    query, key, value = (random(2, 4, 9, 8) for _ in range(3))
    attend = functional.scaled_dot_product_attention
    trained = attend(query, key, value, is_causal=True)
    assert "ShortAttention" in type(trained.grad_fn).__name__
    with torch.no_grad():
        answered = attend(query, key, value, is_causal=True)
        assert torch.equal(answered, attend.__wrapped__(query, key, value, is_causal=True))
    assert (trained - answered).abs().max() < 1e-6
    masked = attend(query, key, value, attn_mask=torch.ones(9, 9, dtype=torch.bool).tril())
    assert "ShortAttention" not in type(masked.grad_fn).__name__
    assert (trained - masked).abs().max() < 1e-6
    assert attend(query[:0], key[:0], value[:0]).shape == (0, 4, 9, 8)
