"""What goes wrong when weights load, in one line."""

from __future__ import annotations

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

# torch's is a BaseException: a plain `except Exception` lets it pass.
CHECKPOINT_ERRORS = (CheckpointingException, CheckpointException)


def reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
