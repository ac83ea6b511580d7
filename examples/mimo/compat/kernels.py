"""Arithmetic in few passes where Megatron and torch have kernels of Apex's or for CUDA only.

Optimizer: without Apex and Transformer Engine Megatron takes torch's AdamW, whose distributed
checkpoints do not load, and loops over the parameters for the gradient's norm, its scaling and the
copies between main and model parameters: a kernel or three for each, and for the norm a wait for
each. Here they are torch's fused and foreach kernels, which take all parameters at once, and the
host waits for nothing but the norm itself.

CPU: norms, SwiGLU and rotary positions are formulas there, of a pass over memory for every term;
attention computes its weights twice, in blocks for long sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as base_optimizer
from megatron.training.utils import common_utils
from torch.nn import functional

from examples.mimo.compat import Replacement

Tensors = list[torch.Tensor]
# Up to so many positions `ShortAttention` is faster than torch's flash attention, on CPUs.
MAX_SHORT = 150


def optimizer_replacements() -> list[Replacement]:
    """The entries for training; none where Apex or Transformer Engine brings its own kernels."""
    if not optimizer.USING_PYTORCH_OPTIMIZER and optimizer.Adam is not GroupStepAdam:
        return []
    which = "optimizer/__init__.py: picks torch's AdamW, whose distributed checkpoints do not load"
    state = "distrib_optimizer.py: load_state_dict knows the step of Apex's and TE's Adam only"
    norm = "core/utils.py: local_multi_tensor_l2_norm waits for a number of every tensor"
    scale = "core/utils.py: local_multi_tensor_scale takes two kernels and a copy of each tensor"
    copies = "optimizer.py: _multi_tensor_copy_this_to_that takes a kernel for each tensor"
    shards = "distrib_optimizer.py: copies main to model parameters by a kernel for each tensor"
    sharded = distrib_optimizer.DistributedOptimizer
    copy_main_params = "_copy_main_params_to_model_params"
    return [
        Replacement(optimizer, "Adam", GroupStepAdam, which),
        Replacement(optimizer, "USING_PYTORCH_OPTIMIZER", False, which),
        Replacement(distrib_optimizer, "HAVE_APEX_OR_TE", True, state),
        Replacement(distrib_optimizer, "USING_APEX_OPTIMIZER", True, state),
        # Each module has taken these by name.
        Replacement(clip_grads, "l2_norm_impl", l2_norm, norm),
        Replacement(common_utils, "multi_tensor_l2norm", l2_norm, norm),
        Replacement(clip_grads, "multi_tensor_scale_impl", scale_tensors, scale),
        Replacement(base_optimizer, "multi_tensor_scale_impl", scale_tensors, scale),
        Replacement(base_optimizer, "_multi_tensor_copy_this_to_that", copy_tensors, copies),
        Replacement(
            sharded, copy_main_params, _copies_at_once(getattr(sharded, copy_main_params)), shards
        ),
    ]


def cpu_replacements() -> list[Replacement]:
    """The entries for a machine without CUDA."""
    norms, passes = "torch's normalization.py", "its formula is a pass over memory for every term"
    rotary = _rotary_in_few_passes(rope_utils._apply_rotary_pos_emb_bshd)
    layer_norm = _layer_norm_in_32_bits(functional.layer_norm)
    rms_norm = _rms_norm_in_few_passes(functional.rms_norm)
    attention = _short_attention(functional.scaled_dot_product_attention)
    weights = "torch's functional.py: the blocks of its kernel are for long sequences"
    entries: list[tuple[Any, str, Any, str]] = [
        (functional, "layer_norm", layer_norm, f"{norms}: sums gradients in 16 bits"),
        (functional, "rms_norm", rms_norm, f"{norms}: {passes}"),
        (functional, "scaled_dot_product_attention", attention, weights),
        (fused_bias_swiglu, "swiglu", swiglu, f"fused_bias_swiglu.py: {passes}"),
        (fused_bias_swiglu, "swiglu_back", swiglu_back, f"fused_bias_swiglu.py: {passes}"),
        (rope_utils, "_apply_rotary_pos_emb_bshd", rotary, f"rope_utils.py: {passes}"),
    ]
    return [Replacement(*entry) for entry in entries]


class GroupStepAdam(torch.optim.Optimizer):
    """Adam (arXiv:1412.6980), or AdamW (arXiv:1711.05101) when `adam_w_mode`.

    Keeps one step count per parameter group, as Apex and Transformer Engine do. Megatron's
    distributed optimizer saves and reloads that form in every layout; with torch's own AdamW,
    whose step is a tensor per parameter, its checkpoints do not reload.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("--optimizer-cuda-graph needs Apex or Transformer Engine")
        self.adam_w_mode = adam_w_mode
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "Megatron never passes a closure"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            # A fused kernel takes tensors of one kind.
            for kind in dict.fromkeys((p.device, p.dtype) for p in params):
                self._update([p for p in params if (p.device, p.dtype) == kind], group)

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
        # Filled on the device: a number from the host would have to be waited for.
        step = torch.full((), group["step"], dtype=torch.float32, device=params[0].device)
        update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        update(
            params,
            [p.grad.to(p.dtype) for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def l2_norm(
    chunk_size: int, noop_flag: torch.Tensor, lists: Sequence[Tensors], *_: Any
) -> tuple[torch.Tensor, None]:
    """The norm of all tensors of all lists as one vector, in fp32: (1,), on their device."""
    tensors = [tensor for tensors in lists for tensor in tensors]
    if not tensors:
        return torch.zeros_like(noop_flag, dtype=torch.float32), None
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def scale_tensors(
    chunk_size: int, noop_flag: torch.Tensor, lists: Sequence[Tensors], scale: float
) -> None:
    """The tensors of the second list become those of the first, times `scale`."""
    sources, targets = lists
    if not sources:
        return
    if all(source is target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, scale)
    else:
        scaled = sources if scale == 1.0 else torch._foreach_mul(sources, scale)
        torch._foreach_copy_(targets, scaled)


def copy_tensors(this: Tensors, that: Tensors, overflow_buf: torch.Tensor | None = None) -> None:
    """The tensors of `that` become those of `this`, in the data types they have."""
    if overflow_buf is not None:
        overflow_buf.fill_(0)
    if this:
        torch._foreach_copy_(that, this)


def _copies_at_once(copy_main_params: Callable[[Any], None]) -> Callable[[Any], None]:
    """`_copy_main_params_to_model_params` with one copy of all parameters.

    Megatron's own remains for parameters that are quantized or that somebody else keeps.
    """

    @torch.no_grad()
    def copy_main_params_at_once(self: Any) -> None:
        ddp = self.ddp_config
        if (
            self.is_stub_optimizer
            or ddp.use_megatron_fsdp
            or ddp.fp8_param_gather
            or ddp.fp4_param_gather
            or self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        ):
            copy_main_params(self)
            return
        groups = [
            *zip(self.shard_fp32_from_float16_groups, self.model_float16_groups, strict=True),
            *zip(self.shard_fp32_groups, self.model_fp32_groups, strict=True),
        ]
        sources, targets = [], []
        for shards, model_params in groups:
            for shard, param in zip(shards, model_params, strict=True):
                place = self._get_model_param_range_map(param)["gbuf_world_in_bucket"]
                buffer, _, bucket = self.model_param_gbuf_map[param]
                flat = self.buffers[buffer].buckets[bucket].param_data.view(-1)
                sources.append(shard)
                targets.append(flat[place.start : place.end])
        copy_tensors(sources, targets)

    return copy_main_params_at_once


class LayerNormOnCpu(torch.autograd.Function):
    """LayerNorm in 16 bits with gradients that are summed in 32, as on GPUs.

    torch sums those of weight and bias in the input's type: over 5,000 positions they are 6 % off.
    Saves what torch saves for backward: the input in 16 bits and two numbers a position.
    """

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


def _layer_norm_in_32_bits(layer_norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`functional.layer_norm`, by `LayerNormOnCpu` where it is trained in 16 bits."""

    @functools.wraps(layer_norm)
    def norm(
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        in_16_bits = input.dtype in (torch.bfloat16, torch.float16) and len(normalized_shape) == 1
        if not in_16_bits or weight is None or bias is None or not torch.is_grad_enabled():
            return layer_norm(input, normalized_shape, weight, bias, eps)
        return LayerNormOnCpu.apply(input, weight, bias, eps)

    return norm


class RMSNormOnCpu(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * w (arXiv:1910.07467), in two passes over x and six back.

    torch has a kernel of it on GPUs only; its formula takes twice as many.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        product = (gradient * x).reshape(rstd.numel(), x.shape[-1])
        weight_gradient = rstd.view(1, -1).mm(product).view_as(weight)
        mean = product.mv(weight).view_as(rstd).div_(x.shape[-1])
        x_gradient = (gradient * weight).mul_(rstd).addcmul_(x, rstd.pow(3).mul_(mean), value=-1)
        return x_gradient, weight_gradient, None


def _rms_norm_in_few_passes(rms_norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`functional.rms_norm`, by `RMSNormOnCpu` where it is trained in fp32."""

    @functools.wraps(rms_norm)
    def norm(
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        eps: float | None = None,
    ) -> torch.Tensor:
        if (
            not torch.is_grad_enabled()
            or weight is None
            or eps is None
            or {input.dtype, weight.dtype} != {torch.float32}
            or len(normalized_shape) > 1
        ):
            return rms_norm(input, normalized_shape, weight, eps)
        return RMSNormOnCpu.apply(input, weight, eps)

    return norm


def swiglu(y: torch.Tensor) -> torch.Tensor:
    """silu(y_1) * y_2 of the halves of the last dimension (arXiv:2002.05202)."""
    gate, up = y.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def swiglu_back(gradient: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The gradient of `swiglu`, each half written where it belongs."""
    gate, up = y.chunk(2, dim=-1)
    back = torch.empty_like(y)
    gate_back, up_back = back.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_back)
    torch.ops.aten.silu.out(gate, out=up_back).mul_(gradient)
    return back


class RotaryOnCpu(torch.autograd.Function):
    """Rotates the halves of the last dimension against each other (arXiv:2104.09864)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(t, cos, sin, signs=(-1, 1))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        # The transposed matrix: each half's sine multiplies the other half's gradient.
        return _rotate(gradient, cos, torch.cat(sin.chunk(2, -1)[::-1], -1), (1, -1)), None, None


def _rotate(
    t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, signs: tuple[int, int]
) -> torch.Tensor:
    """`t * cos`, plus the other half of `t * sin` by each half's sign."""
    rotated = t * cos
    halves = zip(rotated.chunk(2, -1), t.chunk(2, -1)[::-1], sin.chunk(2, -1), signs, strict=True)
    for half, other, half_sin, sign in halves:
        half.addcmul_(other, half_sin, value=sign)
    return rotated


def _rotary_in_few_passes(apply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`_apply_rotary_pos_emb_bshd` by `RotaryOnCpu`, with the angles' sines computed once.

    Every layer gets the same angles, and asks twice.
    """

    @functools.wraps(apply)
    def rotary(
        t: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
        **named: Any,
    ) -> torch.Tensor:
        special = rotary_interleaved or mla_rotary_interleaved or mscale != 1.0 or named
        if special or freqs.shape[-1] != t.shape[-1]:
            return apply(t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, **named)
        angles = getattr(freqs, "cos_and_sin", None)
        if angles is None or angles[0].dtype != t.dtype:
            angles = freqs.cos().to(t.dtype), freqs.sin().to(t.dtype)
            setattr(freqs, "cos_and_sin", angles)
        return RotaryOnCpu.apply(t, *angles)

    return rotary


class ShortAttention(torch.autograd.Function):
    """softmax(QK'/sqrt(d))V (arXiv:1706.03762) that keeps its weights; rows hold a group's heads.

    (B, heads, Sq, d), (B, groups, Sk, d), (B, groups, Sk, e) -> (B, heads, Sq, e).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        is_causal: bool,
    ) -> torch.Tensor:
        groups, length = key.shape[0] * key.shape[1], key.shape[2]
        q, k, v = (t.reshape(groups, -1, t.shape[-1]) for t in (query, key, value))
        hidden = torch.zeros((), dtype=q.dtype)
        if is_causal:
            hidden = torch.full((length, length), float("-inf"), dtype=q.dtype).triu_(1)
            hidden = hidden.repeat(q.shape[1] // length, 1)
        weights = torch.baddbmm(hidden, q, k.mT, alpha=scale).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return torch.bmm(weights, v).view(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        q, k, v, weights = ctx.saved_tensors
        gradient = gradient.reshape(len(q), -1, v.shape[-1])
        of_weights = torch.bmm(gradient, v.mT)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, q.dtype).mul_(ctx.scale)
        gradients = of_scores.bmm(k), of_scores.mT.bmm(q), weights.mT.bmm(gradient)
        shaped = [t.view(shape) for t, shape in zip(gradients, ctx.shapes, strict=True)]
        return (*shaped, None, None)


def _short_attention(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`functional.scaled_dot_product_attention`, by `ShortAttention` where that trains in fp32."""

    @functools.wraps(attention)
    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **named: Any,
    ) -> torch.Tensor:
        tensors = query, key, value
        is_plain = attn_mask is None and not dropout_p and torch.is_grad_enabled()
        if (
            not is_plain
            or any(t.dtype != torch.float32 or t.dim() != 4 or not t.numel() for t in tensors)
            or max(query.shape[2], key.shape[2]) > MAX_SHORT
            or (is_causal and query.shape[2] != key.shape[2])
            or (query.shape[1] != key.shape[1] and not named.get("enable_gqa"))
        ):
            return attention(*tensors, attn_mask, dropout_p, is_causal, **named)
        scale = named.get("scale") or query.shape[3] ** -0.5
        return ShortAttention.apply(*tensors, scale, is_causal)

    return attend
