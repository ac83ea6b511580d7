"""A language model that sees pictures and hears sound, from Megatron-Core's parallel blocks.

The example is these files. Read them in this order; everything else can wait:

    configs/schema.py         what a model is: sizes, modalities, special tokens
    configs/tiny_avlm.py      one model: images, audios and a language model
    modalities/base.py        what an encoder and a projector have to say, and their defaults
    modalities/image.py       pictures: reading, patches, the vision encoder
    modalities/audio.py       recordings: reading, mel features, the audio encoder
    model/layers.py           layer specs, core attention, norms
    model/encoder.py          the transformer that encoders share
    model/mimo.py             the model on its pipeline stages; media among the text
    data/conversation.py      a conversation becomes tokens and a loss mask
    data/datasets.py          samples from files, and mock ones
    data/batch.py             samples become a batch, which is broadcast
    training/pretrain.py      what Megatron's `pretrain` is given: model, data, forward step, loss
    train.py                  the command that trains
    avlm_inference.py         the command that answers

Around it, each room by itself:

    cli/          flags, refusals in one line, header, progress
    parallel/     non-colocated encoders, context parallelism, encoders with a TP size of their own
    planner/      what a layout costs, before it runs: FLOPs, memory, the pipeline's timeline
    checkpoint/   the model's description beside its weights; strict loading
    hf/           Hugging Face weights in and out
    shards/       megatron-energon: write, read, show
    generation/   engine, sampling, prefix cache, conversations, the class `Mimo`
    serving/      an OpenAI-compatible server and its page
    compat/       the one table of what is replaced in torch and Megatron, with the reasons
    evaluate.py, convert.py, prepare_data.py, serve.py    the other commands

`from examples.mimo import Mimo` is the Python interface. Importing it replaces nothing; on a
machine without CUDA `Mimo.load` replaces what Megatron needs of torch.cuda, for the whole process
(`Tensor.cuda`, streams, random state ...); `python -m examples.mimo.compat` lists it all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.mimo.generation.api import Mimo

__all__ = ["Mimo"]


def __getattr__(name: str) -> object:
    """Import `Mimo` when it is first used: it loads torch, which a `--help` does not need."""
    if name != "Mimo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from examples.mimo.generation import Mimo

    return Mimo
