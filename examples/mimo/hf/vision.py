"""CLIP, SigLIP and DINOv2."""

from __future__ import annotations

from typing import Any

from examples.mimo.hf.weights import Family, Qkv, Row, View, rows
from examples.mimo.modalities.image import VitConfig

LAYER = "decoder.layers."
ATTENTION = f"{LAYER}self_attention."
MLP = f"{LAYER}mlp."


def clip_table(vit: VitConfig, config: Any) -> list[Row]:
    """CLIP: a class token and a norm before the layers."""
    return [
        Row("class_token", ("embeddings.class_embedding",), _class_token(vit, (vit.width,))),
        *rows("conv1.", "embeddings.patch_embedding.", "weight"),
        *rows("position_embeddings.", "embeddings.position_embedding.", "weight"),
        *rows("ln_pre.", "pre_layrnorm.", "weight", "bias"),
        *_layers(vit, "encoder.layers.{i}."),
    ]


def siglip_table(vit: VitConfig, config: Any) -> list[Row]:
    """SigLIP: patches alone, a norm behind the layers."""
    return [
        *rows("conv1.", "embeddings.patch_embedding.", "weight", "bias"),
        *rows("position_embeddings.", "embeddings.position_embedding.", "weight"),
        *_layers(vit, "encoder.layers.{i}."),
        *_final_norm(vit, "post_layernorm."),
    ]


def dinov2_table(vit: VitConfig, config: Any) -> list[Row]:
    """DINOv2: a class token, and a learned scale on what each layer adds."""
    positions = (vit.num_patches + 1, vit.width)
    layer = "encoder.layer.{i}."
    attention = f"{layer}attention."
    return [
        Row("class_token", ("embeddings.cls_token",)),
        *rows("conv1.", "embeddings.patch_embeddings.projection.", "weight", "bias"),
        Row(
            "position_embeddings.weight",
            ("embeddings.position_embeddings",),
            View((1, *positions), positions),
        ),
        *_norms(f"{layer}norm1.", f"{layer}norm2."),
        *_attention(
            vit,
            [f"{attention}attention.{name}." for name in ("query", "key", "value")],
            f"{attention}output.dense.",
        ),
        *_mlp(f"{layer}mlp."),
        Row(f"{ATTENTION}linear_proj.layer_scale", (f"{layer}layer_scale1.lambda1",)),
        Row(f"{MLP}linear_fc2.layer_scale", (f"{layer}layer_scale2.lambda1",)),
        *_final_norm(vit, "layernorm."),
    ]


def _class_token(vit: VitConfig, theirs: tuple[int, ...]) -> View:
    return View(theirs, (1, 1, vit.width))


def _layers(vit: VitConfig, layer: str) -> list[Row]:
    attention = f"{layer}self_attn."
    return [
        *_norms(f"{layer}layer_norm1.", f"{layer}layer_norm2."),
        *_attention(vit, [f"{attention}{n}_proj." for n in "qkv"], f"{attention}out_proj."),
        *_mlp(f"{layer}mlp."),
    ]


def _norms(before_attention: str, before_mlp: str) -> list[Row]:
    return [
        *rows(f"{ATTENTION}linear_qkv.layer_norm_", before_attention, "weight", "bias"),
        *rows(f"{MLP}linear_fc1.layer_norm_", before_mlp, "weight", "bias"),
    ]


def _attention(vit: VitConfig, inputs: list[str], output: str) -> list[Row]:
    qkv = Qkv(vit.num_heads, vit.num_heads)
    return [
        *(
            Row(f"{ATTENTION}linear_qkv.{kind}", tuple(f"{name}{kind}" for name in inputs), qkv)
            for kind in ("weight", "bias")
        ),
        *rows(f"{ATTENTION}linear_proj.", output, "weight", "bias"),
    ]


def _mlp(mlp: str) -> list[Row]:
    return [
        *rows(f"{MLP}linear_fc1.", f"{mlp}fc1.", "weight", "bias"),
        *rows(f"{MLP}linear_fc2.", f"{mlp}fc2.", "weight", "bias"),
    ]


def _final_norm(vit: VitConfig, theirs: str) -> list[Row]:
    return rows("ln_post.", theirs, "weight", "bias") if vit.feature_layer == -1 else []


def fields_of(family: str) -> Any:
    """A function from a transformers config to VitConfig's fields."""

    def fields(config: Any) -> dict[str, Any]:
        ratio = getattr(config, "mlp_ratio", None)
        inner = config.hidden_size * ratio if ratio else config.intermediate_size
        return {
            "family": family,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "num_heads": config.num_attention_heads,
            "ffn_hidden_size": inner,
        }

    return fields


def config_for(model_type: str, architecture: str) -> Any:
    """A function from our config to a transformers config with the layers that are built."""

    def write(vit: VitConfig) -> Any:
        from transformers import CONFIG_MAPPING

        sizes: dict[str, Any] = {"intermediate_size": vit.ffn_hidden_size}
        if model_type == "dinov2":
            sizes = {"mlp_ratio": vit.ffn_hidden_size // vit.width}
        config: Any = CONFIG_MAPPING[model_type]
        return config(
            image_size=vit.image_size,
            patch_size=vit.patch_size,
            num_hidden_layers=vit.built_layers,
            hidden_size=vit.width,
            num_attention_heads=vit.num_heads,
            architectures=[architecture],
            **sizes,
        )

    return write


FAMILIES = (
    Family(
        name="clip_vision_model",
        sections={
            "clip_vision_model": "",
            "clip": "vision_config",
            "llava": "vision_config",
        },
        roots=("", "vision_model.", "vision_tower.vision_model.", "vision_tower."),
        anchor="embeddings.class_embedding",
        required={"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        fields=fields_of("clip"),
        num_layers=lambda vit: vit.built_layers,
        table=clip_table,
        unused=(r"post_layernorm\..*", r"embeddings\.position_ids"),
        config=config_for("clip_vision_model", "CLIPVisionModel"),
        describes=lambda vit: vit.family == "clip",
    ),
    Family(
        name="siglip_vision_model",
        sections={"siglip_vision_model": "", "siglip": "vision_config"},
        roots=("", "vision_model."),
        anchor="embeddings.patch_embedding.weight",
        required={"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
        fields=fields_of("siglip"),
        num_layers=lambda vit: vit.built_layers,
        table=siglip_table,
        unused=(r"head\..*", r"embeddings\.position_ids", r"post_layernorm\..*"),
        config=config_for("siglip_vision_model", "SiglipVisionModel"),
        describes=lambda vit: vit.family == "siglip",
    ),
    Family(
        name="dinov2",
        sections={"dinov2": ""},
        roots=("", "dinov2."),
        anchor="embeddings.cls_token",
        required={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
            "use_swiglu_ffn": False,
        },
        fields=fields_of("dinov2"),
        num_layers=lambda vit: vit.built_layers,
        table=dinov2_table,
        unused=(r"embeddings\.mask_token", r"layernorm\..*"),
        config=config_for("dinov2", "Dinov2Model"),
        describes=lambda vit: vit.family == "dinov2",
        spellings=(
            (r"\.attention\.q_proj\.", ".attention.attention.query."),
            (r"\.attention\.k_proj\.", ".attention.attention.key."),
            (r"\.attention\.v_proj\.", ".attention.attention.value."),
            (r"\.attention\.o_proj\.", ".attention.output.dense."),
        ),
    ),
)
