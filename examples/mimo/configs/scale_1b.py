"""About one billion parameters: large enough to load a GPU, small enough to train on one."""

from __future__ import annotations

import dataclasses

from examples.mimo.configs.llava import llava_avlm
from examples.mimo.configs.schema import LanguageConfig, MimoConfig


def scale_1b_avlm() -> MimoConfig:
    """`llava_avlm`'s encoders before a language model of width 2048 with 16 layers.

    Everything trains.

    Million parameters: images.encoder 290.9, images.projector 12.6, audios.encoder 19.8,
    audios.projector 10.5, language 852.8.
    Before activations a rank of TP 2 in bf16 holds 9.97 GiB.

    torchrun --nproc-per-node 2 examples/mimo/train.py --model-provider scale_1b_avlm --bf16
    --tensor-model-parallel-size 2
    """
    return dataclasses.replace(
        llava_avlm(),
        name="scale_1b_avlm",
        frozen=(),
        language=LanguageConfig(
            num_layers=16,
            hidden_size=2048,
            ffn_hidden_size=5632,
            num_attention_heads=32,
            num_query_groups=8,
            vocab_size=32064,
            seq_length=4096,
        ),
    )
