"""`python -m tests.helpers.with_engine SCRIPT FLAGS`: a command beside Transformer Engine.

It is a stand-in (engine/), which computes on CPUs. The real one, and so the package, wants a GPU.
"""

from __future__ import annotations

import runpy
import sys

from examples.mimo import compat
from examples.mimo.cli import command
from tests.helpers.commands import ROOT


def install() -> None:
    """From here on this process has Transformer Engine; call it before Megatron is imported."""
    sys.path.insert(0, str(ROOT / "tests/helpers/engine"))
    command.prepare_environment()
    compat.install()
    from examples.mimo.model import layers

    assert layers.HAVE_TE
    layers.has_transformer_engine = lambda: True


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
