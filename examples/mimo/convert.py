"""python examples/mimo/convert.py from-hf --model-provider NAME --language-model DIR --save DIR

Hugging Face folders to a distributed checkpoint, and `to-hf` back.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from examples.mimo.cli import command
from examples.mimo.cli.overrides import add_integrity_flag

if TYPE_CHECKING:
    from examples.mimo.configs.schema import MimoConfig
    from examples.mimo.hf.io import Folder


def main() -> None:
    """Parse the command line, convert, and print a summary."""
    parser = _parser()
    args, rest = parser.parse_known_args()
    if args.command == "to-hf" and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    command.prepare_environment(uses_gpus=False)  # files go in, and files come out
    command.single_process_unless_launched()
    from examples.mimo import compat

    compat.install()
    with command.stdout_to(os.devnull):
        convert_from_hf(args, rest) if args.command == "from-hf" else convert_to_hf(args)


def convert_from_hf(args: argparse.Namespace, rest: list[str]) -> None:
    """Write a checkpoint; `rest` are the flags that the model's modalities add."""
    from examples.mimo.cli.overrides import with_fields
    from examples.mimo.configs import check_codecs, get_model_config, with_codec_folder
    from examples.mimo.hf.from_hf import from_hf, initialize_single_process
    from examples.mimo.hf.io import Folder

    config = with_fields(get_model_config(args.model_provider), args.set)
    folders: dict[str, Folder] = {}
    if args.folders:
        folders = _folders_of_parts(config, args.folders)
    if codecs := args.codecs or args.folders:
        config = with_codec_folder(config, codecs)
        if args.codecs:
            check_codecs(config)
    if args.llava:
        modality = _llava_modality(config)
        parts = ("language", f"{modality}.encoder", f"{modality}.projector")
        folders |= dict.fromkeys(parts, Folder(args.llava))
    if args.language_model:
        folders["language"] = Folder(args.language_model)
    parser = command.Parser(prog="convert.py from-hf", allow_abbrev=False)
    for name in config.inputs:
        parser.add_argument(f"--{name}", type=Path, dest=f"{name}.encoder")
        parser.add_argument(f"--{name}-projector", type=Path, dest=f"{name}.projector")
    paths = vars(parser.parse_args(rest))
    folders |= {part: Folder(path) for part, path in paths.items() if path}
    if not folders:
        raise ValueError(
            "nothing to convert: name --language-model, a modality, --llava or --folders"
        )
    initialize_single_process(args.seed)
    # What a user sets outlasts what a folder's preprocessor_config.json says.
    chosen = [assignment.partition("=")[0] for assignment in args.set]
    from_hf(config, folders, args.save, _say, chosen)


def _folders_of_parts(config: MimoConfig, root: Path) -> dict[str, Folder]:
    """The folders that to-hf wrote into `root`, by part; ValueError for one of another model."""
    from examples.mimo.hf.io import CONFIG, Folder
    from examples.mimo.model.parts import part_names

    if not root.is_dir():
        raise ValueError(f"--folders {root}: no such folder")
    names = sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))
    parts = part_names(config)
    for name in names:
        if name not in parts:
            raise ValueError(
                f"--folders {root}: {config.name} has no part {name}; it has {', '.join(parts)}"
            )
    if not names:
        raise ValueError(
            f"--folders {root}: no folder of a part in it; to-hf names them {', '.join(parts)}"
        )
    return {name: Folder(root / name) for name in names}


def _llava_modality(config: MimoConfig) -> str:
    """The modality whose encoder takes LLaVA's vision tower."""
    from examples.mimo.hf.from_hf import modalities_that_take

    names = modalities_that_take("llava", config)
    if len(names) != 1:
        raise ValueError(
            f"--llava: {config.name} has {len(names)} modalities whose encoder takes LLaVA's "
            f"vision tower{f' ({", ".join(names)})' if names else ''}, and one is needed"
        )
    return names[0]


def convert_to_hf(args: argparse.Namespace) -> None:
    """Write a folder for each part."""
    from examples.mimo.checkpoint.description import open_checkpoint
    from examples.mimo.hf.to_hf import to_hf

    to_hf(open_checkpoint(args.load, "--load", args.verify_integrity), args.save, _say)


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="convert.py", allow_abbrev=False, description=__doc__)
    directions = parser.add_subparsers(dest="command", required=True)
    from_hf = directions.add_parser(
        "from-hf",
        allow_abbrev=False,
        help="Hugging Face folders to a distributed checkpoint",
        description="Each modality of the model has a flag for its encoder's folder and one for "
        "its projector's, such as --images DIR and --images-projector DIR. Parts without a folder "
        "start with random weights.",
    )
    from_hf.add_argument(
        "--model-provider",
        required=True,
        metavar="NAME",
        help="what the model is, as in train.py",
    )
    from_hf.add_argument("--language-model", type=Path, metavar="DIR")
    from_hf.add_argument(
        "--llava",
        type=Path,
        metavar="DIR",
        help="a whole LLaVA-1.5: language model, vision encoder and projector",
    )
    from_hf.add_argument(
        "--folders",
        type=Path,
        metavar="DIR",
        help="what to-hf wrote: PART folders; flags for single parts take precedence",
    )
    from_hf.add_argument(
        "--codecs",
        type=Path,
        metavar="DIR",
        help="a folder with codecs/MODALITY for the model's outputs: a data folder, a checkpoint, "
        "or what to-hf wrote (default: --folders); else training takes those of its data",
    )
    from_hf.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="as in train.py"
    )
    from_hf.add_argument(
        "--seed", type=command.at_least(1), default=1234, help="of parts with random weights"
    )
    from_hf.add_argument("--save", type=Path, required=True, metavar="DIR")
    to_hf = directions.add_parser(
        "to-hf",
        allow_abbrev=False,
        help="a distributed checkpoint to a folder for each part",
        description="Parts that have a Hugging Face family are written as transformers loads "
        "them, every other part as plain safetensors under this package's own names.",
    )
    to_hf.add_argument("--load", type=Path, required=True, metavar="DIR")
    add_integrity_flag(to_hf, "--load")
    to_hf.add_argument("--save", type=Path, required=True, metavar="DIR")
    return parser


if __name__ == "__main__":
    command.run("convert.py", main)
