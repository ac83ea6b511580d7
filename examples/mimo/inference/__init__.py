"""From prompts with pictures and recordings to answers, at the terminal and in Python.

`Answerer.open(folder)` loads a checkpoint, `read` checks a `Request`, `answer` takes any number of
them and gives as many `Answer`s; `stream` gives one in pieces.
"""

from examples.mimo import command, host

# Megatron looks for CUDA when it is imported.
command.prepare_environment()
host.install()

from examples.mimo.inference.answerer import Answerer, Request  # noqa: E402
from examples.mimo.inference.running import Answer, Options  # noqa: E402
from examples.mimo.inference.sampling import Sampling  # noqa: E402

__all__ = ["Answer", "Answerer", "Options", "Request", "Sampling"]
