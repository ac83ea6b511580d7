"""Names of a model's parts (`images.encoder`, `images.projector`, `language`), freezing, and norms.

The norms allow sequence parallelism without Transformer Engine or Apex.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.transformer import TransformerConfig

from examples.mimo.configs.schema import MimoConfig

if TYPE_CHECKING:
    from examples.mimo.model.mimo import StageMimoModel


ENCODER = "encoder"


def part_prefix(part: str) -> str:
    """What the names of a part's weights begin with in a checkpoint."""
    if part == "language":
        return "language_model."
    name, side = part.split(".")
    inside = "input_projections.0" if side == "projector" else f"encoders.{ENCODER}"
    return f"modality_submodules.{name}.{inside}."


def part_config_of(config: MimoConfig, part: str) -> Any:
    """The config of one part by its name."""
    if part == "language":
        return config.language
    name, side = part.split(".")
    return getattr(config.modalities[name], side)


def part_names(config: MimoConfig) -> list[str]:
    """`images.encoder`, `images.projector`, ..., `language`."""
    sides = [f"{name}.{side}" for name in config.modalities for side in ("encoder", "projector")]
    return [*sides, "language"]


def check_freeze(names: Iterable[str], config: MimoConfig) -> None:
    """ValueError for a name that is no part of the model."""
    known = part_names(config)
    for name in names:
        if name not in known:
            raise ValueError(f"--freeze {name}: {config.name} has the parts {', '.join(known)}")


def parts(model: StageMimoModel) -> dict[str, torch.nn.Module]:
    """The parts that this stage holds."""
    held: dict[str, torch.nn.Module] = {}
    for name, modality in model.modality_submodules.items():
        held[f"{name}.encoder"] = modality.encoders[ENCODER]
        held[f"{name}.projector"] = modality.input_projections[0]
    if model.language_model is not None:
        held["language"] = model.language_model
    return held


def freeze_parts(model: StageMimoModel, names: Iterable[str]) -> None:
    """Stop the named parts from training; gradients still flow through them."""
    held = parts(model)
    for name in names:
        if name in held:
            held[name].requires_grad_(False)


def is_empty_state(key: str, value: Any) -> bool:
    """Whether an entry of a sharded state is a layer's extra state, and holds nothing.

    Megatron's linear layers have one, and of norms only Transformer Engine's: a checkpoint without
    these entries fits both implementations. Only FP8 has scales to put there.
    """
    if not (isinstance(value, ShardedObject) and "_extra_state" in key):
        return False
    data = value.data
    return data is None or (isinstance(data, torch.Tensor) and not data.numel())


def keep_out_of_checkpoint(
    state: dict[str, Any], prefixes: tuple[str, ...], empty_states: bool
) -> dict[str, Any]:
    """A sharded state whose entries under `prefixes` are neither saved nor loaded.

    Nor are empty extra states, unless `empty_states` is False. The model keeps what it has there.
    """
    return {
        key: LocalNonpersistentObject(value.data)
        if key.startswith(prefixes) or (empty_states and is_empty_state(key, value))
        else value
        for key, value in state.items()
    }


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm, with gradients that are summed in 32 bits on every device.

    On CPUs torch sums those of weight and bias in the input's type: in 16 bits over 5,000
    positions they are 6 % off.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., H)."""
        if input.is_cuda or input.dtype == torch.float32:
            return super().forward(input)
        return _LayerNorm16.apply(input, self.weight, self.bias, self.eps)


class _LayerNorm16(torch.autograd.Function):
    """Saves what torch saves for backward: the input in 16 bits and two numbers a position."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        y, mean, rstd = torch.native_layer_norm(
            x.float(), x.shape[-1:], weight.float(), bias.float(), eps
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        gradients = torch.ops.aten.native_layer_norm_backward(
            gradient.float(),
            x.float(),
            x.shape[-1:],
            mean,
            rstd,
            weight.float(),
            bias.float(),
            list(ctx.needs_input_grad[:3]),
        )
        pairs = zip(gradients, (x, weight, bias), strict=True)
        return *(None if grad is None else grad.to(of.dtype) for grad, of in pairs), None


class Norm:
    """Builds a `LayerNorm` or torch's `RMSNorm`, whichever the config asks for.

    Under sequence parallelism each rank sees a part of the sequence, so the norm's gradients
    are partial sums; marking its parameters `sequence_parallel` has Megatron add them up.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        norms = {"LayerNorm": LayerNorm, "RMSNorm": torch.nn.RMSNorm}
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
