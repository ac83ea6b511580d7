"""Adam with one step count per parameter group, as Apex and Transformer Engine keep it.

Megatron's distributed optimizer saves and reloads that form in every layout; with torch's own
AdamW, whose step is a tensor per parameter, its checkpoints do not reload
(distrib_optimizer.py, `load_state_dict`). Where Apex or Transformer Engine is installed theirs
is used and `install()` does nothing.

The queue through which the writers of a checkpoint report, served by a helper process.

What `pretrain()` lacks when Megatron comes from its wheel, on GPUs as on CPUs.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import distrib_optimizer

from examples.mimo.compat.stand_in import StandIn


def install_adam() -> None:
    """Give Megatron this Adam where it would fall back to torch's."""
    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = GroupStepAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_APEX_OPTIMIZER = True


class GroupStepAdam(torch.optim.Optimizer):
    """Adam (arXiv:1412.6980), or AdamW (arXiv:1711.05101) when `adam_w_mode`."""

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
            if params:
                group["step"] = int(group.get("step", 0)) + 1
                self._update(params, group)

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
        grads = [p.grad.to(p.dtype) for p in params if p.grad is not None]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        beta1, beta2 = group["betas"]
        decay, lr, step = group["weight_decay"], group["lr"], group["step"]
        if decay and self.adam_w_mode:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            grads = list(torch._foreach_add(grads, params, alpha=decay))
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, -lr / (1 - beta1**step))


def install_results_queue() -> None:
    """Fork the helper, while there are no threads; it ends when this process does, however that is.

    Megatron's own starts an interpreter on each rank at the first save, and outlives a rank that
    is killed or fails.
    """
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_end_with_parent)
    filesystem_async._results_queue = manager.Queue()


def _end_with_parent() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def stand_ins() -> list[StandIn]:
    """Skip the build of an extension that is built already."""
    import megatron.core.datasets.utils as dataset_utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return []
    reason = "initialize.py _compile_dependencies: runs make, and the wheel has no Makefile"
    return [StandIn(dataset_utils, "compile_helpers", lambda: None, reason)]
