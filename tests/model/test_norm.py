import pytest
import torch
from torch.nn import LayerNorm

ROWS, WIDTH = 5_000, 128
# A rounding to bf16, whose numbers are up to 2**-8 apart.
BOUND = 2**-8


def gradients(norm, x, upstream):
    norm(x).backward(upstream)
    return {"input": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}


@pytest.fixture
def both():
    """Gradients of a norm in 16 bits and of the same one in 32."""
    torch.manual_seed(0)
    norm = LayerNorm(WIDTH).bfloat16()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    exact = LayerNorm(WIDTH)
    exact.load_state_dict(norm.state_dict())
    x = torch.randn(ROWS, WIDTH).bfloat16()
    upstream = torch.randn(ROWS, WIDTH).bfloat16()
    ours = gradients(norm, x.clone().requires_grad_(), upstream)
    return ours, gradients(exact, x.float().requires_grad_(), upstream.float())


@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_gradients_in_16_bits_are_rounded_once(both, name):
    ours, exact = (result[name] for result in both)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() / exact.norm() < BOUND


def test_in_32_bits_it_is_torchs():
    x = torch.randn(3, WIDTH)
    assert torch.equal(LayerNorm(WIDTH)(x), torch.nn.LayerNorm(WIDTH)(x))


def test_frozen_it_passes_gradients_on():
    norm = LayerNorm(WIDTH).bfloat16().requires_grad_(False)
    x = torch.randn(3, WIDTH).bfloat16().requires_grad_()
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad.isfinite().all()
