"""python examples/mimo/convert.py from-hf --model-provider NAME --language-model DIR --save DIR

Hugging Face folders to a distributed checkpoint, and `to-hf` back.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from examples.mimo.cli import command
from examples.mimo.configs import MODEL_PROVIDERS


def main() -> None:
    """Parse, convert, say what was done."""
    parser = _parser()
    args, rest = parser.parse_known_args()
    if args.command == "to-hf" and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    command.prepare_environment()
    command.single_process_unless_launched()
    from examples.mimo import compat

    compat.install()
    with command.stdout_to(os.devnull):
        from_hf(args, rest) if args.command == "from-hf" else to_hf(args)


def from_hf(args: argparse.Namespace, rest: list[str]) -> None:
    """A flag for each modality of the config names the folder of its encoder."""
    from examples.mimo.configs import get_model_config
    from examples.mimo.configs.schema import MimoConfig, with_fields
    from examples.mimo.hf import convert as importing
    from examples.mimo.hf.convert import start_alone
    from examples.mimo.hf.io import Folder

    config: MimoConfig = with_fields(get_model_config(args.model_provider), args.set)
    modalities = command.Parser(prog="convert.py from-hf", allow_abbrev=False)
    for name in config.modalities:
        modalities.add_argument(f"--{name}", type=Path)
    encoders = vars(modalities.parse_args(rest))
    folders = {f"{name}.encoder": Folder(path) for name, path in encoders.items() if path}
    if args.language_model:
        folders["language"] = Folder(args.language_model)
    if args.llava:
        whole = Folder(args.llava)
        pictures = next(iter(config.modalities))
        folders |= {"language": whole, f"{pictures}.encoder": whole}
        folders[f"{pictures}.projector"] = whole
    if not folders:
        raise ValueError("nothing to convert: name --language-model, a modality or --llava")
    start_alone(args.seed)
    importing.from_hf(config, folders, args.save, _say)


def to_hf(args: argparse.Namespace) -> None:
    """A folder for each part."""
    from examples.mimo.checkpoint.description import open_checkpoint
    from examples.mimo.hf import convert as exporting

    exporting.to_hf(open_checkpoint(args.load), args.save, _say)


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="convert.py", allow_abbrev=False, description=__doc__)
    ways = parser.add_subparsers(dest="command", required=True)
    importing = ways.add_parser(
        "from-hf",
        allow_abbrev=False,
        help="Hugging Face folders to a distributed checkpoint",
        description="Each modality of the model has a flag for its encoder's folder, such as "
        "--images DIR and --audios DIR. Parts without a folder start with random weights.",
    )
    importing.add_argument("--model-provider", choices=tuple(MODEL_PROVIDERS), required=True)
    importing.add_argument("--language-model", type=Path, metavar="DIR")
    importing.add_argument(
        "--llava",
        type=Path,
        metavar="DIR",
        help="a whole LLaVA-1.5: language model, eye, projector",
    )
    importing.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="as in train.py"
    )
    importing.add_argument("--seed", type=int, default=1234, help="of parts that start fresh")
    importing.add_argument("--save", type=Path, required=True, metavar="DIR")
    exporting = ways.add_parser(
        "to-hf", allow_abbrev=False, help="a distributed checkpoint to Hugging Face folders"
    )
    exporting.add_argument("--load", type=Path, required=True, metavar="DIR")
    exporting.add_argument("--save", type=Path, required=True, metavar="DIR")
    return parser


if __name__ == "__main__":
    command.run("convert.py", main)
