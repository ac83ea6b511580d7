"""Model registry: `--model-provider` names, and the functions that return their configs."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from typing import Any

from examples.mimo.configs.schema import MimoConfig

MODEL_PROVIDERS = {
    "tiny_avlm": "examples.mimo.configs.tiny_avlm",
    "sensor_lm": "examples.mimo.configs.sensor_lm",
    "llava_vlm": "examples.mimo.configs.pretrained",
    "video_llava_vlm": "examples.mimo.configs.pretrained",
    "llava_avlm": "examples.mimo.configs.pretrained",
    "llava_avlm_tuned": "examples.mimo.configs.pretrained",
    "qwen3_avlm": "examples.mimo.configs.pretrained",
    "smollm2_avlm": "examples.mimo.configs.pretrained",
    "scale_1b_avlm": "examples.mimo.configs.pretrained",
}


def get_model_config(name: str, flag: str = "--model-provider") -> MimoConfig:
    """The config of an entry of the registry, or what `package.module:function` returns.

    The module is found as Python finds any: installed, or in a folder of PYTHONPATH. Whatever goes
    wrong is a ValueError of one line that begins with `flag` and `name`. A config from a function
    of one's own is named by its path, so that a checkpoint knows where it came from. Checkpoints
    come from elsewhere: of what a name can lead to, only functions that say that they return a
    `MimoConfig` are called.
    """
    flag = f"{flag} {name}"
    if name in MODEL_PROVIDERS:
        config = _call(flag, MODEL_PROVIDERS[name], name)
        if config.name != name:
            raise ValueError(f"{flag}: this config calls itself {config.name!r}; give it its name")
        return config
    module, colon, function = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), function]):
        raise ValueError(
            f"unknown {flag}; choose one of {', '.join(MODEL_PROVIDERS)}, or write "
            "package.module:function"
        )
    return replace(_call(flag, module, function), name=name)


def _call(flag: str, module_name: str, function: str) -> Any:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{flag}: importing {module_name} failed: {_one_line(error)}; install it, or put its "
            "folder on PYTHONPATH"
        ) from error
    except Exception as error:
        raise ValueError(f"{flag}: importing {module_name} failed: {_one_line(error)}") from error
    builder: Any = getattr(module, function, None)
    # Annotations are strings under `from __future__ import annotations`.
    returns = getattr(builder, "__annotations__", {}).get("return")
    returns_config = returns is MimoConfig or (
        isinstance(returns, str) and returns.rpartition(".")[2] == MimoConfig.__name__
    )
    # In one condition, so that mypy sees a function below.
    if not (inspect.isfunction(builder) and builder.__module__ == module_name and returns_config):
        raise ValueError(
            f"{flag}: {module_name} defines no function `def {function}() -> MimoConfig:`, and "
            "nothing else is called"
        )
    try:
        config = builder()
    except Exception as error:
        raise ValueError(f"{flag}: {function}() failed: {_one_line(error)}") from error
    if not isinstance(config, MimoConfig):
        raise ValueError(f"{flag}: {function}() returned a {type(config).__name__}, no MimoConfig")
    return config


def _one_line(error: Exception) -> str:
    """The error's first line, with its type unless that is this package's own ValueError."""
    text = next(iter(str(error).splitlines()), "")
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"
