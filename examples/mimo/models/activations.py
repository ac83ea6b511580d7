"""Activations that Megatron-Core does not name."""

from __future__ import annotations

import torch
from torch.nn import functional


def tanh_gelu(values: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (arXiv:1606.08415), as SigLIP was trained."""
    return functional.gelu(values, approximate="tanh")
