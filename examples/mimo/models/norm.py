"""Layer norms that allow sequence parallelism without Transformer Engine or Apex."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class Norm:
    """Builds torch's `LayerNorm` or `RMSNorm`, whichever the config asks for.

    Under sequence parallelism each rank sees a part of the sequence, so the norm's gradients
    are partial sums; marking its parameters `sequence_parallel` has Megatron add them up.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in norms:
            raise ValueError(
                f"--normalization {config.normalization} needs Transformer Engine; "
                f"choose {' or '.join(norms)}"
            )
        if config.layernorm_zero_centered_gamma:
            raise ValueError("--apply-layernorm-1p needs Transformer Engine")
        norm = norms[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)
        return norm
