"""LayerScale (arXiv:2103.17239): a learned factor per feature on what a layer adds."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def with_layer_scale(linear: type) -> type:
    """A row-parallel linear layer class whose output, bias included, is scaled per feature."""

    class ScaledLinear(linear):  # type: ignore[misc, valid-type]
        def __init__(self, input_size: int, output_size: int, *rest: Any, **named: Any) -> None:
            super().__init__(input_size, output_size, *rest, **named)
            ones = torch.ones(output_size, dtype=self.weight.dtype, device=self.weight.device)
            self.layer_scale = torch.nn.Parameter(ones)

        def forward(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, Any]:
            output, bias = super().forward(*inputs, **named)
            return output * self.layer_scale, None if bias is None else bias * self.layer_scale

    return ScaledLinear
