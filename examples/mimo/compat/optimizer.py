"""The optimizer's arithmetic where neither Apex nor Transformer Engine is installed.

Megatron then takes torch's AdamW, whose distributed checkpoints do not load, and loops over the
parameters for the gradient's norm, its scaling and the copies between main and model parameters: a
kernel or three for each, and for the norm a wait for each. Here they are torch's fused and foreach
kernels, which take all parameters at once, and the host waits for nothing but the norm itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as base_optimizer
from megatron.training.utils import common_utils

from examples.mimo.compat import Replacement

Tensors = list[torch.Tensor]


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
