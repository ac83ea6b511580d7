"""Reads conversations from WebDataset shards with megatron-energon, packed on request.

A shard is a tar file. The parts of a sample stand side by side in it: `KEY.json`, which is a record
as in `data/batch.py`, and the files that the record names. Energon shards the samples over the
data-parallel ranks and their worker processes, shuffles them, and can save and restore its position
at any batch. From a sample's parts to a micro-batch, in reading order: `read_record` (in
`manifest.py`), `ConversationEncoder` (which energon calls in each worker), `training_loader`,
`ShardBatches`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import (
    Cooker,
    CrudeWebdataset,
    SavableDataLoader,
    SkipSample,
    TaskEncoder,
    WorkerConfig,
    stateless,
)
from megatron.energon.epathlib import EPath
from megatron.energon.errors import FatalSampleError, reraise_exception
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from megatron.energon.wrappers import BlendDataset, MapDataset, ShuffleBufferDataset
from megatron.energon.wrappers.base import BaseWrapperDataset
from megatron.energon.wrappers.gc_dataset import GC_DEFAULT_EVERY_N_ITER

from examples.mimo.data.batch import Batch
from examples.mimo.data.conversation import BadSample, Sample, SampleEncoder
from examples.mimo.data.turns import FindFile
from examples.mimo.modalities.files import Blob
from examples.mimo.parallel.placement import join_batches
from examples.mimo.shards.manifest import Part, error_reason, read_mixture, read_record

# So many neighbours in a shard follow one another before another position is drawn: reading from
# a disk or a network is sequential within them.
SAMPLES_PER_SEQUENCE = 100
# A worker saves its state this often; samples read since then are read again on resuming.
CHECKPOINT_EVERY_SECONDS = 10.0
# Energon puts this before the message of a `FatalSampleError` that it passes on.
ENERGON_CAUSE = "system exception:"

Collate = Callable[[Sequence[Sample]], Batch]


def part_finder(key: str, parts: Mapping[str, bytes]) -> FindFile:
    """Finds the parts of a sample by the names in its record, which may begin with its key."""

    def find(name: str) -> Blob:
        part = name.removeprefix(f"{key}.")
        if part not in parts or not isinstance(parts[part], bytes):
            raise ValueError(f"{name}: no such part in the shard")
        return Blob(f"{key}.{part}", parts[part])

    return find


def pack(lengths: Sequence[int], seq_length: int) -> list[list[int]]:
    """Indices of samples by packed sequence, from the samples' lengths in tokens.

    Every sample is in one sequence, and no sequence is longer than `seq_length`. The longest sample
    that is left opens a sequence; the samples that fill the rest best join it. Sequences come in
    the order of their first sample, so that training does not see them sorted by length.
    """
    longest = max(lengths, default=0)
    if longest > seq_length:
        raise ValueError(f"a sample of {longest} tokens does not fit a sequence of {seq_length}")
    sequences: list[list[int]] = []
    remaining = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while remaining:
        first, *others = remaining
        joining = _best_fill([lengths[i] for i in others], seq_length - lengths[first])
        sequences.append(sorted([first, *(others[position] for position in joining)]))
        remaining = [i for position, i in enumerate(others) if position not in joining]
    return sorted(sequences, key=lambda sequence: sequence[0])


def _best_fill(lengths: Sequence[int], room: int) -> set[int]:
    """Positions in `lengths` with the largest sum that fits `room`: a subset sum.

    Bit s of `reachable[n]` says whether some of the first n lengths sum to s.
    """
    mask = (1 << (room + 1)) - 1
    reachable = [1]
    for length in lengths:
        reachable.append((reachable[-1] | reachable[-1] << length) & mask)
    total = reachable[-1].bit_length() - 1
    chosen = set()
    for position in reversed(range(len(lengths))):
        if not reachable[position] >> total & 1:
            chosen.add(position)
            total -= lengths[position]
    return chosen


@dataclass
class ShardSample:
    """A sample, where energon finds it again, and as `Batch.places` says where it is."""

    sample: Sample
    __restore_key__: tuple[Any, ...]
    place: tuple[int, int]


def sample_place(restore_key: Sequence[Any]) -> tuple[int, int]:
    """The folder of the mixture that a sample comes from, and its index in it.

    Energon's datasets each put their name and a number in front: "BlendDataset", folder, ...,
    "Webdataset", index.
    """
    blend = BlendDataset.__name__
    folder = restore_key[restore_key.index(blend) + 1] if blend in restore_key else 0
    return folder, restore_key[-1]


@dataclass(frozen=True)
class Packing:
    """Packs every `buffer_size` samples into sequences of `seq_length` tokens.

    Each sample is padded to a multiple of `sample_multiple`, as context parallelism needs.
    """

    buffer_size: int
    seq_length: int
    sample_multiple: int = 1


@stateless
def _raw_parts(parts: dict[str, Any]) -> dict[str, Any]:
    """Energon requires a cooker between shards and encoder; the encoder takes the parts raw."""
    return parts


class ConversationEncoder(TaskEncoder):  # type: ignore[type-arg]
    """Turns the parts of samples into micro-batches inside a worker process.

    Samples that cannot be read are skipped, and reported by the next micro-batch.
    """

    cookers = (Cooker(_raw_parts),)
    decoder = None

    def __init__(
        self,
        sample_encoder: SampleEncoder,
        collate: Collate,
        max_bad_samples: int,
        packing: Packing | None = None,
    ) -> None:
        self.sample_encoder = sample_encoder
        self.collate = collate
        self.max_bad_samples = max_bad_samples
        self.packing = packing
        self.bad_samples: list[BadSample] = []
        self.bad_places: list[tuple[int, int]] = []

    @stateless
    def encode_sample(self, parts: dict[str, Any]) -> ShardSample:
        """Decodes the media, computes encoder inputs and tokenises; SkipSample when it cannot."""
        key, place = str(parts["__key__"]), sample_place(parts["__restore_key__"])
        try:
            sample = self._encode(key, parts)
        # A damaged file can make a decoder fail in any way; the run goes on without the sample.
        except Exception as error:
            self.bad_places.append(place)
            self._add_bad_sample(BadSample(key, error_reason(error)))
            raise SkipSample from None
        return ShardSample(sample, parts["__restore_key__"], place)

    def _encode(self, key: str, parts: dict[str, Any]) -> Sample:
        record = read_record(key, parts, self.sample_encoder.config)
        # Seeded by the worker and its position, so that a resumed run augments alike.
        workers = WorkerConfig.active_worker_config
        generator = np.random.default_rng([workers.worker_seed(), self.current_sample_index])
        sample = self.sample_encoder.encode(record, part_finder(key, parts), generator)
        if not any(sample.tokens.loss_mask):
            raise ValueError(f"sample {key}: no answer, so no target tokens")
        if self.packing and len(sample.tokens.ids) > self.packing.seq_length:
            raise ValueError(
                f"sample {key}: {len(sample.tokens.ids)} tokens do not fit --total-seq-length "
                f"{self.packing.seq_length}"
            )
        return sample

    def _add_bad_sample(self, bad_sample: BadSample) -> None:
        self.bad_samples.append(bad_sample)
        # Without this bound a folder with nothing to read would be read in circles for ever.
        if len(self.bad_samples) > self.max_bad_samples:
            raise FatalSampleError(
                f"{len(self.bad_samples)} samples since the last micro-batch could not be read, "
                f"more than --max-bad-samples {self.max_bad_samples}; the last: {bad_sample.reason}"
            )

    def select_samples_to_pack(self, samples: list[ShardSample]) -> list[list[ShardSample]]:
        """All samples of the buffer, by packed sequence."""
        assert self.packing is not None
        multiple = self.packing.sample_multiple
        lengths = [-(-len(s.sample.tokens.ids) // multiple) * multiple for s in samples]
        return [[samples[i] for i in group] for group in pack(lengths, self.packing.seq_length)]

    @stateless
    def pack_selected_samples(self, samples: list[ShardSample]) -> list[ShardSample]:
        """Leaves a packed sequence as the list of its samples, which `batch` collates."""
        return samples

    @stateless
    def batch(self, samples: list[Any]) -> Batch:
        """Collates a micro-batch of samples, or one packed sequence of them."""
        members = samples[0] if self.packing else samples
        batch = self.collate([member.sample for member in members])
        batch.bad_samples, self.bad_samples = self.bad_samples, []
        batch.places = [member.place for member in members] + self.bad_places
        self.bad_places = []
        return batch


class EpochShuffle(ShuffleBufferDataset):  # type: ignore[type-arg]
    """A shuffle buffer that is emptied before the next epoch begins.

    Energon places its own buffer after the repetition of epochs, where it mixes two of them: some
    samples would come twice before others have come once.
    """

    _savable_fields = (*ShuffleBufferDataset._savable_fields, "_drains")

    def reset_state_own(self) -> None:
        """Resets to before the first sample."""
        super().reset_state_own()
        self._drains = False

    def __iter__(self) -> Iterator[Any]:
        buffer = self._active_buffer
        buffer.worker_start()
        source = buffer.append_iter()
        while not self._drains:
            if buffer.len_worker() >= self.size:
                yield buffer.pop(self._worker_rng.randbelow(buffer.len_worker()))
            elif next(source, None) is None:
                self._drains = True
        while buffer.len_worker():
            yield buffer.pop(self._worker_rng.randbelow(buffer.len_worker()))
        self._drains = False


class RestOfEpoch(BaseWrapperDataset):  # type: ignore[type-arg]
    """First `passes`, then the epochs of `dataset`.

    A pass is the indices of samples that other readers left over, and is dealt out to all readers:
    each takes a share, in sequences of neighbours.
    """

    _savable_fields = ("_pass", "_position")

    def __init__(self, dataset: Any, passes: Sequence[np.ndarray], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.passes = passes
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Resets to before the first sample."""
        self._pass = self._position = 0

    def len_worker(self, worker_idx: int | None = None) -> int:
        """As of `dataset`: a pass is at most an epoch."""
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[Any]:
        if self._pass >= len(self.passes):
            yield from self.dataset
            return
        share = self._share(self._pass)
        while self._position < len(share):
            index = int(share[self._position])
            self._position += 1
            yield self.dataset.restore_sample((MapDataset.__name__, 0, "Webdataset", index))
        self._pass, self._position = self._pass + 1, 0

    def _share(self, number: int) -> np.ndarray:
        """This reader's part of a pass."""
        indices, workers = self.passes[number], self.worker_config
        sequences = np.array_split(indices, max(1, len(indices) // SAMPLES_PER_SEQUENCE))
        order = np.random.default_rng([workers.seed_offset, number]).permutation(len(sequences))
        dealt = np.concatenate([sequences[i] for i in order])
        # Without worker processes a rank is a reader itself.
        num_workers = max(1, workers.num_workers)
        reader = workers.rank * num_workers + workers.rank_worker_id()
        return np.array_split(dealt, workers.world_size * num_workers)[reader]

    def config(self) -> dict[str, Any]:
        """What energon compares of two loaders."""
        return {"type": type(self).__qualname__, "dataset": self.dataset.config()}


class ShuffledShards(CrudeWebdataset):
    """A folder of shards that gives each sample once an epoch, in a new order every epoch.

    With `passes` it begins with what is left of an epoch.
    """

    def __init__(
        self, path: EPath, buffer_size: int, passes: Sequence[np.ndarray], **options: Any
    ) -> None:
        super().__init__(path, **options)
        self.buffer_size = buffer_size
        self.passes = passes

    def build(self, worker_rotation_offset: int = 0) -> Any:
        """The dataset of one epoch, which energon repeats."""
        dataset: Any = super().build(worker_rotation_offset)
        if self.passes:
            dataset = RestOfEpoch(dataset, self.passes, worker_config=self.worker_config)
        return EpochShuffle(dataset, self.buffer_size, worker_config=self.worker_config)


def worker_config(rank: int, world_size: int, num_workers: int, seed: int) -> WorkerConfig:
    """Which shard of the data a data-parallel rank reads, and with how many processes."""
    return WorkerConfig(
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,
    )


def training_loader(
    path: Path,
    split: str,
    encoder: ConversationEncoder,
    workers: WorkerConfig,
    micro_batch_size: int,
    shuffle_buffer_size: int,
    passes: Sequence[Sequence[np.ndarray]] = (),
) -> SavableDataLoader:
    """Endless micro-batches of the shards at `path`, or of the mixture that the file lists.

    `passes[i]` is what folder i of the mixture has left of an epoch, as of `RestOfEpoch`.
    """
    parts = read_mixture(path, split)
    build = functools.partial(
        ShuffledShards,
        buffer_size=max(1, shuffle_buffer_size),
        training=True,
        max_samples_per_sequence=SAMPLES_PER_SEQUENCE,
    )
    packing = encoder.packing
    dataset = encoder.build_train_datasets(
        datasets=[
            folder_dataset(functools.partial(build, passes=left), part, workers)
            for part, left in zip(parts, passes or [()] * len(parts), strict=True)
        ],
        worker_config=workers,
        batch_size=1 if packing else micro_batch_size,
        batch_drop_last=True,
        packing_buffer_size=packing.buffer_size if packing else None,
        shuffle_buffer_size=None,
        blend_mode=DatasetBlendMode.DATASET_WEIGHT if len(parts) > 1 else DatasetBlendMode.NONE,
    )
    return savable_loader(dataset, checkpoint_every_sec=CHECKPOINT_EVERY_SECONDS)


def folder_dataset(build: Callable[..., Any], part: Part, workers: WorkerConfig) -> LoadedDataset:
    """One folder; energon's `.nv-meta/dataset.yaml` may name code to run, so it is not read."""
    dataset = build(EPath(part.path), split_part=part.split, worker_config=workers, decoder=None)
    num_workers = max(1, workers.num_workers)
    readers = workers.world_size * num_workers
    if len(dataset) < readers:
        raise ValueError(
            f"--data-path {part.path}: its split {part.split!r} has {len(dataset)} samples, fewer "
            f"than {readers} readers ({workers.world_size} data-parallel ranks x {num_workers} "
            "workers); lower --num-workers or prepare more samples"
        )
    return LoadedDataset(dataset=dataset, weight=part.weight)


def savable_loader(dataset: Any, **options: Any) -> SavableDataLoader:
    """Energon's loader, whose position can be saved."""
    # Without worker processes a garbage collection would walk through all that Megatron holds.
    every = GC_DEFAULT_EVERY_N_ITER if dataset.worker_config.num_workers else 0
    return SavableDataLoader(
        dataset, gc_collect_every_n_steps=every, watchdog_timeout_seconds=None, **options
    )


class ShardBatches:
    """An endless iterator over micro-batches, whose state can be saved and restored.

    With several loaders a micro-batch joins one of each, in their order. Plain generators serve as
    loaders where no state is needed. Energon seeds torch's random numbers and draws from them; they
    are put back, as ranks that do not read must have the same ones to drop out alike.
    """

    def __init__(self, loaders: Sequence[Any]) -> None:
        self.loaders = loaders
        self._iterators: list[Generator[Batch, None, None]] = []

    def __iter__(self) -> ShardBatches:
        return self

    def __next__(self) -> Batch:
        try:
            with torch.random.fork_rng(devices=()):
                if not self._iterators:
                    self._iterators = [iter(loader) for loader in self.loaders]
                return join_batches([next(iterator) for iterator in self._iterators])
        except FatalSampleError as error:
            # Energon puts the whole sample in front, and a worker process its traceback.
            raise ValueError(str(error).rpartition(ENERGON_CAUSE)[2].strip()) from None

    def close(self) -> None:
        """Ends the worker processes at once; loaders that are only dropped take seconds."""
        for iterator in self._iterators:
            iterator.close()

    def save_state(self) -> list[Any]:
        """The state of each loader; nothing may be read meanwhile."""
        return [loader.save_state_rank() for loader in self.loaders]

    def restore_state(self, states: Sequence[Any]) -> None:
        """Continues from `save_state`; call it before the first micro-batch is read."""
        assert not self._iterators
        with torch.random.fork_rng(devices=()):
            for loader, state in zip(self.loaders, states, strict=True):
                loader.restore_state_rank(state)
