"""Weight mappings of the supported Hugging Face families: language models, encoders, projectors."""

from __future__ import annotations

from typing import Any

from examples.mimo.configs.schema import LanguageConfig
from examples.mimo.hf.weights import (
    Family,
    GateUp,
    ImagePreprocessor,
    Qkv,
    QkvWithoutKeyBias,
    View,
    Vocabulary,
    WeightMapping,
    WhisperPreprocessor,
    renamed,
)
from examples.mimo.modalities.audio import WhisperConfig
from examples.mimo.modalities.base import EncoderConfig, MLPProjectorConfig, sinusoids
from examples.mimo.modalities.image import VitConfig

# Megatron keys, of the language model as of encoders; Llama's names; classes for config.json.
LANGUAGE_LAYER = "decoder.layers."
ATTENTION = f"{LANGUAGE_LAYER}self_attention."
MLP = f"{LANGUAGE_LAYER}mlp."
LLAMA_LAYER = "model.layers.{i}."
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def language_mappings(language: LanguageConfig, config: Any) -> list[WeightMapping]:
    """The weight mappings of a language model whose config.json is `config`."""
    qkv = Qkv(language.num_attention_heads, language.num_query_groups)
    vocabulary = Vocabulary(config.vocab_size, language.vocab_size)
    ours, theirs = f"{LANGUAGE_LAYER}self_attention.", f"{LLAMA_LAYER}self_attn."
    projections = [f"{theirs}{name}_proj" for name in "qkv"]
    mappings = [
        WeightMapping(
            "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary
        ),
        WeightMapping(
            f"{ours}linear_qkv.layer_norm_weight", (f"{LLAMA_LAYER}input_layernorm.weight",)
        ),
        WeightMapping(f"{ours}linear_qkv.weight", tuple(f"{p}.weight" for p in projections), qkv),
        WeightMapping(f"{ours}linear_proj.weight", (f"{theirs}o_proj.weight",)),
        WeightMapping(
            f"{LANGUAGE_LAYER}mlp.linear_fc1.layer_norm_weight",
            (f"{LLAMA_LAYER}post_attention_layernorm.weight",),
        ),
        WeightMapping(
            f"{LANGUAGE_LAYER}mlp.linear_fc1.weight",
            (f"{LLAMA_LAYER}mlp.gate_proj.weight", f"{LLAMA_LAYER}mlp.up_proj.weight"),
            GateUp(),
        ),
        WeightMapping(
            f"{LANGUAGE_LAYER}mlp.linear_fc2.weight", (f"{LLAMA_LAYER}mlp.down_proj.weight",)
        ),
        WeightMapping("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if language.qkv_bias:
        biases = tuple(f"{p}.bias" for p in projections)
        mappings.append(WeightMapping(f"{ours}linear_qkv.bias", biases, qkv))
    if language.qk_norm:
        mappings += [
            WeightMapping(f"{ours}{side}_layernorm.weight", (f"{theirs}{side}_norm.weight",))
            for side in "qk"
        ]
    if not language.tie_embeddings:
        mappings.append(WeightMapping("output_layer.weight", ("lm_head.weight",), vocabulary))
    return mappings


def language_fields(config: Any) -> dict[str, Any]:
    """LanguageConfig's fields from a transformers config."""
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None)
    heads = config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_query_groups": config.num_key_value_heads,
        "query_projection_size": heads * (head_dim or config.hidden_size // heads),
        "rotary_base": rope["rope_theta"],
        "rope_scaling_factor": _rope_scaling(rope),
        "norm_epsilon": config.rms_norm_eps,
        "tie_embeddings": config.tie_word_embeddings,
    }


def _rope_scaling(rope: dict[str, Any]) -> float | None:
    """Llama 3's scaling factor; the other values are fixed in Megatron."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    frequency_factors = [rope.get(k) for k in ("low_freq_factor", "high_freq_factor")]
    if kind != "llama3" or frequency_factors != [1.0, 4.0]:
        raise ValueError(f"rope_parameters {rope}: rope type 'default' or Llama 3's is needed")
    if rope.get("original_max_position_embeddings") != 8192:
        raise ValueError(f"rope_parameters {rope}: original_max_position_embeddings must be 8192")
    return float(rope["factor"])


def language_config(model_type: str) -> Any:
    """A function from our config to a transformers config of `model_type`."""

    def write(language: LanguageConfig) -> Any:
        from transformers import CONFIG_MAPPING

        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(language.rotary_base)}
        if language.rope_scaling_factor is not None:
            rope |= {"rope_type": "llama3", "factor": language.rope_scaling_factor}
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            rope["original_max_position_embeddings"] = 8192
        config: Any = CONFIG_MAPPING[model_type]
        return config(
            vocab_size=language.vocab_size,
            hidden_size=language.hidden_size,
            intermediate_size=language.ffn_hidden_size,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.num_query_groups,
            head_dim=language.query_projection_size // language.num_attention_heads,
            max_position_embeddings=language.seq_length,
            rms_norm_eps=language.norm_epsilon,
            rope_parameters=rope,
            tie_word_embeddings=language.tie_embeddings,
            architectures=[ARCHITECTURES[model_type]],
        )

    return write


def language_family(
    model_type: str, qkv_bias: bool = False, qk_norm: bool = False, **required: Any
) -> Family:
    """The language-model family of a `model_type`; its members differ in biases and norms."""
    return Family(
        name=model_type,
        sections={model_type: "", "llava": "text_config"},
        roots=("", "language_model."),
        anchor="model.embed_tokens.weight",
        required={"hidden_act": "silu", **required},
        fields=language_fields,
        num_layers=lambda language: language.num_layers,
        mappings=language_mappings,
        unused=(r".*rotary_emb\.inv_freq", r"lm_head\.weight"),
        config=language_config(model_type),
        describes=lambda our: (our.qkv_bias, our.qk_norm) == (qkv_bias, qk_norm),
    )


LANGUAGE = (
    language_family("llama", attention_bias=False, mlp_bias=False),
    language_family("mistral"),
    language_family("qwen2", qkv_bias=True, use_sliding_window=False),
    language_family("qwen3", qk_norm=True, use_sliding_window=False, attention_bias=False),
)


def clip_mappings(vit: VitConfig, config: Any) -> list[WeightMapping]:
    """CLIP: a class token and a norm before the layers."""
    token = View((vit.hidden_size,), (1, 1, vit.hidden_size))
    return [
        WeightMapping("stem.class_token", ("embeddings.class_embedding",), token),
        WeightMapping("stem.positions", ("embeddings.position_embedding.weight",)),
        *renamed("stem.conv1.", "embeddings.patch_embedding.", "weight"),
        *renamed("pre_norm.", "pre_layrnorm.", "weight", "bias"),
        *_vit_layers(vit, "encoder.layers.{i}."),
    ]


def siglip_mappings(vit: VitConfig, config: Any) -> list[WeightMapping]:
    """SigLIP: patches alone, a norm behind the layers."""
    return [
        WeightMapping("stem.positions", ("embeddings.position_embedding.weight",)),
        *renamed("stem.conv1.", "embeddings.patch_embedding.", "weight", "bias"),
        *_vit_layers(vit, "encoder.layers.{i}."),
        *_final_norm(vit, "post_layernorm."),
    ]


def dinov2_mappings(vit: VitConfig, config: Any) -> list[WeightMapping]:
    """DINOv2: a class token, and LayerScale on the output of each sublayer."""
    positions = (vit.sequence_length, vit.hidden_size)
    layer = "encoder.layer.{i}."
    attention = f"{layer}attention."
    return [
        WeightMapping("stem.class_token", ("embeddings.cls_token",)),
        WeightMapping(
            "stem.positions",
            ("embeddings.position_embeddings",),
            View((1, *positions), positions),
        ),
        *renamed("stem.conv1.", "embeddings.patch_embeddings.projection.", "weight", "bias"),
        *_norms(f"{layer}norm1.", f"{layer}norm2."),
        *_attention(
            vit,
            [f"{attention}attention.{name}." for name in ("query", "key", "value")],
            f"{attention}output.dense.",
        ),
        *_mlp(f"{layer}mlp."),
        WeightMapping(f"{ATTENTION}linear_proj.layer_scale", (f"{layer}layer_scale1.lambda1",)),
        WeightMapping(f"{MLP}linear_fc2.layer_scale", (f"{layer}layer_scale2.lambda1",)),
        *_final_norm(vit, "layernorm."),
    ]


def whisper_mappings(whisper: WhisperConfig, config: Any) -> list[WeightMapping]:
    """Whisper: two convolutions; its fixed sinusoids are computed, not loaded."""
    layer = "layers.{i}."
    query, key, value = (f"{layer}self_attn.{name}_proj." for name in "qkv")
    heads = whisper.num_attention_heads
    return [
        *renamed("stem.conv1.", "conv1.", "weight", "bias"),
        *renamed("stem.conv2.", "conv2.", "weight", "bias"),
        *_norms(f"{layer}self_attn_layer_norm.", f"{layer}final_layer_norm."),
        WeightMapping(
            f"{ATTENTION}linear_qkv.weight",
            tuple(f"{name}weight" for name in (query, key, value)),
            Qkv(heads, heads),
        ),
        WeightMapping(
            f"{ATTENTION}linear_qkv.bias",
            (f"{query}bias", f"{value}bias"),
            QkvWithoutKeyBias(heads),
        ),
        *renamed(f"{ATTENTION}linear_proj.", f"{layer}self_attn.out_proj.", "weight", "bias"),
        *_mlp(layer),
        *renamed("decoder.final_layernorm.", "layer_norm.", "weight", "bias"),
    ]


def projector_mappings(projector: MLPProjectorConfig, config: Any) -> list[WeightMapping]:
    """The two linear layers between an encoder and the language model, as LLaVA-1.5 names them."""
    return [
        *renamed("encoder.linear_fc1.", "linear_1.", "weight", "bias"),
        *renamed("encoder.linear_fc2.", "linear_2.", "weight", "bias"),
    ]


def _vit_layers(vit: VitConfig, layer: str) -> list[WeightMapping]:
    attention = f"{layer}self_attn."
    return [
        *_norms(f"{layer}layer_norm1.", f"{layer}layer_norm2."),
        *_attention(vit, [f"{attention}{n}_proj." for n in "qkv"], f"{attention}out_proj."),
        *_mlp(f"{layer}mlp."),
    ]


def _norms(before_attention: str, before_mlp: str) -> list[WeightMapping]:
    return [
        *renamed(f"{ATTENTION}linear_qkv.layer_norm_", before_attention, "weight", "bias"),
        *renamed(f"{MLP}linear_fc1.layer_norm_", before_mlp, "weight", "bias"),
    ]


def _attention(encoder: EncoderConfig, inputs: list[str], output: str) -> list[WeightMapping]:
    qkv = Qkv(encoder.num_attention_heads, encoder.num_attention_heads)
    return [
        *(
            WeightMapping(
                f"{ATTENTION}linear_qkv.{kind}", tuple(f"{name}{kind}" for name in inputs), qkv
            )
            for kind in ("weight", "bias")
        ),
        *renamed(f"{ATTENTION}linear_proj.", output, "weight", "bias"),
    ]


def _mlp(mlp: str) -> list[WeightMapping]:
    return [
        *renamed(f"{MLP}linear_fc1.", f"{mlp}fc1.", "weight", "bias"),
        *renamed(f"{MLP}linear_fc2.", f"{mlp}fc2.", "weight", "bias"),
    ]


def _final_norm(vit: VitConfig, theirs: str) -> list[WeightMapping]:
    return renamed("decoder.final_layernorm.", theirs, "weight", "bias") if vit.final_norm else []


def vit_fields(family: str) -> Any:
    """A function from a transformers config to VitConfig's fields."""

    def fields(config: Any) -> dict[str, Any]:
        ratio = getattr(config, "mlp_ratio", None)
        inner = config.hidden_size * ratio if ratio else config.intermediate_size
        return {
            "family": family,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "ffn_hidden_size": inner,
        }

    return fields


def vit_config(model_type: str, architecture: str) -> Any:
    """A function from our config to a transformers config with the layers that are built."""

    def write(vit: VitConfig) -> Any:
        from transformers import CONFIG_MAPPING

        sizes: dict[str, Any] = {"intermediate_size": vit.ffn_hidden_size}
        if model_type == "dinov2":
            sizes = {"mlp_ratio": vit.ffn_hidden_size // vit.hidden_size}
        config: Any = CONFIG_MAPPING[model_type]
        return config(
            image_size=vit.image_size,
            patch_size=vit.patch_size,
            num_hidden_layers=vit.built_layers,
            hidden_size=vit.hidden_size,
            num_attention_heads=vit.num_attention_heads,
            architectures=[architecture],
            **sizes,
        )

    return write


def whisper_fields(config: Any) -> dict[str, Any]:
    """WhisperConfig's fields from a transformers config."""
    return {
        "num_mel_bins": config.num_mel_bins,
        "num_layers": config.encoder_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.encoder_attention_heads,
        "ffn_hidden_size": config.encoder_ffn_dim,
        "window_frames": config.max_source_positions,
    }


def whisper_config(whisper: WhisperConfig) -> Any:
    """A transformers config; the decoder it also describes has no layers."""
    from transformers import WhisperConfig as TransformersConfig

    return TransformersConfig(
        num_mel_bins=whisper.num_mel_bins,
        encoder_layers=whisper.num_layers,
        d_model=whisper.hidden_size,
        encoder_attention_heads=whisper.num_attention_heads,
        encoder_ffn_dim=whisper.ffn_hidden_size,
        max_source_positions=whisper.window_frames,
        decoder_layers=0,
        architectures=["WhisperEncoder"],
    )


VISION = (
    Family(
        name="clip_vision_model",
        sections={"clip_vision_model": "", "clip": "vision_config", "llava": "vision_config"},
        roots=("", "vision_model.", "vision_tower.vision_model.", "vision_tower."),
        anchor="embeddings.class_embedding",
        required={"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        fields=vit_fields("clip"),
        num_layers=lambda vit: vit.built_layers,
        mappings=clip_mappings,
        unused=(r"post_layernorm\..*", r"embeddings\.position_ids"),
        config=vit_config("clip_vision_model", "CLIPVisionModel"),
        describes=lambda vit: vit.family == "clip",
        preprocessor=ImagePreprocessor("CLIPImageProcessor"),
    ),
    Family(
        name="siglip_vision_model",
        sections={"siglip_vision_model": "", "siglip": "vision_config"},
        roots=("", "vision_model."),
        anchor="embeddings.patch_embedding.weight",
        required={"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
        fields=vit_fields("siglip"),
        num_layers=lambda vit: vit.built_layers,
        mappings=siglip_mappings,
        unused=(r"head\..*", r"embeddings\.position_ids", r"post_layernorm\..*"),
        config=vit_config("siglip_vision_model", "SiglipVisionModel"),
        describes=lambda vit: vit.family == "siglip",
        preprocessor=ImagePreprocessor("SiglipImageProcessor"),
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
        fields=vit_fields("dinov2"),
        num_layers=lambda vit: vit.built_layers,
        mappings=dinov2_mappings,
        unused=(r"embeddings\.mask_token", r"layernorm\..*"),
        config=vit_config("dinov2", "Dinov2Model"),
        describes=lambda vit: vit.family == "dinov2",
        preprocessor=ImagePreprocessor("BitImageProcessor"),
        spellings=(
            (r"\.attention\.q_proj\.", ".attention.attention.query."),
            (r"\.attention\.k_proj\.", ".attention.attention.key."),
            (r"\.attention\.v_proj\.", ".attention.attention.value."),
            (r"\.attention\.o_proj\.", ".attention.output.dense."),
        ),
    ),
)

WHISPER = (
    Family(
        name="whisper",
        sections={"whisper": ""},
        roots=("", "encoder.", "model.encoder."),
        anchor="conv1.weight",
        required={"activation_function": "gelu", "scale_embedding": False},
        fields=whisper_fields,
        num_layers=lambda whisper: whisper.num_layers,
        mappings=whisper_mappings,
        config=whisper_config,
        fixed=lambda whisper: {
            "embed_positions.weight": sinusoids(whisper.window_frames, whisper.hidden_size)
        },
        preprocessor=WhisperPreprocessor(),
    ),
)

PROJECTOR = (
    Family(
        name="llava",
        sections={"llava": ""},
        roots=("", "multi_modal_projector.", "model.multi_modal_projector."),
        anchor="linear_1.weight",
        required={
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_select_strategy": "default",
        },
        fields=lambda config: {},
        num_layers=lambda projector: 0,
        mappings=projector_mappings,
    ),
)
