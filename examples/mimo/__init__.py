"""A language model that sees, hears and speaks, from Megatron-Core's parallel blocks.

The example is these files, in reading order:

    configs/schema.py         what a model is: language model, and a dict of modalities
    configs/tiny_avlm.py      the demo's model
    modalities/base.py        base classes of encoder, projector and codec configs
    modalities/image.py       images: preprocessing and ViT
    modalities/audio.py       audio: log-mel features and Whisper's encoder
    model/layers.py           layer specs, core attention, the transformer that encoders share
    model/mimo.py             the model on one pipeline stage
    data/conversation.py      conversation -> token ids, labels, loss mask, encoder inputs
    data/batch.py             samples from files, collation and broadcast
    training/pretrain.py      model and data providers, forward step, loss
    train.py                  the command that trains
    avlm_inference.py         the command that answers

Around it:

    cli/          flags, checks of them, what a run prints and writes
    parallel/     context parallelism, encoder replicas, non-colocated encoders
    planner/      dry run: FLOPs, memory, pipeline timeline, balanced stages
    checkpoint/   the model's description beside its weights; strict loading
    hf/           Hugging Face weights in and out
    shards/       WebDataset shards with megatron-energon: write, read, show
    generation/   engine, sampling, prefix cache; the Python interface `Mimo`
    serving/      HTTP server with OpenAI's chat completions
    compat/       everything that is replaced in torch and Megatron, in one table
    evaluate.py  convert.py  prepare_data.py  serve.py

`from examples.mimo import Mimo` is the Python interface. Importing it replaces nothing; on a
machine without CUDA `Mimo.load` replaces what Megatron needs of torch.cuda, for the whole process
(`Tensor.cuda`, streams, random state ...); `python -m examples.mimo.compat` lists it all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.mimo.generation.api import Mimo
    from examples.mimo.generation.sampling import Options, Sampling

__all__ = ["Mimo", "Options", "Sampling"]

# Imported when first used: they load torch, which a `--help` does not need.
_MODULES = {"Mimo": "api", "Options": "sampling", "Sampling": "sampling"}


def __getattr__(name: str) -> object:
    """Import a public name from its module when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.generation.{_MODULES[name]}"), name)
