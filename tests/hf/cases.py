"""Tiny random Hugging Face models of every family, and the configs that take their weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

from examples.mimo.configs import get_model_config
from examples.mimo.configs.schema import LanguageConfig, MimoConfig
from examples.mimo.modalities.audio import WhisperConfig
from examples.mimo.modalities.image import VitConfig

WIDTH, HEADS, INNER, LAYERS = 64, 4, 128, 4
VOCABULARY, OUR_VOCABULARY = 120, 128
SIDE, PATCH = 30, 8


@dataclass(frozen=True)
class Case:
    """A Hugging Face model, its inputs and its output; `part` is where its weights go."""

    part: str
    config: MimoConfig
    build: Any
    inputs: Any
    output: Any


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, biases, norms and scales included."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * 0.08 + (1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def _with(part: str, config: Any) -> MimoConfig:
    base = get_model_config("tiny_avlm")
    if part == "language":
        return dataclasses.replace(base, language=config)
    name = part.split(".")[0]
    modality = dataclasses.replace(base.modalities[name], encoder=config)
    return dataclasses.replace(base, modalities={**base.modalities, name: modality})


def _language(theirs: Any, model: Any, **ours: Any) -> Case:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "pad_token_id": None,
    }
    # `head_dim` has the same name on both sides.
    theirs_too = {k: v for k, v in ours.items() if k not in OUR_FIELDS or k == "head_dim"}
    ours = {k: v for k, v in ours.items() if k in OUR_FIELDS}
    language = LanguageConfig(
        **{
            "num_layers": LAYERS,
            "hidden_size": WIDTH,
            "ffn_hidden_size": INNER,
            "num_attention_heads": HEADS,
            "num_query_groups": 2,
            "vocab_size": OUR_VOCABULARY,
            "seq_length": 128,
            "norm_epsilon": 1e-6,
            **ours,
        }
    )
    ids = torch.randint(6, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    return Case(
        "language",
        _with("language", language),
        lambda: randomise(model(theirs(**{**sizes, **theirs_too}))),
        {"input_ids": ids},
        lambda built, inputs: built(**inputs).logits,
    )


OUR_FIELDS = {field.name for field in dataclasses.fields(LanguageConfig)}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _vision(theirs: Any, model: Any, family: str, output: Any, layer: int = -1) -> Case:
    sizes = {"image_size": SIDE, "patch_size": PATCH, "hidden_size": WIDTH}
    sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    inner = {"mlp_ratio": INNER // WIDTH} if family == "dinov2" else {"intermediate_size": INNER}
    vit = VitConfig(LAYERS, WIDTH, HEADS, INNER, SIDE, PATCH, family=family, feature_layer=layer)
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    return Case(
        "images.encoder",
        _with("images.encoder", vit),
        lambda: randomise(model(theirs(**sizes, **inner))),
        {"pixel_values": pixels},
        output,
    )


def _whisper(mels: int) -> Case:
    whisper = WhisperConfig(LAYERS, WIDTH, HEADS, INNER, mels, 160, 0.64)
    config = hf.WhisperConfig(
        num_mel_bins=mels,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        decoder_layers=1,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=INNER,
        vocab_size=40,
        max_source_positions=whisper.window_frames,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    frames = 2 * whisper.window_frames
    features = torch.randn(2, mels, frames, generator=torch.Generator().manual_seed(3))
    return Case(
        "audios.encoder",
        _with("audios.encoder", whisper),
        lambda: randomise(hf.WhisperForConditionalGeneration(config)),
        {"input_features": features},
        lambda built, inputs: built.model.encoder(**inputs).last_hidden_state,
    )


def _clip_features(built: Any, inputs: Any) -> torch.Tensor:
    return built(**inputs, output_hidden_states=True).hidden_states[-2][:, 1:]


CASES = {
    "llama": _language(hf.LlamaConfig, hf.LlamaForCausalLM),
    "llama_tied": _language(
        hf.LlamaConfig, hf.LlamaForCausalLM, tie_embeddings=True, tie_word_embeddings=True
    ),
    "llama3": _language(
        hf.LlamaConfig,
        hf.LlamaForCausalLM,
        rotary_base=500000,
        rope_scaling_factor=8.0,
        rope_parameters=LLAMA3_ROPE,
    ),
    "mistral": _language(hf.MistralConfig, hf.MistralForCausalLM, head_dim=32, sliding_window=None),
    "qwen2": _language(hf.Qwen2Config, hf.Qwen2ForCausalLM, qkv_bias=True),
    "qwen3": _language(hf.Qwen3Config, hf.Qwen3ForCausalLM, qk_norm=True, head_dim=32),
    "clip": _vision(hf.CLIPVisionConfig, hf.CLIPVisionModel, "clip", _clip_features, layer=-2),
    "siglip": _vision(
        hf.SiglipVisionConfig,
        hf.SiglipVisionModel,
        "siglip",
        lambda built, inputs: built(**inputs).last_hidden_state,
    ),
    "dinov2": _vision(
        hf.Dinov2Config,
        hf.Dinov2Model,
        "dinov2",
        lambda built, inputs: built(**inputs).last_hidden_state[:, 1:],
    ),
    "whisper_80": _whisper(80),
    "whisper_128": _whisper(128),
}
