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
