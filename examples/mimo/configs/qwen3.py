"""Qwen3-8B with SigLIP and Whisper large-v3."""

from __future__ import annotations

from examples.mimo.configs.schema import ChatTemplate, LanguageConfig, MimoConfig, ModalityConfig
from examples.mimo.modalities.audio import WhisperConfig
from examples.mimo.modalities.base import MLPProjectorConfig
from examples.mimo.modalities.image import VitConfig


def qwen3_avlm() -> MimoConfig:
    """729 tokens an image at 384 px; 30 seconds of audio are 1,500 tokens.

    The placeholders take two entries of the embedding table that Qwen's tokenizer leaves unused.
    Only the projectors train; `--freeze images.encoder audios.encoder` trains the language model
    too.

    torchrun --nproc-per-node 8 examples/mimo/train.py --model-provider qwen3_avlm --bf16
    --tensor-model-parallel-size 4 --pretrained-checkpoint START
    """
    return MimoConfig(
        name="qwen3_avlm",
        frozen=("images.encoder", "audios.encoder", "language"),
        language=LanguageConfig(
            num_layers=36,
            hidden_size=4096,
            ffn_hidden_size=12288,
            num_attention_heads=32,
            num_query_groups=8,
            head_dim=128,
            vocab_size=151936,
            seq_length=8192,
            rotary_base=1_000_000,
            norm_epsilon=1e-6,
            qk_norm=True,
        ),
        modalities={
            "images": ModalityConfig(
                singular="image",
                placeholder="<image>",
                token_id=151_700,
                encoder=VitConfig(
                    family="siglip",
                    image_size=384,
                    patch_size=14,
                    num_layers=27,
                    hidden_size=1152,
                    num_attention_heads=16,
                    ffn_hidden_size=4304,
                    fit="stretch",
                ),
                projector=MLPProjectorConfig(ffn_hidden_size=4096),
            ),
            "audios": ModalityConfig(
                singular="audio",
                placeholder="<audio>",
                token_id=151_701,
                encoder=WhisperConfig(
                    num_mel_bins=128,
                    hop_samples=160,
                    window_seconds=30.0,
                    num_layers=32,
                    hidden_size=1280,
                    num_attention_heads=20,
                    ffn_hidden_size=5120,
                ),
                projector=MLPProjectorConfig(ffn_hidden_size=4096),
            ),
        },
        chat=ChatTemplate(
            system_turn="<|im_start|>system\n{}<|im_end|>\n",
            human="<|im_start|>user\n{}<|im_end|>\n",
            # As Qwen's own template with enable_thinking=False.
            start="<|im_start|>assistant\n<think>\n\n</think>\n\n",
            past_start="<|im_start|>assistant\n",
            between="\n",
        ),
        prompt="Describe what you see and hear.",
        add_bos=False,
    )
