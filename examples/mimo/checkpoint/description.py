"""What a folder is for: `mimo.json` beside weights, `about.json` beside data; tokenizer, codecs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.mimo.checkpoint.integrity import (
    CHANGED,
    COPY,
    MANIFEST,
    REMEDY,
    check_file_digests,
    check_small_files,
    file_digests,
    read_json,
    sealed,
)
from examples.mimo.configs import (
    CODECS,
    MODEL_PROVIDERS,
    copy_codecs,
    get_model_config,
    with_codec_folder,
)
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import copy_tokenizer
from examples.mimo.modalities.values import as_tuples, rules, shown

ABOUT = "about.json"
FILE_NAME = "mimo.json"
FORMAT = 1
TRACKER = "latest_checkpointed_iteration.txt"
# Megatron's name for weights of no iteration, such as converted ones.
RELEASE = "release"
TOKENIZER = "tokenizer"
LANGUAGE = "language"
# Folders beside the description, whose files' digests it holds.
FOLDERS = (TOKENIZER, CODECS)
SECTIONS = ("sources", *FOLDERS)
# Megatron's: the format of the weights beside it.
FORMAT_FILE = "metadata.json"
FORMAT_KEYS = (
    *("sharded_backend", "sharded_backend_version"),
    *("common_backend", "common_backend_version"),
)


@dataclass(frozen=True)
class Checkpoint:
    """`folder` is what `--save` named; `weights` the iteration inside it that is loaded.

    `sources` says of each part that came from Hugging Face what its config.json was. `flag` is what
    named the folder, for messages, and `verify` says whether its files are checked.
    """

    folder: Path
    weights: Path
    config: MimoConfig
    sources: dict[str, Any]
    flag: str = "--ckpt"
    verify: bool = True

    @property
    def named(self) -> str:
        """The flag and the folder, as messages begin."""
        return f"{self.flag} {self.folder}"

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer the model was trained with."""
        return self.folder / TOKENIZER


