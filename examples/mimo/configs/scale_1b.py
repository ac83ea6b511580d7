"""About one billion parameters: large enough to load a GPU, small enough to train on one."""

from __future__ import annotations

import dataclasses

from examples.mimo.configs.llava import llava_avlm
from examples.mimo.configs.schema import LanguageConfig, MimoConfig


def scale_1b_avlm() -> MimoConfig:
    """`llava_avlm`'s encoders before a language model of width 2048 with 16 layers."""
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
