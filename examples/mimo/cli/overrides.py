"""Flags that change a model's config, and the flags of avlm_inference.py.

In training, `--set`, released sizes and token ids change it; in answering, flags of each modality.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.mimo.cli.command import Parser, at_least
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.modalities.values import field_type

if TYPE_CHECKING:
    from examples.mimo.checkpoint.description import Checkpoint
    from examples.mimo.generation.sampling import Options

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

# Encoder sizes of the released Whispers (arXiv:2212.04356, table 1).
WHISPER_FIELDS = ("num_layers", "hidden_size", "num_attention_heads", "num_mel_bins")
WHISPER_SIZES = {
    "tiny": (4, 384, 6, 80),
    "base": (6, 512, 8, 80),
    "small": (12, 768, 12, 80),
    "medium": (24, 1024, 16, 80),
    "large": (32, 1280, 20, 80),
    "large-v3": (32, 1280, 20, 128),
}


@dataclass(frozen=True)
class Assignment:
    """`text` for the field that `path` leads to; `source` is what the user typed, for messages."""

    path: tuple[str, ...]
    text: str
    source: str


def with_fields(config: MimoConfig, assignments: Iterable[str]) -> MimoConfig:
    """`config` with fields of its modalities changed: `images.encoder.num_layers=2`.

    Values are of the field's declared type: numbers, text, true or false, `none` where a field is
    optional, and tuples as lists with commas. ValueError, one line, for anything else.
    """
    by_modality: dict[str, list[Assignment]] = {}
    for source in assignments:
        path, equals, text = source.partition("=")
        name, *fields = path.split(".")
        if not equals or not fields or name not in config.modalities:
            raise ValueError(
                f"--set {source}: write MODALITY.FIELD=VALUE, with a modality of "
                f"{', '.join(config.modalities)}"
            )
        by_modality.setdefault(name, []).append(Assignment(tuple(fields), text, source))
    changed = {
        name: _with_assignments(config.modalities[name], group)
        for name, group in by_modality.items()
    }
    return dataclasses.replace(config, modalities={**config.modalities, **changed})


def with_token_ids(config: MimoConfig, assignments: Iterable[str]) -> MimoConfig:
    """`config` with other ids for placeholders: `<audio>,32002`."""
    modalities = dict(config.modalities)
    names = {modality.placeholder: name for name, modality in config.inputs.items()}
    for assignment in assignments:
        placeholder, _, number = assignment.rpartition(",")
        if placeholder not in names or not number.isdigit():
            raise ValueError(
                f"--hf-assign-unused-tokens {assignment}: write PLACEHOLDER,ID with a placeholder "
                f"of {', '.join(names)}"
            )
        name = names[placeholder]
        modalities[name] = dataclasses.replace(modalities[name], token_id=int(number))
    return dataclasses.replace(config, modalities=modalities)


def with_preprocessing(
    config: MimoConfig, checkpoint: Checkpoint, assignments: Iterable[str]
) -> MimoConfig:
    """`config` with encoder inputs made as they were for weights that came from Hugging Face.

    Only what a preprocessor_config.json said is taken over, and no field that `assignments` set.
    """
    from examples.mimo.checkpoint.description import weight_fields
    from examples.mimo.hf.weights import family_of, unchosen

    chosen = {assignment.partition("=")[0] for assignment in assignments}
    modalities = dict(config.modalities)
    for name, modality in config.inputs.items():
        part = f"{name}.encoder"
        source = checkpoint.sources.get(part, {})
        if name not in checkpoint.config.inputs or "preprocessor" not in source:
            continue
        imported: Any = checkpoint.config.inputs[name].encoder
        # Another encoder is refused elsewhere, with the fields that differ.
        if weight_fields(imported) == weight_fields(modality.encoder):
            where = f"{checkpoint.folder}: preprocessor of {part}"
            reader = family_of(source["model_type"], imported, where).preprocessor
            fields = reader.fields(source["preprocessor"], imported, where, part) if reader else {}
            changes = {field: getattr(imported, field) for field in unchosen(fields, part, chosen)}
            encoder: Any = modality.encoder
            encoder = dataclasses.replace(encoder, **changes)
            modalities[name] = dataclasses.replace(modalities[name], encoder=encoder)
    return dataclasses.replace(config, modalities=modalities)


def whisper_assignments(config: MimoConfig, name: str | None) -> list[str]:
    """Assignments that give the Whisper encoders of `config` the sizes of a released model."""
    from examples.mimo.modalities.audio import WhisperConfig

    if name is None:
        return []
    size = name.removeprefix("openai/").removeprefix("whisper-").removesuffix(".en")
    if size not in WHISPER_SIZES:
        known = ", ".join(f"openai/whisper-{size}" for size in WHISPER_SIZES)
        raise ValueError(f"--audio-encoder-model {name}: choose one of {known}")
    encoders = [n for n, m in config.inputs.items() if isinstance(m.encoder, WhisperConfig)]
    if not encoders:
        raise ValueError(f"--audio-encoder-model {name}: {config.name} has no Whisper encoder")
    fields = dict(zip(WHISPER_FIELDS, WHISPER_SIZES[size], strict=True))
    fields["ffn_hidden_size"] = 4 * fields["hidden_size"]
    return [
        f"{encoder}.encoder.{field}={value}"
        for encoder in encoders
        for field, value in fields.items()
    ]


def _with_assignments(value: Any, assignments: Sequence[Assignment]) -> Any:
    """The dataclass `value` with all assignments made at once, since fields may need each other."""
    fields = {field.name: field for field in dataclasses.fields(value)}
    by_field: dict[str, list[Assignment]] = {}
    for assignment in assignments:
        name = assignment.path[0]
        if name not in fields:
            raise ValueError(
                f"--set {assignment.source}: no field {name!r}; choose one of {', '.join(fields)}"
            )
        by_field.setdefault(name, []).append(assignment)
    changes = {}
    for name, group in by_field.items():
        current, last = getattr(value, name), group[-1]
        if dataclasses.is_dataclass(current):
            whole = next((item for item in group if len(item.path) == 1), None)
            if whole:
                inner = ", ".join(f.name for f in dataclasses.fields(current))
                raise ValueError(
                    f"--set {whole.source}: {name} holds fields; set one of {name}.({inner})"
                )
            below = [dataclasses.replace(item, path=item.path[1:]) for item in group]
            changes[name] = _with_assignments(current, below)
            continue
        deeper = next((item for item in group if len(item.path) > 1), None)
        if deeper:
            raise ValueError(f"--set {deeper.source}: {name} is a value and holds no fields")
        choices = fields[name].metadata.get("choices")
        kind = field_type(type(value), name) or type(current)
        changes[name] = _parse(kind, last, choices)
    try:
        return dataclasses.replace(value, **changes)
    except ValueError as error:
        sources = " ".join(assignment.source for assignment in assignments)
        raise ValueError(f"--set {sources}: {error}") from None


def _parse(kind: Any, assignment: Assignment, choices: Sequence[Any] | None) -> Any:
    try:
        value = parse_value(kind, assignment.text)
    except (ValueError, TypeError):
        raise ValueError(
            f"--set {assignment.source}: {assignment.text!r} is not of type {_type_name(kind)}"
        ) from None
    if choices is not None and value not in choices:
        raise ValueError(f"--set {assignment.source}: choose one of {', '.join(map(str, choices))}")
    return value


def parse_value(kind: Any, text: str) -> Any:
    """`text` as a value of the type `kind`; ValueError when it is none."""
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(text)
        return BOOLEANS[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        values = {str(value): value for value in arguments}
        return values[text] if text in values else _refuse(text)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(arguments, text)
    if origin is tuple:
        words = text.split(",") if text else []
        kinds = [arguments[0]] * len(words) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(parse_value(k, word) for k, word in zip(kinds, words, strict=True))
    return _refuse(text)


def _parse_union(kinds: Sequence[Any], text: str) -> Any:
    if type(None) in kinds and text.lower() == "none":
        return None
    for kind in kinds:
        if kind is not type(None):
            try:
                return parse_value(kind, text)
            except ValueError:
                continue
    return _refuse(text)


def _refuse(text: str) -> typing.NoReturn:
    raise ValueError(text)


def _type_name(kind: Any) -> str:
    if kind is bool:
        return "bool (true or false)"
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def inference_parser() -> argparse.ArgumentParser:
    """The flags that every checkpoint has; `add_modality_flags` adds those of its modalities."""
    parser = Parser(
        prog="avlm_inference.py",
        allow_abbrev=False,
        description="Answer a prompt about pictures and recordings.",
        epilog="Each modality of the checkpoint has a flag for its files, --NAME-path: "
        "--image-path FILE and --audio-path FILE for the models of this package. Repeat it for "
        "several files; in the prompt, <image> and <audio> say where they go (else in front). "
        "--audio-overflow truncate cuts a recording that is too long. What else "
        "than text it puts out has a flag too, --NAME-out FILE, and is written there.",
    )
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="what train.py --save wrote")
    add("--prompt", help="default: the prompt in the model's config")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    add("--tp", type=at_least(1), default=1, help="tensor-parallel size, under torchrun")
    add("--pp", type=at_least(1), default=1, help="pipeline stages, under torchrun")
    add_integrity_flag(parser)
    add("--cuda-graphs", action="store_true", help="one launch per token instead of hundreds")
    add = parser.add_argument_group("input and output").add_argument
    add("--json", action="store_true", help="print a JSON object for each answer")
    add("--logprobs", action="store_true", help="log-probabilities of prompt and answer in it")
    add("--stream", action="store_true", help="print the answer as it is generated")
    add("--interactive", action="store_true", help="a conversation: lines of stdin are turns")
    add("--input", type=Path, metavar="FILE", help="questions, a JSON object a line")
    add("--output", type=Path, metavar="FILE", help="their answers; an interrupted file resumes")
    add("--batch-size", type=int, default=16, metavar="N", help="answers at once, default 16")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-k", type=int, default=0, metavar="N", help="only the N most likely tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="the fewest with probability P")
    add("--min-p", type=float, default=0.0, metavar="P", help="with P of the largest probability")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="F",
        help="on tokens that came before",
    )
    add("--frequency-penalty", type=float, default=0.0, metavar="F", help="per use in the answer")
    add("--presence-penalty", type=float, default=0.0, metavar="F", help="once, if in the answer")
    add("--seed", type=int, default=0, help="the same seed gives the same answer, at any layout")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable")
    add("--samples", type=int, default=1, metavar="N", help="N answers to each prompt")
    return parser


def add_integrity_flag(parser: argparse.ArgumentParser, flag: str = "--ckpt") -> None:
    """Add --no-verify-integrity, for a command that loads the checkpoint that `flag` names."""
    parser.add_argument(
        "--no-verify-integrity",
        dest="verify_integrity",
        action="store_false",
        help=f"load {flag} without comparing its files with the SHA-256 of what was saved",
    )


def add_modality_flags(parser: argparse.ArgumentParser, config: MimoConfig) -> None:
    """Add --NAME-path, --NAME-out, and one for each encoder field that may change in answering."""
    for modality in config.inputs.values():
        flag = _flag(modality.singular)
        parser.add_argument(f"{flag}-path", type=Path, action="append", default=[], metavar="FILE")
        for field in _changeable_fields(modality.encoder):
            parser.add_argument(
                flag + _flag(field.name).removeprefix("-"), choices=field.metadata["choices"]
            )
    for output in config.outputs.values():
        parser.add_argument(f"{_flag(output.singular)}-out", type=Path, metavar="FILE")


def parse_with_modalities(
    parser: argparse.ArgumentParser, config: MimoConfig
) -> argparse.Namespace:
    """The command line, with the flags of this model's modalities."""
    add_modality_flags(parser, config)
    for word in parser.parse_known_args()[1]:
        if re.fullmatch(r"--[\w-]+-out(=.*)?", word):
            known = ", ".join(["text", *config.outputs])
            raise ValueError(f"{word.split('=')[0]}: {config.name} puts out {known}")
    return parser.parse_args()


