"""From prompts with pictures and recordings to answers, at the terminal and in Python:

    from examples.mimo.inference import Answerer, Request

    answerer = Answerer.open("checkpoint")
    asked = answerer.read(Request("What is it?", {"images": [Path("cat.jpg")]}))
    print(answerer.answer([asked])[0].text)
"""

from examples.mimo import command, host

# Megatron looks for CUDA when it is imported.
command.prepare_environment()
host.install()

from examples.mimo.inference.answerer import Answerer, Request  # noqa: E402
from examples.mimo.inference.running import Answer, Options  # noqa: E402
from examples.mimo.inference.sampling import Sampling  # noqa: E402

__all__ = ["Answer", "Answerer", "Options", "Request", "Sampling"]
