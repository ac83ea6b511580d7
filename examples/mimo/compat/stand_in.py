"""One replaced attribute and the reason for it."""

from __future__ import annotations

from typing import Any, NamedTuple


class StandIn(NamedTuple):
    """`owner.attribute` becomes `replacement`, because the Megatron code in `needed_by` uses it."""

    owner: Any
    attribute: str
    replacement: Any
    needed_by: str

    @property
    def name(self) -> str:
        """Where the attribute lives, as one would type it."""
        owner = getattr(self.owner, "__qualname__", None) or self.owner.__name__
        return f"{owner}.{self.attribute}"