def with_modality_flags(config: MimoConfig, args: argparse.Namespace) -> MimoConfig:
    """The config with the encoder fields that flags change."""
    modalities = dict(config.modalities)
    for name, modality in config.inputs.items():
        changes = {}
        for field in _changeable_fields(modality.encoder):
            value = getattr(args, f"{modality.singular}_{field.name}")
            if value is not None:
                changes[field.name] = value
        encoder: Any = modality.encoder
        encoder = dataclasses.replace(encoder, **changes)
        modalities[name] = dataclasses.replace(modalities[name], encoder=encoder)
    return dataclasses.replace(config, modalities=modalities)


def media_paths(config: MimoConfig, args: argparse.Namespace) -> dict[str, list[Path]]:
    """The files that the flags name, by modality."""
    return {n: getattr(args, f"{m.singular}_path") for n, m in config.inputs.items()}


def output_paths(config: MimoConfig, args: argparse.Namespace) -> dict[str, Path]:
    """Where the flags want outputs, by modality."""
    paths = {name: getattr(args, f"{o.singular}_out") for name, o in config.outputs.items()}
    return {name: path for name, path in paths.items() if path is not None}


def check_output_paths(config: MimoConfig, args: argparse.Namespace) -> None:
    """ValueError, one line, where an output could not be written once there is an answer."""
    from examples.mimo.data.turns import errors_named

    paths = output_paths(config, args)
    for name, path in paths.items():
        flag = f"{_flag(config.outputs[name].singular)}-out"
        if args.input:
            raise ValueError(f"{flag} does not go with --input: files go to {args.output}.files")
        if args.interactive:
            if not path.is_dir():
                raise ValueError(f"{flag} {path}: no such folder, which --interactive needs")
        elif path.is_dir():
            raise ValueError(f"{flag} {path}: this is a folder; name a file")
        elif not path.absolute().parent.is_dir():
            raise ValueError(f"{flag} {path}: its folder does not exist")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise ValueError(f"{flag} {path}: it cannot be written; name another place")
        if list(paths.values()).count(path) > 1 and not args.interactive:
            raise ValueError(f"{flag} {path}: another flag names this file too")
        # The smallest output there is shows whether the codec can write such a file.
        codec = config.outputs[name].codec
        with tempfile.TemporaryDirectory() as folder:
            file = path.name if not args.interactive else f"output{(codec.suffixes or ('',))[0]}"
            trial = Path(folder) / file
            with errors_named(f"{flag} {path}", drop=f"{trial}: "):
                codes = [config.outputs[name].allowed(n).start for n in range(codec.unit)]
                codec.save(codec.decode(codes), trial)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _changeable_fields(encoder: Any) -> list[dataclasses.Field]:
    """Fields with a few values to choose from, on which no weight depends."""
    return [
        field
        for field in dataclasses.fields(encoder)
        if "choices" in field.metadata and not field.metadata.get("shapes_weights", True)
    ]