def save_description(
    folder: Path,
    config: MimoConfig,
    tokenizer: Path | None,
    sources: Mapping[str, Any] | None = None,
) -> None:
    """Write the tokenizer's files, the codecs' and `mimo.json` into `folder`.

    The last, whole or not at all, holds digests of the others, and of itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / TOKENIZER
    if tokenizer is not None and not (target.exists() and tokenizer.resolve() == target.resolve()):
        draft = folder / f".{TOKENIZER}.{os.getpid()}"
        draft.mkdir()
        copy_tokenizer(tokenizer, draft)
        if not target.is_dir() or file_digests(target) != file_digests(draft):
            shutil.rmtree(target, ignore_errors=True)
            draft.replace(target)
        else:
            shutil.rmtree(draft)
    copy_codecs(config, folder)
    description = {
        "format": FORMAT,
        "config": to_dict(config),
        "sources": dict(sources or {}),
        **{name: file_digests(folder / name) for name in FOLDERS if (folder / name).is_dir()},
    }
    file = folder / f".{FILE_NAME}.{os.getpid()}"
    file.write_text(sealed(description), encoding="utf-8")
    file.replace(folder / FILE_NAME)


def open_checkpoint(folder: Path, flag: str = "--ckpt", verify: bool = False) -> Checkpoint:
    """Read `folder`; ValueError, one line, when it is not a checkpoint of this package.

    `flag` is what named the folder, for messages. With `verify` the description, the tokenizer and
    the files that describe the weights are compared with their digests, and on loading the weights.
    """
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: no such folder")
    if not (folder / FILE_NAME).is_file():
        raise ValueError(
            f"{flag} {folder}: not a checkpoint of this package ({FILE_NAME} is missing); name "
            "the folder that train.py --save wrote"
        )
    saved = _read_description(folder, flag, verify)
    name = saved["config"].get("name")
    base = _config_named(name, f"{flag} {folder}")
    if isinstance(chat := saved["config"].get("chat"), dict):
        # Older descriptions do not say how a system turn is written; the model's family does.
        chat.setdefault("system_turn", base.chat.system_turn)
    try:
        config = overlay(base, saved["config"], FILE_NAME)
    except ValueError as error:
        raise ValueError(f"{flag} {folder}: {error}") from None
    weights = latest_weights(folder, flag)
    if verify:
        check_small_files(weights, f"{flag} {folder}")
    config = with_codec_folder(config, folder)
    return Checkpoint(folder, weights, config, saved.get("sources", {}), flag, verify)


def check_description(folder: Path, flag: str) -> None:
    """ValueError unless the description, the tokenizer and the index of the weights are whole."""
    if (folder / FILE_NAME).is_file():
        _read_description(folder, flag, verify=True)
    check_small_files(latest_weights(folder, flag), f"{flag} {folder}")


def _read_description(folder: Path, flag: str, verify: bool) -> dict[str, Any]:
    """The content of `mimo.json`, of this shape; ValueError when it is damaged."""
    try:
        keys = ("format", "config", *SECTIONS)
        saved, is_as_sealed = read_json(folder / FILE_NAME, keys)
        sources = saved.get("sources", {})
        are_objects = all(isinstance(saved.get(key, {}), dict) for key in (*SECTIONS, "config"))
        if "config" not in saved or not are_objects or not all(map(_is_source, sources.values())):
            raise ValueError(
                f"is damaged (config, {' or '.join(SECTIONS)} is not as it is written)"
            )
    except ValueError as error:
        raise ValueError(f"{flag} {folder}: {FILE_NAME} {error}; {COPY}") from None
    if verify and is_as_sealed is False:
        raise ValueError(f"{flag} {folder}: {FILE_NAME} {CHANGED}; {REMEDY}")
    for name in FOLDERS if verify else ():
        try:
            check_file_digests(folder / name, saved[name]) if name in saved else None
        except ValueError as error:
            raise ValueError(f"{flag} {folder}: {error}") from None
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"{flag} {folder}: {FILE_NAME} has format {saved.get('format')}, this package reads "
            f"{FORMAT}"
        )
    return saved


def _config_named(name: Any, where: str) -> MimoConfig:
    """The config that a description's sizes are laid over; ValueError says how to get at it."""
    where = f"{where}: {FILE_NAME} names the model"
    if not isinstance(name, str) or (name not in MODEL_PROVIDERS and ":" not in name):
        raise ValueError(
            f"{where} {name!r}, which this package does not have; use the version that wrote it"
        )
    return get_model_config(name, where)


def check_same_model(
    flag: str, folder: Path, config: MimoConfig, fresh_parts: Collection[str] = ()
) -> None:
    """ValueError, one line, when `folder` holds the weights of another model than `config`.

    `fresh_parts`, such as `sensors.projector`, are not loaded: they may differ or be absent.
    """
    if not (folder / FILE_NAME).is_file() or not (folder / TRACKER).is_file():
        return
    checkpoint_config = open_checkpoint(folder, flag).config
    check_parts(flag, folder, checkpoint_config, config, fresh_parts)
    fresh_paths = paths_of_fresh(checkpoint_config, config, fresh_parts)
    saved, expected = weight_fields(checkpoint_config), weight_fields(config)
    for fields in (saved, expected):
        # In older descriptions the text that begins an answer is the end of `human`.
        if fields["chat.past_start"] is None:
            fields["chat.human"] = f"{fields['chat.human']}{fields.pop('chat.start')}"
    for path in sorted(saved.keys() | expected.keys()):
        if saved.get(path) != expected.get(path) and not path.startswith(fresh_paths):
            raise ValueError(
                f"{flag} {folder}: this folder's model has {path} {saved.get(path)!r}, but this "
                f"run's has {expected.get(path)!r}; change the run or name another folder"
            )


