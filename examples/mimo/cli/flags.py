"""The package's own flags, kept apart from Megatron's so that `--help` needs no import."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from examples.mimo.cli.command import Parser, stdout_to
from examples.mimo.configs import MODEL_PROVIDERS

# Other names of energon: those of Megatron's own multimodal example.
SHARDED = ("energon", "llava_avlm", "llava_vlm", "video_llava_vlm")
DATASET_PROVIDERS = ("conversations", "spoken_questions", *SHARDED, "mock")


def add_own_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of `examples/mimo/train.py`."""
    group = parser.add_argument_group("mimo")
    group.add_argument(
        "--model-provider",
        default="tiny_avlm",
        metavar="NAME",
        help=f"what the model is: {', '.join(MODEL_PROVIDERS)}, or package.module:function "
        "(default %(default)s); its sizes become the defaults of Megatron's flags",
    )
    group.add_argument(
        "--dataset-provider",
        choices=DATASET_PROVIDERS,
        default="mock",
        help="conversations reads the samples of --data-path, and spoken_questions is another name "
        "for it; energon reads the shards of --data-path, or of a mixture of them, and llava_avlm, "
        "llava_vlm and video_llava_vlm are other names for it; mock draws random data (default)",
    )
    group.add_argument(
        "--train-split",
        default="train",
        metavar="NAME",
        help="train on --data-path/NAME.jsonl, or on this split of its shards (default train)",
    )
    group.add_argument(
        "--valid-split",
        metavar="NAME",
        help="validate on --data-path/NAME.jsonl (default heldout), or on this split of its shards "
        "(default val)",
    )
    group.add_argument(
        "--augment",
        action="store_true",
        help="vary pictures and sound a little in training, as the model's config says",
    )
    group.add_argument(
        "--pack-sequences",
        action="store_true",
        help="put the samples of a micro-batch into one row without padding; each attends to "
        "itself alone",
    )
    group.add_argument(
        "--packing-buffer-size",
        type=int,
        metavar="N",
        help="fill rows of --total-seq-length from N samples of the shards at a time, none split; "
        "a micro-batch is then one row, and batch sizes count rows",
    )
    group.add_argument(
        "--total-seq-length",
        type=int,
        metavar="TOKENS",
        help="the length of such a row (default --seq-length)",
    )
    group.add_argument(
        "--shuffle-buffer-size",
        type=int,
        default=100,
        metavar="N",
        help="draw the next sample of the shards from N (default %(default)s)",
    )
    group.add_argument(
        "--max-bad-samples",
        type=int,
        default=100,
        metavar="N",
        help="end the run when more than N samples of the shards could not be read "
        "(default %(default)s); bad_samples.jsonl in --save names them",
    )
    group.add_argument(
        "--freeze",
        nargs="*",
        metavar="PART",
        help="parts that do not train: MODALITY.encoder, MODALITY.projector, language; without a "
        "name all parts train (default: what the model's config says)",
    )
    group.add_argument(
        "--fresh",
        nargs="+",
        default=[],
        metavar="PART",
        help="parts that start with random weights while all others load strictly: a modality, or "
        "MODALITY.encoder, MODALITY.projector, language; with --pretrained-checkpoint, or --load "
        "and --finetune. So a trained model gets another modality",
    )
    group.add_argument(
        "--balance-stages",
        action="store_true",
        help="give the pipeline's stages as many layers as makes an iteration shortest, with the "
        "encoders on the first and the head on the last",
    )
    group.add_argument(
        "--encoder-ranks",
        nargs="+",
        metavar="MODALITY=RANKS",
        help="give each encoder, with its projector, ranks of its own, such as images=0 "
        "audios=1-2; the others are the language model's (default: all share all ranks)",
    )
    group.add_argument(
        "--encoder-tensor-model-parallel-size",
        nargs="+",
        metavar="N",
        help="split encoders and projectors over N ranks. On shared ranks those are N of each "
        "tensor-parallel group, whose copies of an encoder share the media out (default: as the "
        "language model). With --encoder-ranks: a number, or images=N audios=N (default 1)",
    )
    group.add_argument(
        "--encoder-data-parallel-size",
        type=int,
        metavar="N",
        help="copies of the encoders that see different media; follows from the other sizes, and "
        "is checked against them",
    )
    group.add_argument(
        "--dry-run",
        type=int,
        metavar="PROCESSES",
        help="say what this run would hold and compute on so many processes, and end; start it "
        "without torchrun",
    )
    group.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        dest="config_fields",
        help="change a field of a modality's config, such as images.encoder.num_layers=2; "
        "Megatron's flags change the language model",
    )
    group.add_argument(
        "--audio-encoder-model",
        metavar="NAME",
        help="give the audio encoder a released Whisper's sizes, such as openai/whisper-small; its "
        "weights come from convert.py",
    )
    group.add_argument(
        "--hf-assign-unused-tokens",
        nargs="+",
        default=[],
        metavar="PLACEHOLDER,ID",
        help="other token ids for placeholders, such as '<audio>,32002'",
    )
    group.add_argument(
        "--metrics-file",
        metavar="FILE",
        help="append a JSON line per iteration: loss, gradient norm, speed, sample keys",
    )
    group.add_argument(
        "--show-megatron-output",
        action="store_true",
        help="print Megatron's arguments and log lines too",
    )
    return parser


def help_parser() -> argparse.ArgumentParser:
    """A parser of the package's flags alone, for `--help`."""
    parser = Parser(
        prog="train.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a model that sees and hears, through megatron.training.pretrain.\n\n"
        "  torchrun --nproc-per-node 2 examples/mimo/train.py --tensor-model-parallel-size 2\n"
        "      --dataset-provider spoken_questions --data-path demo/data --save demo/checkpoint",
        epilog="Every Megatron flag works as well; --help-megatron lists them.",
    )
    add_own_flags(parser)
    parser.add_argument(
        "--help-megatron", action="store_true", help="list Megatron's flags (slow) and exit"
    )
    return parser


def print_without_training(argv: Sequence[str]) -> bool:
    """Answer `--help-megatron` or `--dry-run`; False when `argv` asks for a training run."""
    if "--help-megatron" in argv:
        _print_megatron_help()
        return True
    if any(argument.split("=")[0] == "--dry-run" for argument in argv):
        from examples.mimo.planner.dry_run import plan

        with stdout_to(os.devnull):
            report = plan(argv)
        print(report)
        return True
    return False


def _print_megatron_help() -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False)
    add_megatron_arguments(parser)
    for action in parser._actions:
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            # Some of Megatron's texts hold a bare per cent sign.
            action.help = str(action.help).replace("%", "%%")
    parser.print_help()
