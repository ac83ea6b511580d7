"""One replaced attribute and the reason for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StandIn:
    """`owner.attribute` becomes `replacement`, because `needed_by` calls it."""

    owner: Any
    attribute: str
    replacement: Any
    needed_by: str

    @property
    def name(self) -> str:
        """Where the attribute lives, as one would type it."""
        owner = getattr(self.owner, "__qualname__", None) or self.owner.__name__
        return f"{owner}.{self.attribute}"