def check_flags(args: argparse.Namespace, config: MimoConfig) -> str:
    """Return the prompt; ValueError for flags that do not go together."""
    if args.samples < 1 or args.batch_size < 1:
        raise ValueError(f"--samples {args.samples} --batch-size {args.batch_size}: at least 1")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(f"--samples {args.samples} are all alike without --temperature")
    if bool(args.input) != bool(args.output):
        raise ValueError("--input and --output go together: questions and answers, as JSON lines")
    mode = "--input" if args.input else "--interactive" if args.interactive else ""
    paths = media_paths(config, args)
    others = [f"{_flag(config.inputs[name].singular)}-path" for name in paths if paths[name]]
    others += [f"--{name}" for name in ("prompt", "json", "stream") if getattr(args, name)]
    if mode and others:
        raise ValueError(f"{others[0]} does not go with {mode}")
    if args.input and args.interactive:
        raise ValueError("--input does not go with --interactive")
    if args.stream and (args.json or args.samples > 1):
        raise ValueError("--stream shows the text of one answer; leave out --json and --samples")
    if args.logprobs and not (args.json or args.input):
        raise ValueError("--logprobs needs --json or --input")
    check_output_paths(config, args)
    prompt = config.prompt if args.prompt is None else args.prompt
    if not mode and not prompt.strip() and not any(paths.values()):
        raise ValueError("nothing to answer: give --prompt or a file")
    return prompt


def options_from_flags(args: argparse.Namespace, config: MimoConfig) -> Options:
    """How to answer; ValueError that names the flag.

    An answer to --prompt holds the outputs that a file is named for, others all that there are.
    """
    # Imports torch, which --help does without.
    from examples.mimo.generation.sampling import Options, Sampling

    try:
        fields = (field.name for field in dataclasses.fields(Sampling))
        sampling = Sampling(**{name: getattr(args, name) for name in fields})
        is_single = not (args.input or args.interactive)
        return Options(
            args.max_new_tokens,
            sampling,
            tuple(args.stop),
            args.logprobs,
            args.logprobs,
            outputs=tuple(output_paths(config, args)) if is_single else None,
        )
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from None
