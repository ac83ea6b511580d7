"""The CPU host layer: lets unchanged Megatron-Core run on gloo where CUDA is absent.

A command calls `install()` first. Where CUDA is available the only thing it changes is what
`pretrain()` needs to start from a plain wheel; `python -m examples.mimo.compat` prints the table
of stand-ins with the Megatron call that needs each.
"""

from __future__ import annotations

import functools
import os

from examples.mimo.compat.stand_in import StandIn


@functools.cache
def install() -> list[StandIn]:
    """Put the stand-ins this machine needs in place, once; returns them."""
    import torch

    from examples.mimo.compat import cpu, megatron

    stand_ins = []
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        cpu.compute_in_this_thread_only()
        os.register_at_fork(after_in_child=cpu.compute_in_this_thread_only)
        stand_ins += _place(cpu.torch_stand_ins())
        stand_ins += _place(cpu.megatron_stand_ins())
    return stand_ins + _place(megatron.stand_ins())


def _place(stand_ins: list[StandIn]) -> list[StandIn]:
    for stand_in in stand_ins:
        setattr(stand_in.owner, stand_in.attribute, stand_in.replacement)
    return stand_ins
