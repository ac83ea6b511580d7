"""What goes wrong when weights load, in one line.

What a run must share with the checkpoint whose training it goes on with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from examples.mimo.checkpoint.description import latest_weights

# torch's is a BaseException: a plain `except Exception` lets it pass.
CHECKPOINT_ERRORS = (CheckpointingException, CheckpointException)


def reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


OPTIMIZER_STATE = "optimizer.state."
# Only the distributed optimizer saves weights of its own in this place.
DISTRIBUTED_STATE = f"{OPTIMIZER_STATE}param."


def check_same_optimizer(folder: Path, distributed: bool) -> None:
    """ValueError when `folder` holds optimizer state of the other kind, which does not load."""
    names = FileSystemReader(latest_weights(folder)).read_metadata().state_dict_metadata
    if not any(name.startswith(OPTIMIZER_STATE) for name in names):
        return
    saved = any(name.startswith(DISTRIBUTED_STATE) for name in names)
    if saved != distributed:
        with_or_without, change = ("with", "add") if saved else ("without", "leave away")
        raise ValueError(
            f"--load {folder}: saved {with_or_without} the distributed optimizer; {change} "
            "--use-distributed-optimizer, or begin its state anew with --no-load-optim"
        )


def has_random_states(folder: Path, sizes: Mapping[str, int]) -> bool:
    """Whether `folder` holds the random states of modules on ranks of their own.

    `sizes` are their tensor-parallel sizes. Megatron checks those of the language model.
    """
    names = FileSystemReader(latest_weights(folder)).read_metadata().state_dict_metadata
    return all(f"{name}.rng_state/shard_0.0_1.{size}" in names for name, size in sizes.items())


def schedule_mismatch(error: AssertionError) -> str | None:
    """One line for Megatron's refusal of another learning-rate schedule; None for other errors."""
    words = " ".join(str(error).split())
    if not words.startswith("OptimizerParamScheduler"):
        return None
    return (
        f"the checkpoint was trained on another schedule ({words.partition(': ')[2]}); "
        "--override-opt_param-scheduler takes this run's, --use-checkpoint-opt_param-scheduler "
        "the checkpoint's"
    )
