"""From prompts with pictures and recordings to answers, at the terminal and in Python.

`Answerer.open(folder)` loads a checkpoint, `read` checks a `Request`, `answer` takes any number of
them and gives as many `Answer`s; `stream` gives one in pieces.
"""

from examples.mimo import compat
from examples.mimo.cli import command

# Megatron looks for CUDA when it is imported.
command.prepare_environment()
compat.install()

from examples.mimo.generation.api import Answerer, Request  # noqa: E402
from examples.mimo.generation.sampling import Sampling  # noqa: E402
from examples.mimo.generation.scheduler import Answer, Options  # noqa: E402

__all__ = ["Answer", "Answerer", "Options", "Request", "Sampling"]
