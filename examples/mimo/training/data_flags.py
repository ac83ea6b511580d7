"""What the flags about data say of one another."""

from __future__ import annotations

import argparse

from examples.mimo.training.flags import SHARDED


def complete_data_flags(args: argparse.Namespace) -> None:
    """Fill in what was not given; ValueError for flags that contradict or would do nothing."""
    sharded = args.dataset_provider in SHARDED
    args.valid_split = args.valid_split or ("val" if sharded else "heldout")
    if args.total_seq_length and not args.packing_buffer_size:
        raise ValueError("--total-seq-length would do nothing without --packing-buffer-size")
    args.total_seq_length = args.total_seq_length or args.seq_length
    if sharded and args.save:
        args.dataloader_save = args.save
    if args.packing_buffer_size is None:
        return
    if not sharded:
        raise ValueError("--packing-buffer-size packs what --dataset-provider energon reads")
    if args.packing_buffer_size < 1:
        raise ValueError(f"--packing-buffer-size {args.packing_buffer_size}: at least 1")
    if args.micro_batch_size != 1:
        raise ValueError(
            f"--micro-batch-size {args.micro_batch_size} with --packing-buffer-size: a micro-batch "
            "is one packed row; leave it at 1 and choose --total-seq-length"
        )
    args.pack_sequences = True
