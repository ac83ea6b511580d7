"""Training batches from shards, and how checkpoints save and restore their position.

Every data-parallel rank saves the state of its loader with each checkpoint, as plain values: a
pickle can make an instance of any class, and `torch.load(weights_only=True)` reads numbers, text,
lists, dicts and tensors alone. A run resumes only with the sharding that it was saved with.
"""

from __future__ import annotations

import dataclasses
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    SavableDataLoader,
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState

from examples.mimo.data.batch import Batch
from examples.mimo.data.conversation import BadSampleCount, SampleEncoder
from examples.mimo.shards.manifest import num_samples, read_mixture
from examples.mimo.shards.read import (
    Collate,
    ConversationEncoder,
    Packing,
    ShardBatches,
    endless,
    training_loader,
    validation_loader,
    worker_config,
)

# Megatron writes what `ResumableBatches.save_state` returns to this file.
STATE_FILE = "train_dataloader_dprank{:03d}.pt"
KIND, FIELDS = "kind", "fields"
STATE_CLASSES = {
    state_class.__name__: state_class
    for state_class in (
        SavableDataLoaderState,
        SavableDatasetCheckpoint,
        SavableDatasetState,
        SliceState,
        SystemRngState,
    )
}


@dataclass(frozen=True)
class ShardOptions:
    """What a run's flags say about reading shards.

    `data_parallel_size` is the language model's, and `replicas` are those of its data-parallel
    replicas that this rank reads for. `eval_batches` is how many micro-batches each validates on,
    and `checkpoint` the folder `iter_N` that this run resumes. With a `packing_buffer_size`,
    training samples are packed into sequences of `packed_seq_length`.
    """

    data_path: Path
    train_split: str
    valid_split: str
    data_parallel_size: int
    replicas: range
    micro_batch_size: int
    num_workers: int
    shuffle_buffer_size: int
    max_bad_samples: int
    seed: int
    augment: bool = False
    packing_buffer_size: int = 0
    packed_seq_length: int = 0
    sample_multiple: int = 1
    eval_micro_batch_size: int = 1
    eval_batches: int = 0
    checkpoint: Path | None = None
    saves_state: bool = False

    def sharding(self) -> dict[str, Any]:
        """What decides which sample comes when, by the names that a message gives it."""
        parts = read_mixture(self.data_path, self.train_split)
        return {
            "data-parallel size": self.data_parallel_size,
            "--num-workers": self.num_workers,
            "--micro-batch-size": self.micro_batch_size,
            "--shuffle-buffer-size": self.shuffle_buffer_size,
            "--packing-buffer-size": self.packing_buffer_size,
            "--total-seq-length": self.packed_seq_length if self.packing_buffer_size else 0,
            "--seed": self.seed,
            "samples": sum(num_samples(part) for part in parts),
        }


class ResumableBatches(ShardBatches):
    """Training batches whose position Megatron saves with every checkpoint.

    Of the ranks that read the same data one saves (`saves_state`): the first context-parallel rank
    of the language model's first stage. `bad_samples` counts over the whole training.
    """

    def __init__(
        self,
        loaders: Sequence[Any],
        sharding: dict[str, Any],
        saves_state: bool,
        bad_samples: BadSampleCount,
    ) -> None:
        super().__init__(loaders)
        self.sharding = sharding
        self.saves_state = saves_state
        self.bad_samples = bad_samples

    def save_state(self) -> Any:
        """For `megatron.training.checkpointing`; None where another rank saves."""
        if not self.saves_state:
            return None
        return {
            "sharding": self.sharding,
            "bad_samples": self.bad_samples.count,
            "loaders": to_plain(super().save_state()),
        }


