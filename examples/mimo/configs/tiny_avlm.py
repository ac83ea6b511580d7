"""A model small enough to train in minutes on two CPU cores, with every part of a large one."""

from __future__ import annotations

import dataclasses

from examples.mimo.configs.schema import ChatTemplate, LanguageConfig, MimoConfig, ModalityConfig
from examples.mimo.modalities.audio import WhisperConfig
from examples.mimo.modalities.base import MLPProjectorConfig
from examples.mimo.modalities.image import VitConfig
from examples.mimo.modalities.speech import VectorQuantisedMel


def tiny_avlm() -> MimoConfig:
    """A ViT, a Whisper-shaped encoder and a Llama-shaped GPT, all of width 128.

    A 32 x 32 image is 16 tokens, and up to 2.4 seconds of audio are at most 20.
    Everything trains.

    torchrun --nproc-per-node 2 examples/mimo/train.py --model-provider tiny_avlm
    --tensor-model-parallel-size 2
    """
    return MimoConfig(
        name="tiny_avlm",
        language=LanguageConfig(
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=352,  # SwiGLU has a third matrix, so 8/3 of the width instead of 4
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=512,  # room for the tokenizer that the demo trains
            seq_length=128,
        ),
        modalities={
            "images": ModalityConfig(
                singular="image",
                placeholder="<image>",
                token_id=4,  # 0 to 3 are padding, unknown, begin and end of text
                encoder=VitConfig(
                    image_size=32,
                    patch_size=8,  # 4 x 4 patches, a token each
                    num_layers=2,
                    hidden_size=128,
                    num_attention_heads=4,
                    ffn_hidden_size=512,
                    augment_shift=0.08,
                    augment_degrees=10.0,
                    augment_scale=0.1,
                ),
                projector=MLPProjectorConfig(ffn_hidden_size=256),
            ),
            "audios": ModalityConfig(
                singular="audio",
                placeholder="<audio>",
                token_id=5,
                encoder=WhisperConfig(
                    num_mel_bins=40,
                    hop_samples=320,
                    window_seconds=2.4,  # 60 encoder frames
                    num_layers=2,
                    hidden_size=128,
                    num_attention_heads=4,
                    ffn_hidden_size=512,
                    frames_per_token=3,  # so 20 tokens a window
                    augment_noise=0.01,
                    augment_shift_seconds=0.2,
                ),
                projector=MLPProjectorConfig(ffn_hidden_size=256),
            ),
        },
        chat=ChatTemplate(human="{}\n", answer="{}"),
        prompt="Answer the question.",
    )


def tiny_avlm_speech() -> MimoConfig:
    """`tiny_avlm` that answers aloud too; `make demo` trains it.

    A code is 96 ms of speech, so a word is five or six. With them the vocabulary has 768 tokens.
    """
    base = tiny_avlm()
    speech = ModalityConfig(
        singular="speech",
        placeholder="<speech>",
        codec=VectorQuantisedMel(num_codes=254, frames_per_patch=6, max_seconds=4.0),
    )
    modalities = {**base.modalities, "speech": speech}
    return dataclasses.replace(base, name="tiny_avlm_speech", modalities=modalities)
