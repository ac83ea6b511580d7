"""python examples/mimo/avlm_inference.py --ckpt DIR --image-path FILE --audio-path FILE

Answers a prompt about a picture and a recording. All else it needs is in the checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from examples.mimo import command

if TYPE_CHECKING:
    from examples.mimo.configs.schema import MimoConfig


def main() -> None:
    """Parse, load, answer."""
    parser = _parser()
    args, rest = parser.parse_known_args()
    command.prepare_environment()
    command.alone_unless_launched()
    from examples.mimo import host

    host.install()
    with command.stdout_to(os.devnull):
        line = answer(args, rest, parser)
    if int(os.environ["RANK"]) == 0:
        print(line)


def answer(args: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> str:
    """The answer as text, or as a JSON object with `--json`."""
    from examples.mimo.checkpoint.description import open_checkpoint
    from examples.mimo.inference.answerer import Answerer, Request
    from examples.mimo.inference.running import Options

    checkpoint = open_checkpoint(args.ckpt)
    files, config = _media_flags(checkpoint.config, rest, parser)
    prompt = checkpoint.config.prompt if args.prompt is None else args.prompt
    if not prompt.strip() and not any(files.values()):
        raise ValueError("nothing to answer: give --prompt or a file")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: at least 1")
    answerer = Answerer(dataclasses.replace(checkpoint, config=config), args.tp, args.pp)
    sample = answerer.read(Request(prompt, files))
    (answer,) = answerer.answer([sample], Options(args.max_new_tokens))
    if not args.json:
        return answer.text
    names = {name: [str(f) for f in given] for name, given in files.items()}
    found = {"prompt": prompt, **names, "answer": answer.text, "tokens": answer.tokens}
    return json.dumps(found, ensure_ascii=False)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="avlm_inference.py",
        allow_abbrev=False,
        description="Answer a prompt about pictures and recordings.",
        epilog="Each modality of the checkpoint has a flag for its files, --NOUN-path: "
        "--image-path FILE and --audio-path FILE for the models of this package. Repeat it for "
        "several files; in the prompt, <image> and <audio> say where they go (else in front). "
        "--audio-overflow truncate cuts a recording that is too long.",
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="what train.py --save wrote")
    parser.add_argument("--prompt", help="default: the prompt in the model's config")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size, under torchrun")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages, under torchrun")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _media_flags(
    config: MimoConfig, rest: list[str], parser: argparse.ArgumentParser
) -> tuple[dict[str, list[Path]], MimoConfig]:
    """The files of each modality, and the config with the overflow flags laid over it."""
    for modality in config.modalities.values():
        noun = modality.noun
        parser.add_argument(f"--{noun}-path", type=Path, action="append", default=[])
        if hasattr(modality.encoder, "overflow"):
            parser.add_argument(f"--{noun}-overflow", choices=("error", "truncate"))
    given = vars(parser.parse_args())
    modalities = {}
    for name, modality in config.modalities.items():
        overflow = given.get(f"{modality.noun}_overflow")
        if overflow:
            encoder = dataclasses.replace(modality.encoder, overflow=overflow)  # type: ignore[type-var]
            modality = dataclasses.replace(modality, encoder=encoder)
        modalities[name] = modality
    files = {name: given[f"{m.noun}_path"] for name, m in modalities.items()}
    return files, dataclasses.replace(config, modalities=modalities)


if __name__ == "__main__":
    command.run("avlm_inference.py", main)
