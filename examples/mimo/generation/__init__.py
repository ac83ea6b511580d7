"""Answers about media, from a checkpoint: in Python, at the terminal, and for the server.

    from examples.mimo.generation import Mimo
    model = Mimo.load("demo/checkpoint")
    print(model.generate("Which digit is this?", images=["digit.png"], temperature=0.7))

Importing this package imports no Megatron and changes nothing in the process; `Mimo.load` says what
it replaces.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.mimo.generation.api import Mimo
    from examples.mimo.generation.sampling import Options, Sampling

__all__ = ["Mimo", "Options", "Sampling"]

# Imported when first used, so that a module of this package can be imported without torch.
_MODULES = {"Mimo": "api", "Options": "sampling", "Sampling": "sampling"}


def __getattr__(name: str) -> object:
    """Import a public name from its module when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
