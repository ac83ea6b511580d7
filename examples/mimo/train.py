"""torchrun --nproc-per-node 2 examples/mimo/train.py --tensor-model-parallel-size 2

Trains a model that sees and hears, through `megatron.training.pretrain`. Every Megatron flag
works; `--help` lists the package's own.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from pathlib import Path

from examples.mimo.cli import command
from examples.mimo.cli.flags import help_parser


def main() -> None:
    """Parse, check, train."""
    argv = sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        help_parser().print_help()
        return
    command.prepare_environment()
    command.alone_unless_launched()
    from examples.mimo import compat

    compat.install()
    if "--help-megatron" in argv:
        _print_megatron_help()
        return
    if any(word.split("=")[0] == "--dry-run" for word in argv):
        _print_plan(argv)
        return
    if "--show-megatron-output" in argv:
        train(argv)
        return
    with command.stdout_to(os.devnull):
        train(argv)


def train(argv: list[str]) -> None:
    """One run of `pretrain()` with the package's providers."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import set_global_variables

    from examples.mimo.checkpoint.description import FILE_NAME, open_checkpoint, save_description
    from examples.mimo.checkpoint.resuming import schedule_mismatch
    from examples.mimo.cli import observer
    from examples.mimo.cli.arguments import parse_arguments
    from examples.mimo.cli.inputs import check_inputs
    from examples.mimo.compat import megatron
    from examples.mimo.training.providers import (
        data_provider,
        model_provider,
        prepare_noncolocated,
        starting_point,
        tokenizer_path,
    )
    from examples.mimo.training.step import forward_step

    args, config = parse_arguments(argv)
    if not args.show_megatron_output:
        # Importing Megatron set it lower.
        logging.getLogger().setLevel(logging.WARNING)
    check_inputs(args, config)
    set_global_variables(args)
    if args.save and args.rank == 0:
        start = starting_point(args)
        known = start is not None and (start / FILE_NAME).is_file()
        sources = open_checkpoint(start).sources if start and known else {}
        save_description(Path(args.save), config, tokenizer_path(args), sources)
    if args.save:
        megatron.install_results_queue()
    megatron.install_adam()
    observer.install_progress(config)
    observer.follow(args)
    command.report_every_rank()
    try:
        own = prepare_noncolocated(args)
        pretrain(
            pretrain_cfg_container_from_args(args),
            functools.partial(data_provider, config),
            ModelType.encoder_or_decoder,
            functools.partial(forward_step, observer),
            functools.partial(model_provider, config, own.grids),
            p2p_communicator=own.bridges,
            pg_collection=own.groups,
        )
    except ImportError as error:
        raise ValueError(f"Megatron needs a package for these flags: {error}") from None
    except RuntimeError as error:
        lost = observer.lost_rank(error)
        if lost is None:
            raise
        raise ValueError(lost) from None
    except AssertionError as error:
        mismatch = schedule_mismatch(error)
        if mismatch is None:
            raise
        raise ValueError(f"--load {args.load}: {mismatch}") from None


def _print_plan(argv: list[str]) -> None:
    from examples.mimo.planner.dry_run import plan

    with command.stdout_to(os.devnull):
        report = plan(argv)
    print(report)


def _print_megatron_help() -> None:
    import argparse

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


if __name__ == "__main__":
    command.run("train.py", main)
