"""Whisper's encoder, tiny to large-v3."""

from __future__ import annotations

from typing import Any

from examples.mimo.hf.weights import Family, Qkv, QkvWithoutKeyBias, Row, rows
from examples.mimo.modalities.audio import WhisperConfig, sinusoids

LAYER = "decoder.layers."
ATTENTION = f"{LAYER}self_attention."
THEIRS = "layers.{i}."


def table(whisper: WhisperConfig, config: Any) -> list[Row]:
    """Its fixed sinusoids are computed, not loaded."""
    inputs = [f"{THEIRS}self_attn.{name}_proj." for name in "qkv"]
    return [
        *rows("conv1.", "conv1.", "weight", "bias"),
        *rows("conv2.", "conv2.", "weight", "bias"),
        *rows(
            f"{ATTENTION}linear_qkv.layer_norm_",
            f"{THEIRS}self_attn_layer_norm.",
            *("weight", "bias"),
        ),
        Row(
            f"{ATTENTION}linear_qkv.weight",
            tuple(f"{name}weight" for name in inputs),
            Qkv(whisper.num_heads, whisper.num_heads),
        ),
        Row(
            f"{ATTENTION}linear_qkv.bias",
            (f"{inputs[0]}bias", f"{inputs[2]}bias"),
            QkvWithoutKeyBias(whisper.num_heads),
        ),
        *rows(f"{ATTENTION}linear_proj.", f"{THEIRS}self_attn.out_proj.", "weight", "bias"),
        *rows(
            f"{LAYER}mlp.linear_fc1.layer_norm_",
            f"{THEIRS}final_layer_norm.",
            *("weight", "bias"),
        ),
        *rows(f"{LAYER}mlp.linear_fc1.", f"{THEIRS}fc1.", "weight", "bias"),
        *rows(f"{LAYER}mlp.linear_fc2.", f"{THEIRS}fc2.", "weight", "bias"),
        *rows("decoder.final_layernorm.", "layer_norm.", "weight", "bias"),
    ]


def fields(config: Any) -> dict[str, Any]:
    """WhisperConfig's fields from a transformers config."""
    return {
        "num_mel_bins": config.num_mel_bins,
        "num_layers": config.encoder_layers,
        "width": config.d_model,
        "num_heads": config.encoder_attention_heads,
        "ffn_hidden_size": config.encoder_ffn_dim,
        "window_frames": config.max_source_positions,
    }


def write_config(whisper: WhisperConfig) -> Any:
    """A transformers config; the decoder it also describes has no layers."""
    from transformers import WhisperConfig as TheirConfig

    return TheirConfig(
        num_mel_bins=whisper.num_mel_bins,
        encoder_layers=whisper.num_layers,
        d_model=whisper.width,
        encoder_attention_heads=whisper.num_heads,
        encoder_ffn_dim=whisper.ffn_hidden_size,
        max_source_positions=whisper.window_frames,
        decoder_layers=0,
        architectures=["WhisperEncoder"],
    )


FAMILIES = (
    Family(
        name="whisper",
        sections={"whisper": ""},
        roots=("", "encoder.", "model.encoder."),
        anchor="conv1.weight",
        required={"activation_function": "gelu", "scale_embedding": False},
        fields=fields,
        num_layers=lambda whisper: whisper.num_layers,
        table=table,
        unused=(),
        config=write_config,
        fixed=lambda whisper: {
            "embed_positions.weight": sinusoids(whisper.window_frames, whisper.width)
        },
    ),
)
