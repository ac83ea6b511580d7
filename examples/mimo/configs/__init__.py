"""The registry: `--model-provider` names and where each config is written."""

from __future__ import annotations

import importlib

from examples.mimo.configs.schema import MimoConfig

MODEL_PROVIDERS = {
    "tiny_avlm": "examples.mimo.configs.tiny_avlm",
    "llava_vlm": "examples.mimo.configs.llava",
    "video_llava_vlm": "examples.mimo.configs.llava",
    "llava_avlm": "examples.mimo.configs.llava",
    "llava_avlm_tuned": "examples.mimo.configs.llava",
    "qwen3_avlm": "examples.mimo.configs.qwen3",
    "smollm2_avlm": "examples.mimo.configs.smollm2",
    "scale_1b_avlm": "examples.mimo.configs.llava",
}


def get_model_config(name: str) -> MimoConfig:
    """The config called `name`; ValueError lists the names there are."""
    if name not in MODEL_PROVIDERS:
        raise ValueError(
            f"unknown --model-provider {name}; choose one of {', '.join(MODEL_PROVIDERS)}"
        )
    module = importlib.import_module(MODEL_PROVIDERS[name])
    return getattr(module, name)()
