"""Training batches from shards, and how checkpoints save and restore their position.

Every data-parallel rank saves the state of its loader with each checkpoint, as plain values: a
pickle can make an instance of any class, and `torch.load(weights_only=True)` reads numbers, text,
lists, dicts and tensors alone. A run with the same readers goes on from these states, with the very
next sample.

A rank also saves how often it has read each sample. From the counts of all ranks follows what an
epoch still lacks, and a run with other readers (data-parallel ranks, workers, batch sizes, buffers)
deals that out anew: each sample comes once in that epoch too.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import CrudeWebdataset, WorkerConfig
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
    folder_dataset,
    savable_loader,
    training_loader,
    worker_config,
)

# Megatron writes what `ResumableBatches.save_state` returns to this file.
STATE_FILE = "train_dataloader_dprank{:03d}.pt"
# What a damaged file makes of its reader.
DAMAGE = (
    *(pickle.UnpicklingError, RuntimeError, LookupError, TypeError),
    *(ValueError, AttributeError, EOFError),
)
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


@dataclass
class Position:
    """Where a training stands in its data.

    `lacks[folder]` says of each sample how many passes it was short of when the data were last
    dealt out, and `reads[folder]` how often this rank has read it since; None after a checkpoint
    that did not say. `deals` counts how often that was. With the readers of the checkpoint,
    `loaders` are their states.
    """

    lacks: list[np.ndarray]
    reads: list[np.ndarray] | None
    deals: int = 0
    bad_samples: int = 0
    loaders: list[Any] = dataclasses.field(default_factory=list)

    @classmethod
    def start(cls, sizes: Sequence[int]) -> Position:
        """Before the first sample of folders of these sizes."""
        return cls(_zeros(sizes), _zeros(sizes))

    def passes(self) -> list[list[np.ndarray]]:
        """What each folder had left of an epoch when it was dealt out, as of `RestOfEpoch`.

        Readers need not be in the same epoch: a sample that is two passes short comes in the first
        pass and in the second, others only in the second.
        """
        return [
            [np.flatnonzero(lack >= depth) for depth in range(int(lack.max(initial=0)), 0, -1)]
            for lack in self.lacks
        ]


def _zeros(sizes: Sequence[int]) -> list[np.ndarray]:
    return [np.zeros(size, dtype=np.int32) for size in sizes]


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
        position: Position,
    ) -> None:
        super().__init__(loaders)
        self.sharding = sharding
        self.saves_state = saves_state
        self.bad_samples = bad_samples
        self.position = position

    def __next__(self) -> Batch:
        batch = super().__next__()
        if self.position.reads is not None:
            for folder, index in batch.places:
                self.position.reads[folder][index] += 1
        batch.places = []
        return batch

    def save_state(self) -> Any:
        """For `megatron.training.checkpointing`; None where another rank saves."""
        if not self.saves_state:
            return None
        state = {
            "sharding": self.sharding,
            "bad_samples": self.bad_samples.count,
            "loaders": to_plain(super().save_state()),
        }
        if self.position.reads is None:
            return state
        return state | {
            "deals": self.position.deals,
            "lacks": list(map(to_runs, self.position.lacks)),
            "reads": list(map(to_runs, self.position.reads)),
        }


def to_runs(counts: np.ndarray) -> dict[str, Any]:
    """Counts as runs of equal ones: readers read neighbours, so there are few."""
    starts = np.flatnonzero(np.diff(counts, prepend=counts[:1] - 1))
    runs = torch.from_numpy(starts), torch.from_numpy(counts[starts])
    return {"size": len(counts), "starts": runs[0], "counts": runs[1]}


def from_runs(runs: dict[str, Any], size: int) -> np.ndarray:
    """The `size` counts that `to_runs` was called with; ValueError for others."""
    starts, counts = runs["starts"].numpy(), runs["counts"].numpy()
    if runs["size"] != size:
        raise ValueError(f"counts of {runs['size']} samples, but there are {size}")
    lengths = np.diff(starts, append=size)
    if starts[:1].any() or len(starts) != len(counts) or (lengths < 1).any() or not len(starts):
        raise ValueError(f"no counts of {size} samples")
    return np.repeat(counts.astype(np.int32), lengths)


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
    sharding, position = options.sharding(), _position(options)
    passes, seed = position.passes(), options.seed + position.deals
    dealt = dataclasses.replace(options, seed=seed)
    loaders = [_training_loader(dealt, reader, collate, rank, passes) for rank in options.replicas]
    train = ResumableBatches(loaders, sharding, options.saves_state, bad_samples, position)
    bad_samples.count = position.bad_samples
    if position.loaders:
        train.restore_state(position.loaders)
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
    options: ShardOptions,
    reader: SampleEncoder,
    collate: Collate,
    rank: int,
    passes: Sequence[Sequence[np.ndarray]] = (),
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
        passes,
    )


def validation_loader(
    path: Path,
    split: str,
    encoder: ConversationEncoder,
    workers: WorkerConfig,
    micro_batch_size: int,
    num_batches: int,
) -> SavableDataLoader:
    """The first `num_batches` micro-batches of a split, in its order; every pass is the same."""
    build = functools.partial(CrudeWebdataset, training=False)
    dataset = encoder.build_val_datasets(
        datasets=[folder_dataset(build, part, workers) for part in read_mixture(path, split)],
        worker_config=workers,
        batch_size=micro_batch_size,
        batch_drop_last=True,
        limit=num_batches,
    )
    return savable_loader(dataset)


def endless(loader: SavableDataLoader) -> Iterator[Batch]:
    """Repeats a loader's passes; ValueError when a pass is empty."""
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError(
                "the validation split has less than a micro-batch for a data-parallel rank; "
                "prepare more of it, or leave --eval-iters at 0"
            )


