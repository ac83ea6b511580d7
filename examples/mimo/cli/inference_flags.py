"""Flags of avlm_inference.py, and which of them go together."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.mimo.cli.command import Parser, at_least

if TYPE_CHECKING:
    from examples.mimo.configs.schema import MimoConfig
    from examples.mimo.generation.sampling import Options


def inference_parser() -> argparse.ArgumentParser:
    """The flags that every checkpoint has; `add_modality_flags` adds those of its modalities."""
    parser = Parser(
        prog="avlm_inference.py",
        allow_abbrev=False,
        description="Answer a prompt about pictures and recordings.",
        epilog="Each modality of the checkpoint has a flag for its files, --NAME-path: "
        "--image-path FILE and --audio-path FILE for the models of this package. Repeat it for "
        "several files; in the prompt, <image> and <audio> say where they go (else in front). "
        "--audio-overflow truncate cuts a recording that is too long.",
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
    add("--repetition-penalty", type=float, default=1.0, metavar="F", help="on earlier tokens")
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
    """Add --NAME-path, and a flag for each encoder field that may change when answering."""
    for modality in config.modalities.values():
        flag = _flag(modality.singular)
        parser.add_argument(f"{flag}-path", type=Path, action="append", default=[], metavar="FILE")
        for field in _changeable_fields(modality.encoder):
            parser.add_argument(
                flag + _flag(field.name).removeprefix("-"), choices=field.metadata["choices"]
            )


def with_modality_flags(config: MimoConfig, args: argparse.Namespace) -> MimoConfig:
    """The config with the encoder fields that flags change."""
    modalities = {}
    for name, modality in config.modalities.items():
        changes = {}
        for field in _changeable_fields(modality.encoder):
            value = getattr(args, f"{modality.singular}_{field.name}")
            if value is not None:
                changes[field.name] = value
        encoder: Any = modality.encoder
        encoder = dataclasses.replace(encoder, **changes)
        modalities[name] = dataclasses.replace(modality, encoder=encoder)
    return dataclasses.replace(config, modalities=modalities)


def media_paths(config: MimoConfig, args: argparse.Namespace) -> dict[str, list[Path]]:
    """The files that the flags name, by modality."""
    return {n: getattr(args, f"{m.singular}_path") for n, m in config.modalities.items()}


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
    others = [f"{_flag(config.modalities[name].singular)}-path" for name in paths if paths[name]]
    others += [f"--{name}" for name in ("prompt", "json", "stream") if getattr(args, name)]
    if mode and others:
        raise ValueError(f"{others[0]} does not go with {mode}")
    if args.input and args.interactive:
        raise ValueError("--input does not go with --interactive")
    if args.stream and (args.json or args.samples > 1):
        raise ValueError("--stream shows the text of one answer; leave out --json and --samples")
    if args.logprobs and not (args.json or args.input):
        raise ValueError("--logprobs needs --json or --input")
    prompt = config.prompt if args.prompt is None else args.prompt
    if not mode and not prompt.strip() and not any(paths.values()):
        raise ValueError("nothing to answer: give --prompt or a file")
    return prompt


def options_from_flags(args: argparse.Namespace) -> Options:
    """The sampling options; ValueError that names the flag."""
    # Imports torch, which --help does without.
    from examples.mimo.generation.sampling import Options, Sampling

    try:
        fields = (field.name for field in dataclasses.fields(Sampling))
        sampling = Sampling(**{name: getattr(args, name) for name in fields})
        return Options(
            args.max_new_tokens, sampling, tuple(args.stop), args.logprobs, args.logprobs
        )
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from None
