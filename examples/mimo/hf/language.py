"""Weight tables of language models: Llama, Mistral, Qwen2 (2.5) and Qwen3."""

from __future__ import annotations

from typing import Any

from examples.mimo.configs.schema import LanguageConfig
from examples.mimo.hf.weights import Family, GateUp, Qkv, Row, Vocabulary

LAYER = "decoder.layers."
THEIRS = "model.layers.{i}."


def table(language: LanguageConfig, config: Any) -> list[Row]:
    """The weight table of a language model whose config.json is `config`."""
    qkv = Qkv(language.num_attention_heads, language.num_query_groups)
    vocabulary = Vocabulary(config.vocab_size, language.vocab_size)
    ours, theirs = f"{LAYER}self_attention.", f"{THEIRS}self_attn."
    projections = [f"{theirs}{name}_proj" for name in "qkv"]
    weights = [
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary),
        Row(f"{ours}linear_qkv.layer_norm_weight", (f"{THEIRS}input_layernorm.weight",)),
        Row(f"{ours}linear_qkv.weight", tuple(f"{p}.weight" for p in projections), qkv),
        Row(f"{ours}linear_proj.weight", (f"{theirs}o_proj.weight",)),
        Row(
            f"{LAYER}mlp.linear_fc1.layer_norm_weight",
            (f"{THEIRS}post_attention_layernorm.weight",),
        ),
        Row(
            f"{LAYER}mlp.linear_fc1.weight",
            (f"{THEIRS}mlp.gate_proj.weight", f"{THEIRS}mlp.up_proj.weight"),
            GateUp(),
        ),
        Row(f"{LAYER}mlp.linear_fc2.weight", (f"{THEIRS}mlp.down_proj.weight",)),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if language.qkv_bias:
        biases = tuple(f"{p}.bias" for p in projections)
        weights.append(Row(f"{ours}linear_qkv.bias", biases, qkv))
    if language.qk_norm:
        weights += [
            Row(f"{ours}{side}_layernorm.weight", (f"{theirs}{side}_norm.weight",)) for side in "qk"
        ]
    if not language.tie_embeddings:
        weights.append(Row("output_layer.weight", ("lm_head.weight",), vocabulary))
    return weights


def fields(config: Any) -> dict[str, Any]:
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
    """Llama 3's factor; Megatron computes it with these bounds alone."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    bounds = [rope.get(k) for k in ("low_freq_factor", "high_freq_factor")]
    if kind != "llama3" or bounds != [1.0, 4.0]:
        raise ValueError(f"rope_parameters {rope}: rope type 'default' or Llama 3's is needed")
    if rope.get("original_max_position_embeddings") != 8192:
        raise ValueError(f"rope_parameters {rope}: original_max_position_embeddings must be 8192")
    return float(rope["factor"])


def config_for(model_type: str) -> Any:
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


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def family(
    model_type: str, qkv_bias: bool = False, qk_norm: bool = False, **required: Any
) -> Family:
    """The family of one `model_type`."""
    return Family(
        name=model_type,
        sections={model_type: "", "llava": "text_config"},
        roots=("", "language_model."),
        anchor="model.embed_tokens.weight",
        required={"hidden_act": "silu", **required},
        fields=fields,
        num_layers=lambda language: language.num_layers,
        table=table,
        unused=(r".*rotary_emb\.inv_freq", r"lm_head\.weight"),
        config=config_for(model_type),
        describes=lambda our: (our.qkv_bias, our.qk_norm) == (qkv_bias, qk_norm),
    )


FAMILIES = (
    family("llama", attention_bias=False, mlp_bias=False),
    family("mistral"),
    family("qwen2", qkv_bias=True, use_sliding_window=False),
    family("qwen3", qk_norm=True, use_sliding_window=False, attention_bias=False),
)