def check_parts(
    flag: str,
    folder: Path,
    checkpoint_config: MimoConfig,
    config: MimoConfig,
    fresh_parts: Collection[str],
) -> None:
    """ValueError, one line, when `config` has a part that the checkpoint lacks and is not fresh."""
    for name in [name for name in config.inputs if name not in checkpoint_config.inputs]:
        missing = [
            part for part in (f"{name}.encoder", f"{name}.projector") if part not in fresh_parts
        ]
        if missing:
            remedy = {
                "--save": "name another folder",
                "--load": f"add --finetune --fresh {name} to start with random weights there",
            }
            default = f"add --fresh {name} to start with random weights there"
            raise ValueError(
                f"{flag} {folder}: this checkpoint has no {' and no '.join(missing)}; "
                f"{remedy.get(flag, default)}"
            )
    for name in config.outputs:
        if name not in checkpoint_config.outputs and LANGUAGE not in fresh_parts:
            raise ValueError(
                f"{flag} {folder}: this checkpoint's vocabulary has no codes of {name}; export it "
                "with convert.py to-hf, and import it with from-hf as this model"
            )


def paths_of_fresh(
    checkpoint_config: MimoConfig, config: MimoConfig, fresh_parts: Collection[str]
) -> tuple[str, ...]:
    """Prefixes of the field paths whose values may differ from the checkpoint's."""
    added = [name for name in config.modalities if name not in checkpoint_config.modalities]
    paths = [part if part == LANGUAGE else f"modalities.{part}" for part in fresh_parts]
    if LANGUAGE in fresh_parts:  # and with it the rows of all codes
        paths += [f"modalities.{name}.codec" for name in config.outputs]
    return tuple(f"{path}." for path in [*paths, *(f"modalities.{name}" for name in added)])


def weight_fields(value: Any, path: str = "") -> dict[str, Any]:
    """`path.of.a.field` -> value, of a config's fields that the weights depend on.

    Two runs of one model may choose the others, which say so where they are defined:
    `field(metadata={"shapes_weights": False})`.
    """
    if isinstance(value, dict):
        inner = value.items()
    elif dataclasses.is_dataclass(value):
        inner = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.metadata.get("shapes_weights", True)
        }.items()
    else:
        return {path: value}
    fields: dict[str, Any] = {}
    for name, item in inner:
        fields |= weight_fields(item, f"{path}.{name}" if path else name)
    return fields


def latest_weights(folder: Path, flag: str = "--ckpt") -> Path:
    """The iteration inside `folder` that is loaded; ValueError when it is missing or incomplete."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise ValueError(f"{flag} {folder}: nothing has been saved here yet ({TRACKER} is missing)")
    iteration = tracker.read_text(encoding="utf-8", errors="replace").strip()[:40]
    is_number = iteration.isascii() and iteration.isdigit()
    if not is_number and iteration != RELEASE:
        raise ValueError(
            f"{flag} {folder}: {TRACKER} names no iteration: {iteration!r}; {_others(folder)}"
        )
    weights = folder / (RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}")
    if not _is_loadable(weights):
        raise ValueError(
            f"{flag} {folder}: {weights.name}, which {TRACKER} names, has no whole .metadata and "
            f"{FORMAT_FILE}; {_others(folder)}"
        )
    return weights


def _is_source(source: Any) -> bool:
    """Whether this can say where a part came from: a model type and the content of JSON files."""
    if not isinstance(source, dict) or not isinstance(source.get("model_type"), str):
        return False
    return all(isinstance(source.get(key, {}), dict) for key in ("config", "preprocessor"))


def _is_loadable(weights: Path) -> bool:
    """Whether a folder has what Megatron looks for first: the index, and the format's name."""
    try:
        content, _ = read_json(weights / FORMAT_FILE, FORMAT_KEYS)
        is_known = content["sharded_backend"] == "torch_dist"
        is_known &= type(content.get("sharded_backend_version", 1)) is int
        return is_known and (weights / ".metadata").is_file()
    except (ValueError, KeyError):
        return False


