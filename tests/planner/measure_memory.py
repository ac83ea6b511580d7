"""Run by test_dry_run.py on every rank: measure_memory.py FOLDER [flags of train.py].

Writes to FOLDER/RANK.json, in bytes, what a dry run predicts for each rank and what the rank holds
after two iterations.
"""

import json
import os
import sys
from pathlib import Path

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment()
compat.install()

import torch
from megatron.training import training as megatron_training

from examples.mimo.cli.arguments import balance_stages, parse_arguments
from examples.mimo.planner.dry_run import group_memory
from examples.mimo.train import train
from examples.mimo.training.layout import rank_groups, run_shape
from examples.mimo.training.pretrain import transformer_config

built = {}
setup = megatron_training.setup_model_and_optimizer


def remember(*positional, **named):
    model, optimizer, scheduler = setup(*positional, **named)
    built.update(model=model, optimizer=optimizer)
    return model, optimizer, scheduler


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def optimizer_bytes(model_parameters):
    """Adam's moments, and the parameters in 32 bits that it keeps beside the model's."""
    total = 0
    # A non-colocated module's optimizer is inside another.
    held = getattr(built["optimizer"], "own", built["optimizer"])
    for optimizer in held.chained_optimizers:
        adam = optimizer.optimizer
        moments = [t for state in adam.state.values() for t in state.values()]
        total += size(t for t in moments if torch.is_tensor(t) and t.numel() > 1)
        mine = [p for group in adam.param_groups for p in group["params"]]
        theirs = {p.untyped_storage().data_ptr() for p in model_parameters}
        total += size(p for p in mine if p.untyped_storage().data_ptr() not in theirs)
    return total


def predicted(flags):
    """What a dry run says about this rank's stage."""
    args, config = parse_arguments(flags)
    balance_stages(args, config)
    args.perform_initialization = False
    group = next(group for group in rank_groups(args) if args.rank in group.ranks)
    return group_memory(config, run_shape(args), transformer_config(args), group)


def measured():
    """What this rank holds after training."""
    parameters = [p for chunk in built["model"] for p in chunk.parameters()]
    buffers = [buffer for chunk in built["model"] for buffer in chunk.buffers]
    return {
        "parameters": size(parameters),
        "gradients": size(buffer.grad_data for buffer in buffers),
        "optimizer": optimizer_bytes(parameters),
    }


folder, flags = Path(sys.argv[1]), sys.argv[2:]
megatron_training.setup_model_and_optimizer = remember
with command.stdout_to(os.devnull):
    plan = predicted(flags)
    train(flags)
held = measured()
pairs = {name: [getattr(plan, name), count] for name, count in held.items()}
(folder / f"{os.environ['RANK']}.json").write_text(json.dumps(pairs))
command.leave_process_group()
