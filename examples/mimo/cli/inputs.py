"""Refuses folders that a training run names and that are not there or not this model's."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.mimo.checkpoint.description import TRACKER, check_same_model
from examples.mimo.checkpoint.loading import check_same_optimizer, has_random_states
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.training.providers import check_data


def check_inputs(args: argparse.Namespace, config: MimoConfig) -> None:
    """ValueError for a folder that is not there, before anything is built."""
    start = args.pretrained_checkpoint
    resumes = args.load and (Path(args.load) / TRACKER).is_file()
    if args.load and not resumes and args.load != args.save and not start:
        raise ValueError(f"--load {args.load}: no checkpoint in this folder")
    if start and not resumes and not (Path(start) / TRACKER).is_file():
        raise ValueError(f"--pretrained-checkpoint {start}: no checkpoint in this folder")
    for flag in ("load", "pretrained_checkpoint", "save"):
        folder = getattr(args, flag)
        if folder:
            # A run that resumes, or saves into what is there, has all parts of the checkpoint.
            fresh = flag == "pretrained_checkpoint" or (flag == "load" and args.finetune)
            fresh_parts = args.fresh if fresh else ()
            check_same_model(f"--{flag.replace('_', '-')}", Path(folder), config, fresh_parts)
    if resumes and not args.finetune and not args.no_load_optim:
        check_same_optimizer(Path(args.load), args.use_distributed_optimizer)
    if resumes and args.encoder_ranks:
        sizes = args.encoder_tensor_model_parallel_size
        if not has_random_states(Path(args.load), sizes):
            args.no_load_rng = True
    check_data(args, config)