def num_split_samples(path: Path, split: str) -> list[int]:
    """How many samples a split has, by folder of the mixture."""
    build = functools.partial(CrudeWebdataset, training=False)
    alone = worker_config(rank=0, world_size=1, num_workers=0, seed=0)
    parts = read_mixture(path, split)
    return [len(folder_dataset(build, part, alone).dataset) for part in parts]  # type: ignore[arg-type]


def _position(options: ShardOptions) -> Position:
    """Where this run stands in its data: at the start, or where its checkpoint says."""
    sizes = num_split_samples(options.data_path, options.train_split)
    if options.checkpoint is None:
        return Position.start(sizes)
    saved = sorted(options.checkpoint.glob("*/train_dataloader_dprank*.pt"))
    if not saved:
        _say("the checkpoint holds no position in the data, which starts over")
        return Position.start(sizes)
    first, sharding = _load_state(saved[0]), options.sharding()
    changed = [name for name in sharding if sharding[name] != first["sharding"].get(name)]
    if not changed:
        return _same_readers(_load_states(saved[0].parent, options.replicas, sizes), sizes)
    if "samples" in changed or "reads" not in first:
        name = "samples" if "samples" in changed else changed[0]
        raise ValueError(
            f"--load {options.checkpoint.parent}: was trained with {name} "
            f"{first['sharding'].get(name)}, and this run has {sharding[name]}; the rest of an "
            "epoch of other data, or of an older checkpoint, cannot be dealt out anew: keep it, or "
            "start the data over with --finetune"
        )
    ranks = range(first["sharding"]["data-parallel size"])
    return _other_readers(_load_states(saved[0].parent, ranks, sizes), options.replicas)


def _same_readers(states: Sequence[dict[str, Any]], sizes: Sequence[int]) -> Position:
    """The position of a rank that reads for the ranks of `states`."""
    position = Position.start(sizes)
    position.bad_samples = sum(state["bad_samples"] for state in states)
    position.loaders = [state["loaders"][0] for state in states]
    if "reads" not in states[0]:
        position.reads = None
        return position
    position.deals = states[0]["deals"]
    position.lacks = states[0]["lacks"]
    position.reads = _sum_of_reads(states)
    return position


def _other_readers(states: Sequence[dict[str, Any]], replicas: range) -> Position:
    """The position of a run that deals out what the ranks of `states` left."""
    lacks = []
    for lack, reads in zip(states[0]["lacks"], _sum_of_reads(states), strict=True):
        count = reads - lack
        lacks.append(count.max(initial=0) - count)
    left = sum(np.count_nonzero(lack) for lack in lacks)
    _say(f"other readers: the {left:,} samples that are left of this epoch are dealt out anew")
    position = Position(lacks, _zeros(list(map(len, lacks))), deals=states[0]["deals"] + 1)
    if 0 in replicas:
        position.bad_samples = sum(state["bad_samples"] for state in states)
    return position


def _sum_of_reads(states: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """How often the ranks of `states` together have read each sample, by folder."""
    by_folder = zip(*(state["reads"] for state in states), strict=True)
    return [np.sum(reads, axis=0, dtype=np.int32) for reads in by_folder]


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"  {line}", file=sys.stderr)


def _load_states(folder: Path, ranks: range, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The states of data-parallel ranks, with counts for folders of these sizes as arrays."""
    return [_load_state(folder / STATE_FILE.format(rank), sizes) for rank in ranks]


def _load_state(file: Path, sizes: Sequence[int] | None = None) -> dict[str, Any]:
    """What `ResumableBatches.save_state` returned; nothing but plain values is unpickled."""
    if not file.is_file():
        raise ValueError(
            f"{file}: this data-parallel rank's position in the data is missing; copy the "
            "checkpoint anew, or start the data over with --finetune"
        )
    try:
        state = torch.load(file, weights_only=True)["dataloader_state_dict"]
        range(state["sharding"]["data-parallel size"])
        if sizes is not None:
            for name in {"lacks", "reads"} & set(state):
                counts = zip(state[name], sizes, strict=True)
                state[name] = [from_runs(runs, size) for runs, size in counts]
        return {**state, "loaders": from_plain(state["loaders"])}
    except DAMAGE as error:
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
