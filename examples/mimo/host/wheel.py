"""What `pretrain()` lacks when Megatron comes from its wheel, on GPUs as on CPUs."""

from __future__ import annotations

from collections.abc import Callable

from examples.mimo.host.stand_in import StandIn


def stand_ins() -> list[StandIn]:
    """Skip the build of an extension that is built already."""
    import megatron.core.datasets.utils as dataset_utils

    build = _unless_built(dataset_utils.compile_helpers)
    reason = "initialize.py _compile_dependencies: runs make, and the wheel has no Makefile"
    return [StandIn(dataset_utils, "compile_helpers", build, reason)]


def _unless_built(compile_helpers: Callable[[], None]) -> Callable[[], None]:
    def compile_unless_built() -> None:
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError:
            compile_helpers()

    return compile_unless_built