def shard_iterators(
    options: ShardOptions,
    reader: SampleEncoder,
    collate: Collate,
    collate_valid: Collate,
    bad_samples: BadSampleCount,
) -> tuple[Iterator[Batch], Iterator[Batch] | None]:
    """Training and validation batches of this rank, which reads for `options.replicas`.

    A batch joins a micro-batch of each of these data-parallel replicas of the language model.
    """
    loaders = [_training_loader(options, reader, collate, rank) for rank in options.replicas]
    train = ResumableBatches(loaders, options.sharding(), options.saves_state, bad_samples)
    if options.checkpoint:
        _restore(options.checkpoint, train, options.replicas)
    if not options.eval_batches:
        return train, None
    valid = [
        validation_loader(
            options.data_path,
            options.valid_split,
            ConversationEncoder(reader, collate_valid, options.max_bad_samples),
            worker_config(rank, options.data_parallel_size, options.num_workers, options.seed),
            options.eval_micro_batch_size,
            options.eval_batches,
        )
        for rank in options.replicas
    ]
    return train, ShardBatches([endless(loader) for loader in valid])


def first_shard_batches(
    options: ShardOptions, reader: SampleEncoder, collate: Collate, count: int
) -> list[Batch]:
    """The first `count` batches of a run on a single rank, without a process group."""
    alone = dataclasses.replace(options, data_parallel_size=1, num_workers=0)
    batches = ShardBatches([_training_loader(alone, reader, collate, rank=0)])
    return [next(batches) for _ in range(count)]


def _training_loader(
    options: ShardOptions, reader: SampleEncoder, collate: Collate, rank: int
) -> SavableDataLoader:
    reader = dataclasses.replace(reader, augment=options.augment)
    packing = None
    if options.packing_buffer_size:
        packing = Packing(
            options.packing_buffer_size, options.packed_seq_length, options.sample_multiple
        )
    return training_loader(
        options.data_path,
        options.train_split,
        ConversationEncoder(reader, collate, options.max_bad_samples, packing),
        worker_config(rank, options.data_parallel_size, options.num_workers, options.seed),
        options.micro_batch_size,
        options.shuffle_buffer_size,
    )


def _restore(checkpoint: Path, train: ResumableBatches, ranks: Sequence[int]) -> None:
    """Continues `train` from the states of `ranks` in the checkpoint; ValueError if it cannot."""
    saved = sorted(checkpoint.glob("*/train_dataloader_dprank*.pt"))
    if not saved:
        if torch.distributed.get_rank() == 0:
            print(
                "  the checkpoint holds no position in the data, which starts over",
                file=sys.stderr,
            )
        return
    states = [_load_state(saved[0].with_name(STATE_FILE.format(rank))) for rank in ranks]
    for state in states:
        for name, value in train.sharding.items():
            if state["sharding"].get(name) != value:
                raise ValueError(
                    f"--load {checkpoint.parent}: was trained with {name} "
                    f"{state['sharding'].get(name)}, and this run has {value}; the samples of an "
                    "epoch cannot be sharded anew: keep it, or start the data over with --finetune"
                )
    train.restore_state([state["loaders"][0] for state in states])
    train.bad_samples.count = sum(state["bad_samples"] for state in states)


def _load_state(file: Path) -> dict[str, Any]:
    """What `ResumableBatches.save_state` returned; nothing but plain values is unpickled."""
    if not file.is_file():
        raise ValueError(
            f"{file}: this data-parallel rank's position in the data is missing; resume with as "
            "many data-parallel ranks as before, or start the data over with --finetune"
        )
    try:
        state = torch.load(file, weights_only=True)["dataloader_state_dict"]
        return {**state, "loaders": from_plain(state["loaders"])}
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{file}: damaged ({' '.join(str(error).split())[:200]})") from None


def to_plain(value: Any) -> Any:
    """`value` with every instance of a class as a dict that names the class."""
    if type(value).__name__ in STATE_CLASSES:
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
    """The value that `to_plain` was called with; ValueError for a class it does not write."""
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
    if kind not in STATE_CLASSES:
        known = ", ".join(STATE_CLASSES)
        raise ValueError(f"a loader's state holds {kind!r}, which is none of {known}")
    return STATE_CLASSES[kind](**inner)
