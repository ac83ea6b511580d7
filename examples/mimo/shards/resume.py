"""States of energon's loaders as plain values, so that a checkpoint is read without its classes.

A pickle can make an instance of any class; `torch.load(weights_only=True)` reads numbers, text,
lists, dicts and tensors alone.

Shards in training: which rank reads what, and how a checkpoint remembers how far it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState
from megatron.training import get_args

from examples.mimo.cli.observer import BAD_SAMPLES
from examples.mimo.data.batch import Batch
from examples.mimo.data.conversation import Sample, SampleEncoder
from examples.mimo.parallel.placement import LANGUAGE
from examples.mimo.shards.mixtures import num_samples, read_mixture
from examples.mimo.shards.read import (
    ConversationEncoder,
    Packing,
    ShardBatches,
    endless,
    training_loader,
    validation_loader,
    worker_config,
)
from examples.mimo.training.layout import cp_multiple, data_share, module_of_rank

KIND, FIELDS = "kind", "fields"
RECORDS = {
    kind.__name__: kind
    for kind in (
        SavableDataLoaderState,
        SavableDatasetCheckpoint,
        SavableDatasetState,
        SliceState,
        SystemRngState,
    )
}


def to_plain(value: Any) -> Any:
    """`value` with every instance of a class as a dict that names it."""
    if type(value).__name__ in RECORDS:
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {KIND: type(value).__name__, FIELDS: fields}
    if isinstance(value, np.ndarray):
        return {KIND: "array", FIELDS: [str(value.dtype), value.tolist()]}
    if isinstance(value, dict):
        kind = "FlexState" if isinstance(value, FlexState) else "dict"
        return {KIND: kind, FIELDS: {key: to_plain(inner) for key, inner in value.items()}}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_plain, value))
    return value


def from_plain(value: Any) -> Any:
    """What `to_plain` was given; ValueError for a kind that it does not write."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(from_plain, value))
    if not isinstance(value, dict):
        return value
    kind, fields = value[KIND], value[FIELDS]
    if kind == "array":
        return np.array(fields[1], dtype=fields[0])
    inner = {key: from_plain(field) for key, field in fields.items()}
    if kind == "dict":
        return inner
    if kind == "FlexState":
        return FlexState(**inner)
    if kind not in RECORDS:
        raise ValueError(f"a loader's state holds {kind!r}, which is none of {', '.join(RECORDS)}")
    return RECORDS[kind](**inner)


STATE_FILE = "train_dataloader_dprank{:03d}.pt"
Collate = Callable[[Sequence[Sample]], Batch]


class RememberedBatches(ShardBatches):
    """Training batches whose place Megatron saves with every checkpoint.

    Of the ranks that read the same data one saves it: the first context-parallel rank of the
    language model's first stage, where Megatron asks.
    """

    def __init__(self, loaders: Sequence[Any], sharding: dict[str, Any]) -> None:
        super().__init__(loaders)
        self.sharding = sharding

    def save_state(self) -> Any:
        """For `megatron.training.checkpointing`; None where another rank saves."""
        if module_of_rank(get_args()) not in (None, LANGUAGE) or mpu.get_context_parallel_rank():
            return None
        return {
            "sharding": self.sharding,
            "bad_samples": BAD_SAMPLES.count,
            "loaders": to_plain(super().save_state()),
        }


