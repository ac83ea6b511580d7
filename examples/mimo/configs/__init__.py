"""Model registry, `--model-provider` names and what returns their configs; the codecs' files."""

from __future__ import annotations

import importlib
import inspect
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.mimo.configs.schema import MimoConfig

if TYPE_CHECKING:
    from examples.mimo.modalities.base import CodecConfig

MODEL_PROVIDERS = {
    "tiny_avlm": "examples.mimo.configs.tiny_avlm",
    "tiny_avlm_speech": "examples.mimo.configs.tiny_avlm",
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


# In a data folder or a checkpoint, codecs/MODALITY/FILE; a codec is small beside a model.
CODECS = "codecs"
MAX_CODEC_BYTES = 2 * 2**30


def with_codec_folder(config: MimoConfig, root: Path) -> MimoConfig:
    """`config` with codecs that have their files in the data folder or checkpoint `root`."""
    modalities = dict(config.modalities)
    for name, output in config.outputs.items():
        codec = replace(output.codec, folder=str(root / CODECS / name))
        modalities[name] = replace(modalities[name], codec=codec)
    return replace(config, modalities=modalities)


def check_codecs(config: MimoConfig) -> None:
    """ValueError, one line, unless every codec has its files where its config says."""
    for name, output in config.outputs.items():
        for file in output.codec.files:
            _checked_file(name, output.codec, file)


def _checked_file(name: str, codec: CodecConfig, file: str) -> Path:
    path = Path(codec.folder) / file
    if not codec.folder or not path.is_file():
        where = path if codec.folder else file
        raise ValueError(f"{where}: no such file, but {name} need it; {codec.origin}")
    # It is copied with the model, and a link in a stranger's data may lead anywhere.
    if not path.resolve().is_relative_to(Path(codec.folder).parent.parent.resolve()):
        raise ValueError(f"{path}: a link that leads out of its folder; put the file itself there")
    if (size := path.stat().st_size) > MAX_CODEC_BYTES:
        raise ValueError(f"{path}: {size:,} bytes, more than {MAX_CODEC_BYTES:,}")
    return path


def holds_codecs(config: MimoConfig, root: Path) -> bool:
    """Whether every file of every codec is in the data folder or checkpoint `root`."""
    try:
        check_codecs(with_codec_folder(config, root))
    except ValueError:
        return False
    return True


def copy_codecs(config: MimoConfig, root: Path) -> None:
    """Put the codecs' files, those that are there, into the data folder or checkpoint `root`."""
    for name, output in config.outputs.items():
        folder = root / CODECS / name
        for file in output.codec.files:
            source, target = Path(output.codec.folder) / file, folder / file
            if not source.is_file() or source.resolve() == target.resolve():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            # Under its name only when whole: another process may read the one before.
            draft = folder / f".{file}"
            shutil.copyfile(_checked_file(name, output.codec, file), draft)
            draft.replace(target)
