"""What `pretrain()` lacks when Megatron comes from its wheel, on GPUs as on CPUs."""

from __future__ import annotations

from collections.abc import Callable

from examples.mimo.host.stand_in import StandIn


def stand_ins() -> list[StandIn]:
    """Skip the build of an extension that is built already; an Adam whose state reloads."""
    import megatron.core.datasets.utils as dataset_utils
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    found = [
        StandIn(
            dataset_utils,
            "compile_helpers",
            _compile_unless_built(dataset_utils.compile_helpers),
            "initialize.py _compile_dependencies: runs make, and the wheel has no Makefile",
        )
    ]
    if optimizer.USING_PYTORCH_OPTIMIZER:
        from examples.mimo.host.adam import GroupStepAdam

        reason = "distrib_optimizer.py load_state_dict: torch's AdamW keeps a step per tensor"
        found += [
            StandIn(optimizer, "Adam", GroupStepAdam, reason),
            StandIn(optimizer, "USING_PYTORCH_OPTIMIZER", False, reason),
            StandIn(distrib_optimizer, "HAVE_APEX_OR_TE", True, reason),
            StandIn(distrib_optimizer, "USING_APEX_OPTIMIZER", True, reason),
        ]
    return found


def _compile_unless_built(compile_helpers: Callable[[], None]) -> Callable[[], None]:
    def compile_unless_built() -> None:
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError:
            compile_helpers()

    return compile_unless_built