def _others(folder: Path) -> str:
    """The remedy for a tracker that names no weights: what else it could name."""
    folders = [folder / RELEASE, *sorted(folder.glob("iter_*"))]
    there = [path for path in folders if _is_loadable(path)]
    # One without a manifest may be of a save that was killed.
    there = [path for path in there if (path / MANIFEST).is_file()] or there
    if not there:
        return "no other iteration is there; copy the checkpoint anew"
    name = there[-1].name
    number = name.removeprefix("iter_").lstrip("0")
    return f"the last one there is {name}; write {number} into it to load that"


def to_dict(config: Any) -> Any:
    """A config as JSON-ready values, without fields that say that they are not `saved`."""
    if dataclasses.is_dataclass(config):
        fields = (f for f in dataclasses.fields(config) if f.metadata.get("saved", True))
        return {field.name: to_dict(getattr(config, field.name)) for field in fields}
    if isinstance(config, dict):
        return {name: to_dict(value) for name, value in config.items()}
    return config


def overlay(base: Any, values: Any, where: str = "config") -> Any:
    """`base` with `values` laid over it; the shape of both must agree.

    The classes come from `base`, which the registry made, and only numbers and strings from
    `values`: a checkpoint's JSON can change a model's sizes and nothing else. ValueError for a
    value that its field's type and bounds do not allow.
    """
    if dataclasses.is_dataclass(base) and not isinstance(base, type):
        names = [f.name for f in dataclasses.fields(base) if f.metadata.get("saved", True)]
        if isinstance(values, dict):
            # A field that is younger than the checkpoint has its default, which means "as before".
            defaults = {f.name: f.default for f in dataclasses.fields(base) if f.name in names}
            values = {n: d for n, d in defaults.items() if d is not dataclasses.MISSING} | values
        _same_keys(set(names), values, where)
        fields = {name: _field_value(base, name, values[name], f"{where}.{name}") for name in names}
        try:
            return dataclasses.replace(base, **fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if isinstance(base, dict):
        _same_keys(set(base), values, where)
        return {key: overlay(base[key], values[key], f"{where}.{key}") for key in base}
    if type(base) is type(values):
        return values
    raise ValueError(_unlike(where, values, f"{type(base).__name__} ({shown(base)})"))


def _field_value(base: Any, name: str, value: Any, where: str) -> Any:
    """A field's value in JSON as the field holds it; its declared type decides, if it has any."""
    current, rule = getattr(base, name), rules(type(base))[name]
    if dataclasses.is_dataclass(current) or isinstance(current, dict) or rule.kind is None:
        return overlay(current, value, where)
    value = as_tuples(value)
    if not rule.accepts(value):
        raise ValueError(_unlike(where, value, rule.needed))
    return rule.normal(value)


def _unlike(where: str, value: Any, expected: str) -> str:
    return f"{where} is {shown(value)} in the checkpoint, but this package expects {expected}"


def _same_keys(names: set[str], values: Any, where: str) -> None:
    if not isinstance(values, dict) or set(values) != names:
        actual = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(
            f"{where} has the fields {actual} in the checkpoint, but this package expects "
            f"{sorted(names)}; use the package version that wrote it"
        )


@dataclass(frozen=True)
class DatasetModel:
    """The model that a data folder is for: its `--model-provider` and the fields of `--set`."""

    model_provider: str
    config_fields: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes the folder's about.json."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (folder / ABOUT).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> DatasetModel | None:
        """The model in the folder's about.json; None where it names none.

        ValueError for a model outside the registry: data from elsewhere must not choose which code
        is imported.
        """
        file = folder / ABOUT
        if not file.is_file():
            return None
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            if "model_provider" not in about:
                return None
            name, fields = str(about["model_provider"]), tuple(map(str, about["config_fields"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{file}: damaged ({error!r})") from None
        if name not in MODEL_PROVIDERS:
            raise ValueError(
                f"{file}: these data are for {name}, which is no model of this package; if you "
                f"trust it, add --model-provider {name}"
            )
        return cls(name, fields)
