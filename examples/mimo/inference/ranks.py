"""One rank reads what is asked; the others follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def share[T](make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, or its ValueError, on every rank."""
    if dist.get_world_size() == 1:
        return make()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = make()
        except ValueError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    value, message = found
    if message is not None:
        raise ValueError(message)
    return value
