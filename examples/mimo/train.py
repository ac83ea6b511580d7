"""Train a multimodal language model through `megatron.training.pretrain`.

torchrun --nproc-per-node 2 examples/mimo/train.py --tensor-model-parallel-size 2

Every Megatron flag works; `--help` lists the package's own.
"""

from __future__ import annotations

import functools
import logging
import os
import sys

from examples.mimo.cli import command
from examples.mimo.cli.flags import help_parser, is_dry_run, print_without_training


def main() -> None:
    """Prepare the process and train, or print what was asked for instead."""
    argv = sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        # Before anything is imported that takes seconds.
        help_parser().print_help()
        return
    command.prepare_environment(uses_gpus=not is_dry_run(argv))
    command.single_process_unless_launched()
    from examples.mimo import compat

    compat.install()
    if print_without_training(argv):
        return
    if "--show-megatron-output" in argv:
        train(argv)
        return
    # Megatron prints its arguments, timers and a log line of its own per iteration; the observer
    # prints this run's table to stderr.
    with command.stdout_to(os.devnull):
        train(argv)


def train(argv: list[str]) -> None:
    """One run of `pretrain()` with the package's providers, forward step and observer."""
    # Imported here: these take seconds, and the replacements of `compat` must come first.
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import set_global_variables

    from examples.mimo import compat
    from examples.mimo.cli.arguments import balance_stages, megatron_refusals, parse_arguments
    from examples.mimo.cli.observer import RunObserver
    from examples.mimo.cli.output import prepare_outputs
    from examples.mimo.model.parts import EncodersAhead
    from examples.mimo.training import inputs
    from examples.mimo.training import pretrain as providers
    from examples.mimo.training.layout import prepare_noncolocated

    # `config` says what the model is, `args` holds Megatron's flags with its sizes as defaults.
    args, config = parse_arguments(argv)
    balance_stages(args, config)
    if not args.show_megatron_output:
        # Megatron lowered the root logger's level when it was imported.
        logging.getLogger().setLevel(logging.WARNING)
    inputs.check_inputs(args, config)
    inputs.check_data(args, config)
    observer = RunObserver(args, config)
    prepare_outputs(args, config)
    with observer.explains_errors(), megatron_refusals():
        set_global_variables(args)
    if args.exit_signal_handler:
        observer.leave_signal_to_parent()
    compat.install_for_training(observer, saves_checkpoints=bool(args.save))
    if not args.exit_signal_handler:
        observer.report_sigterm()
    # So far all ranks had the same input and failed alike; from here on one may fail alone.
    command.report_every_rank()
    inputs.begin_integrity_check(args)
    ahead = EncodersAhead() if args.run_encoders_ahead else None
    with observer.explains_errors():
        noncolocated = prepare_noncolocated(
            args, providers.transformer_config(args), compat.install_for_noncolocated
        )
        # `pretrain` calls these with its own arguments only, so what is ours is bound beforehand.
        pretrain(
            pretrain_cfg_container_from_args(args),
            functools.partial(providers.data_provider, config, observer.bad_samples),
            ModelType.encoder_or_decoder,
            functools.partial(providers.forward_step, observer, ahead),
            functools.partial(providers.model_provider, config, noncolocated.grids),
            p2p_communicator=noncolocated.bridges,
            pg_collection=noncolocated.groups,
        )


if __name__ == "__main__":
    command.run("train.py", main)