def shard_iterators(
    args: argparse.Namespace,
    reader: SampleEncoder,
    collate: Collate,
    collate_valid: Collate,
) -> tuple[Iterator[Batch], Iterator[Batch] | None]:
    """Training and validation batches of this data-parallel rank.

    With several data-parallel ranks to read for, a micro-batch of each is read and joined.
    """
    share = data_share(args.data_parallel_size)
    collate, collate_valid = share.of(collate), share.of(collate_valid)
    ranks = share.replicas
    path = Path(args.data_path[0])
    loaders = [
        training_loader(
            path,
            args.train_split,
            _encoder(args, reader, collate),
            worker_config(rank, args.data_parallel_size, args.num_workers, args.seed),
            args.micro_batch_size,
            args.shuffle_buffer_size,
        )
        for rank in ranks
    ]
    train = RememberedBatches(loaders, _sharding(args, path))
    _restore(args, train, ranks)
    if not args.eval_iters:
        return train, None
    samples = args.eval_iters * args.eval_global_batch_size // args.data_parallel_size
    valid = [
        validation_loader(
            path,
            args.valid_split,
            ConversationEncoder(reader, collate_valid, args.max_bad_samples, None),
            worker_config(rank, args.data_parallel_size, args.num_workers, args.seed),
            args.eval_micro_batch_size,
            samples // args.eval_micro_batch_size,
        )
        for rank in ranks
    ]
    return train, ShardBatches([endless(loader) for loader in valid])


def first_shard_batches(
    args: argparse.Namespace, reader: SampleEncoder, collate: Collate, count: int
) -> list[Batch]:
    """What a single rank would read first, without a process group."""
    loader = training_loader(
        Path(args.data_path[0]),
        args.train_split,
        _encoder(args, reader, collate),
        worker_config(0, 1, 0, args.seed),
        args.micro_batch_size,
        args.shuffle_buffer_size,
    )
    batches = ShardBatches([loader])
    return [next(batches) for _ in range(count)]


def _encoder(
    args: argparse.Namespace, reader: SampleEncoder, collate: Collate
) -> ConversationEncoder:
    reader = dataclasses.replace(reader, augment=args.augment)
    packing = None
    if args.packing_buffer_size:
        packing = Packing(args.packing_buffer_size, args.total_seq_length, cp_multiple(args))
    return ConversationEncoder(reader, collate, args.max_bad_samples, packing)


def _restore(args: argparse.Namespace, train: RememberedBatches, ranks: Sequence[int]) -> None:
    """Go on where the checkpoint was that this run goes on from."""
    if not args.load or not args.iteration or args.finetune:
        return
    folder = Path(args.load) / f"iter_{args.iteration:07d}"
    saved = sorted(folder.glob("*/train_dataloader_dprank*.pt"))
    if not saved:
        if args.rank == 0:
            print("  the checkpoint holds no place in the data, which begins anew", file=sys.stderr)
        return
    states = [_load_state(saved[0].with_name(STATE_FILE.format(rank))) for rank in ranks]
    for state in states:
        _check_same_sharding(folder, state["sharding"], train.sharding)
    train.restore_state([state["loaders"][0] for state in states])
    BAD_SAMPLES.count = sum(state["bad_samples"] for state in states)


def _load_state(file: Path) -> dict[str, Any]:
    """What `RememberedBatches.save_state` returned; nothing but plain values is unpickled."""
    if not file.is_file():
        raise ValueError(
            f"{file}: this data-parallel rank's place in the data is missing; go on with as many "
            "data-parallel ranks as before, or begin the data anew with --finetune"
        )
    try:
        state = torch.load(file, weights_only=True)["dataloader_state_dict"]
        return {**state, "loaders": from_plain(state["loaders"])}
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{file}: damaged ({' '.join(str(error).split())[:200]})") from None


def _sharding(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What decides which sample comes when, in the words of a message."""
    parts = read_mixture(path, args.train_split)
    return {
        "data-parallel size": args.data_parallel_size,
        "--num-workers": args.num_workers,
        "--micro-batch-size": args.micro_batch_size,
        "--shuffle-buffer-size": args.shuffle_buffer_size,
        "--packing-buffer-size": args.packing_buffer_size or 0,
        "--total-seq-length": args.total_seq_length if args.packing_buffer_size else 0,
        "--seed": args.seed,
        "samples": sum(num_samples(part) for part in parts),
    }


def _check_same_sharding(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError unless the samples are dealt out as before."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"--load {folder.parent}: was trained with {name} {saved.get(name)}, and this run "
                f"has {value}; the samples of an epoch cannot be dealt out anew: keep it, or "
                "begin the data anew with --finetune"
            )
