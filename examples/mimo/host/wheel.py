"""What `pretrain()` lacks when Megatron comes from its wheel, on GPUs as on CPUs."""

from __future__ import annotations

import importlib.util

from examples.mimo.host.stand_in import StandIn


def stand_ins() -> list[StandIn]:
    """Skip the build of an extension that is built already."""
    import megatron.core.datasets.utils as dataset_utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return []
    reason = "initialize.py _compile_dependencies: runs make, and the wheel has no Makefile"
    return [StandIn(dataset_utils, "compile_helpers", lambda: None, reason)]
