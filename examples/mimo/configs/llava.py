"""LLaVA-1.5-7B, the same with Whisper's ears, and for videos.

About one billion parameters: large enough to load a GPU, small enough to train on one.
"""

from __future__ import annotations

import dataclasses

from examples.mimo.configs.schema import (
    ChatTemplate,
    LanguageConfig,
    MimoConfig,
    ModalityConfig,
    ProjectorConfig,
)
from examples.mimo.modalities.audio import WhisperConfig
from examples.mimo.modalities.image import VitConfig
from examples.mimo.modalities.video import VideoConfig


def llava_vlm() -> MimoConfig:
    """Vicuna-7B and CLIP ViT-L/14 at 336 px: the sizes of LLaVA-1.5 (arXiv:2310.03744).

    Picture features leave the last but one CLIP layer without the class token, 576 tokens a
    picture. `convert.py from-hf --model-provider llava_vlm --llava DIR --save START` brings its
    weights in; as it stands the projector trains.

    Million parameters: images.encoder 290.9, images.projector 21.0, language 6738.9.
    Before activations a rank of TP 4 in bf16 holds 3.36 GiB.

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
                    width=1024,
                    num_heads=16,
                    ffn_hidden_size=4096,
                    feature_layer=-2,
                ),
                projector=ProjectorConfig(ffn_hidden_size=4096),
            )
        },
        chat=ChatTemplate(
            system="A chat between a curious human and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the human's questions. ",
            human="USER: {} ASSISTANT:",
            answer=" {}",
        ),
        prompt="Describe what you see and hear.",
    )


def video_llava_vlm() -> MimoConfig:
    """`llava_vlm` for videos: a frame a second, at most 8, 144 tokens a frame.

    Squares of four patches make a token, as LLaVA-NeXT-Video halves the sides of its feature map
    by pooling. The projector trains.

    Million parameters: videos.encoder 290.9, videos.projector 33.6, language 6738.9.
    Before activations a rank of TP 4 in bf16 holds 3.42 GiB.

    torchrun --nproc-per-node 8 examples/mimo/train.py --model-provider video_llava_vlm --bf16
    --tensor-model-parallel-size 4 --dataset-provider energon --data-path SHARDS
    """
    base = llava_vlm()
    images = base.modalities["images"]
    eye = {f.name: getattr(images.encoder, f.name) for f in dataclasses.fields(VitConfig)}
    videos = dataclasses.replace(
        images,
        singular="video",
        placeholder="<video>",
        encoder=VideoConfig(**{**eye, "patches_per_token": 4}, frames_per_second=1.0, max_frames=8),
    )
    return dataclasses.replace(
        base,
        name="video_llava_vlm",
        modalities={"videos": videos},
        frozen=("videos.encoder", "language"),
        prompt="Describe what happens.",
    )


def llava_avlm() -> MimoConfig:
    """`llava_vlm` with Whisper base: 30 seconds of sound are 1,500 tokens.

    Both projectors train.

    Million parameters: images.encoder 290.9, images.projector 21.0, audios.encoder 19.8,
    audios.projector 18.9, language 6738.9.
    Before activations a rank of TP 4 in bf16 holds 3.45 GiB.

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
            width=512,
            num_heads=8,
            ffn_hidden_size=2048,
        ),
        projector=ProjectorConfig(ffn_hidden_size=4096),
    )
    return dataclasses.replace(
        base,
        name="llava_avlm",
        modalities={**base.modalities, "audios": audios},
        frozen=("images.encoder", "audios.encoder", "language"),
    )


def llava_avlm_tuned() -> MimoConfig:
    """`llava_avlm` as it trains in the second stage: the language model too, the towers not.

    Million parameters: images.encoder 290.9, images.projector 21.0, audios.encoder 19.8,
    audios.projector 18.9, language 6738.9.
    Before activations a rank of TP 4 in bf16 holds 28.56 GiB.

    torchrun --nproc-per-node 8 examples/mimo/train.py --model-provider llava_avlm_tuned --bf16
    --tensor-model-parallel-size 4 --use-distributed-optimizer --pretrained-checkpoint STAGE_1
    """
    return dataclasses.replace(
        llava_avlm(), name="llava_avlm_tuned", frozen=("images.encoder", "audios.encoder")
    )


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
