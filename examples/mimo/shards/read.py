"""The parts of a sample in a shard, and the record that says what they are.

Which samples share a row of a fixed length.

Conversations from WebDataset shards, read by megatron-energon.

A shard is a tar file; the parts of a sample lie side by side in it: `KEY.json`, which is a record
as in `data/datasets.py`, and the files that the record names. Energon deals shards out to the
data-parallel ranks and their worker processes, shuffles, and knows at any moment what it needs to
go on from there.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from megatron.energon.wrappers import ShuffleBufferDataset
from megatron.energon.wrappers.gc_dataset import GC_DEFAULT_EVERY_N_ITER

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch, join_batches
from examples.mimo.data.conversation import BadSample, FindFile, Sample, SampleEncoder
from examples.mimo.modalities.base import Blob
from examples.mimo.shards.mixtures import Part, read_mixture

MAX_RECORD_BYTES = 4 * 2**20


def record_of(key: str, parts: Mapping[str, bytes], config: MimoConfig) -> dict[str, Any]:
    """The record of a sample; where it names no media at all, the parts say what there is.

    `parts` are the contents by name; of them only the record's is looked at.
    """
    if "json" not in parts:
        raise ValueError(f"sample {key}: no {key}.json in the shard")
    text = parts["json"]
    if len(text) > MAX_RECORD_BYTES:
        raise ValueError(
            f"sample {key}: {key}.json has {len(text):,} bytes, more than {MAX_RECORD_BYTES:,}"
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"sample {key}: {key}.json is not JSON ({error})") from None
    if isinstance(record, list):
        record = {"conversations": record}
    if not isinstance(record, dict):
        raise ValueError(f"sample {key}: {key}.json must hold an object or a list of turns")
    record.setdefault("key", key)
    if any(name in record for name in config.modalities):
        return record
    for name, modality in config.modalities.items():
        named = [part for part in parts if part.lower().endswith(modality.encoder.suffixes)]
        found = sorted(named, key=_by_number)
        # A part may be named by its suffix alone, as KEY.mp4.
        found += [part for part in parts if f".{part.lower()}" in modality.encoder.suffixes]
        if found:
            record[name] = found
    return record


def _by_number(part: str) -> list[tuple[int, str]]:
    """Orders 2.jpg before 10.jpg."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", part)]


def words_of(error: Exception) -> str:
    """Why a sample was refused; a decoder's own kind of error is named."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{error}"


def find_in(key: str, parts: Mapping[str, bytes]) -> FindFile:
    """The parts of a sample as files; a name may begin with the sample's key."""

    def find(name: str) -> Blob:
        part = name.removeprefix(f"{key}.")
        if part not in parts or not isinstance(parts[part], bytes):
            raise ValueError(f"{name}: no such part in the shard")
        return Blob(f"{key}.{part}", parts[part])

    return find


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Indices of `lengths` by row: each once, no row longer than `row_length`.

    The longest sample that is left opens a row, and those join it that leave the least room. Rows
    come in the order of the first index that they hold, so that they are not sorted by length.
    """
    longest = max(lengths, default=0)
    if longest > row_length:
        raise ValueError(f"a sample of {longest} tokens does not fit a row of {row_length}")
    rows: list[list[int]] = []
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while left:
        first, *others = left
        joining = _fullest([lengths[i] for i in others], row_length - lengths[first])
        rows.append(sorted([first, *(others[place] for place in joining)]))
        left = [i for place, i in enumerate(others) if place not in joining]
    return sorted(rows, key=lambda row: row[0])


def _fullest(lengths: Sequence[int], room: int) -> set[int]:
    """Places in `lengths` whose sum is the largest that `room` holds: a subset sum.

    Bit s of `reached[n]` says whether some of the first n lengths sum to s.
    """
    within = (1 << (room + 1)) - 1
    reached = [1]
    for length in lengths:
        reached.append((reached[-1] | reached[-1] << length) & within)
    left = reached[-1].bit_length() - 1
    chosen = set()
    for place in reversed(range(len(lengths))):
        if not reached[place] >> left & 1:
            chosen.add(place)
            left -= lengths[place]
    return chosen


# Neighbours in a shard follow one another for so long before another place is drawn.
RUN_OF_SAMPLES = 100
# A worker's state is kept this often; what came since is worked through again on resuming.
STATE_EVERY_SECONDS = 10.0
# What stands before the words of `FatalSampleError` when energon passes it on.
CAUSE = "system exception:"

Collate = Callable[[Sequence[Sample]], Batch]


@dataclass
class ShardSample:
    """A sample, and where energon finds it again."""

    sample: Sample
    __restore_key__: tuple[Any, ...]


@dataclass(frozen=True)
class Packing:
    """Rows of `row_length` tokens from every `buffer_size` samples, each of which takes a multiple
    of `sample_multiple`.
    """

    buffer_size: int
    row_length: int
    sample_multiple: int = 1


@stateless
# Energon wants a cooker between shards and the encoder, which takes the parts raw.
def _as_it_is(parts: dict[str, Any]) -> dict[str, Any]:
    return parts


class ConversationEncoder(TaskEncoder):  # type: ignore[type-arg]
    """From the parts of a sample to a micro-batch, inside a worker process.

    Samples that cannot be read are left out, and named by the next micro-batch.
    """

    cookers = (Cooker(_as_it_is),)
    decoder = None

    def __init__(
        self, reader: SampleEncoder, collate: Collate, max_bad_samples: int, packing: Packing | None
    ) -> None:
        self.reader = reader
        self.collate = collate
        self.max_bad_samples = max_bad_samples
        self.packing = packing
        self.refused: list[BadSample] = []

    @stateless
    def encode_sample(self, parts: dict[str, Any]) -> ShardSample:
        """Decode, resample, compute features, tokenise."""
        key = str(parts["__key__"])
        try:
            sample = self._read(key, parts)
        # A damaged file can make a decoder fail in any way; the run goes on without the sample.
        except Exception as error:
            self._refuse(key, error)
            raise SkipSample from None
        return ShardSample(sample, parts["__restore_key__"])

    def _read(self, key: str, parts: dict[str, Any]) -> Sample:
        record = record_of(key, parts, self.reader.config)
        config = WorkerConfig.active_worker_config
        generator = np.random.default_rng([config.worker_seed(), self.current_sample_index])
        sample = self.reader.encode(record, find_in(key, parts), generator)
        if not any(sample.tokens.loss_mask):
            raise ValueError(f"sample {key}: no answer that could be learned")
        if self.packing and len(sample.tokens.ids) > self.packing.row_length:
            raise ValueError(
                f"sample {key}: {len(sample.tokens.ids)} tokens do not fit --total-seq-length "
                f"{self.packing.row_length}"
            )
        return sample

    def _refuse(self, key: str, error: Exception) -> None:
        self.refused.append(BadSample(key, words_of(error)))
        if len(self.refused) > self.max_bad_samples:
            raise FatalSampleError(
                f"{len(self.refused)} samples since the last micro-batch could not be read, "
                f"more than --max-bad-samples {self.max_bad_samples}; the last: "
                f"{self.refused[-1].reason}"
            )

    def select_samples_to_pack(self, samples: list[ShardSample]) -> list[list[ShardSample]]:
        """All of the buffer's samples, by row."""
        assert self.packing is not None
        multiple = self.packing.sample_multiple
        lengths = [-(-len(s.sample.tokens.ids) // multiple) * multiple for s in samples]
        return [[samples[i] for i in row] for row in pack(lengths, self.packing.row_length)]

    @stateless
    def pack_selected_samples(self, samples: list[ShardSample]) -> list[ShardSample]:
        """A row is the list of its samples."""
        return samples

    @stateless
    def batch(self, samples: list[Any]) -> Batch:
        """A micro-batch of samples, or of one packed row."""
        chosen = samples[0] if self.packing else samples
        batch = self.collate([one.sample for one in chosen])
        batch.bad_samples, self.refused = self.refused, []
        return batch


class EpochShuffle(ShuffleBufferDataset):  # type: ignore[type-arg]
    """Draws the next sample from a buffer, which is emptied before another epoch begins.

    Energon's own place for a buffer is behind the repetition of epochs, where it mixes two of
    them: a sample comes twice before another has come once.
    """

    _savable_fields = (*ShuffleBufferDataset._savable_fields, "_drains")

    def reset_state_own(self) -> None:
        """As before the first sample."""
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


class ShuffledShards(CrudeWebdataset):
    """A folder of shards whose samples come in another order every epoch, each once."""

    def __init__(self, path: EPath, buffer_size: int, **how: Any) -> None:
        super().__init__(path, **how)
        self.buffer_size = buffer_size

    def build(self, worker_rotation_offset: int = 0) -> Any:
        """What energon repeats."""
        dataset = super().build(worker_rotation_offset)
        return EpochShuffle(dataset, self.buffer_size, worker_config=self.worker_config)


class ShardBatches:
    """An endless iterator over micro-batches, whose state can be saved and restored.

    With several loaders a micro-batch holds one of each, in their order. Generators serve as
    loaders where no state is wanted.
    """

    def __init__(self, loaders: Sequence[Any]) -> None:
        self.loaders = loaders
        self._iterators: list[Generator[Batch, None, None]] = []

    def __iter__(self) -> ShardBatches:
        return self

    def __next__(self) -> Batch:
        if not self._iterators:
            self._iterators = [iter(loader) for loader in self.loaders]
        try:
            return join_batches([next(iterator) for iterator in self._iterators])
        except FatalSampleError as error:
            # Energon puts the whole sample in front, and a worker process its traceback.
            raise ValueError(str(error).rpartition(CAUSE)[2].strip()) from None

    def close(self) -> None:
        """Let worker processes end at once; those of loaders that are only dropped take seconds."""
        for iterator in self._iterators:
            iterator.close()

    def save_state(self) -> list[Any]:
        """A state for each loader; nothing may be read meanwhile."""
        return [loader.save_state_rank() for loader in self.loaders]

    def restore_state(self, states: Sequence[Any]) -> None:
        """Go on from `save_state`; before the first micro-batch is read."""
        assert not self._iterators
        for loader, state in zip(self.loaders, states, strict=True):
            loader.restore_state_rank(state)


def training_loader(
    path: Path,
    split: str,
    encoder: ConversationEncoder,
    workers: WorkerConfig,
    micro_batch_size: int,
    shuffle_buffer_size: int,
) -> SavableDataLoader:
    """Endless micro-batches of the shards at `path`, or of a mixture that the file lists."""
    parts = read_mixture(path, split)
    build = functools.partial(
        ShuffledShards,
        buffer_size=max(1, shuffle_buffer_size),
        training=True,
        max_samples_per_sequence=RUN_OF_SAMPLES,
    )
    packing = encoder.packing
    dataset = encoder.build_train_datasets(
        datasets=[_dataset(build, part, workers) for part in parts],
        worker_config=workers,
        batch_size=1 if packing else micro_batch_size,
        batch_drop_last=True,
        packing_buffer_size=packing.buffer_size if packing else None,
        shuffle_buffer_size=None,
        blend_mode=DatasetBlendMode.DATASET_WEIGHT if len(parts) > 1 else DatasetBlendMode.NONE,
    )
    return _loader(dataset, checkpoint_every_sec=STATE_EVERY_SECONDS)


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
        datasets=[_dataset(build, part, workers) for part in read_mixture(path, split)],
        worker_config=workers,
        batch_size=micro_batch_size,
        batch_drop_last=True,
        limit=num_batches,
    )
    return _loader(dataset)


def _loader(dataset: Any, **how: Any) -> SavableDataLoader:
    """Without worker processes a collection of garbage would go through all that Megatron holds."""
    every = GC_DEFAULT_EVERY_N_ITER if dataset.worker_config.num_workers else 0
    return SavableDataLoader(
        dataset, gc_collect_every_n_steps=every, watchdog_timeout_seconds=None, **how
    )


def worker_config(rank: int, world_size: int, num_workers: int, seed: int) -> WorkerConfig:
    """Which share of the data a data-parallel rank reads, and with how many processes."""
    return WorkerConfig(
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,
    )


def _dataset(build: Callable[..., Any], part: Part, workers: WorkerConfig) -> LoadedDataset:
    """Energon's own description in `.nv-meta/dataset.yaml` may name code, so it is not read."""
    dataset = build(EPath(part.path), split_part=part.split, worker_config=workers, decoder=None)
    readers = workers.world_size * max(1, workers.num_workers)
    if len(dataset) < readers:
        raise ValueError(
            f"--data-path {part.path}: {len(dataset)} samples in its split {part.split!r}, but "
            f"{readers} data-parallel ranks and workers want one each"
        )
    return LoadedDataset(dataset=dataset, weight=part.weight)


def endless(loader: SavableDataLoader) -> Iterator[Batch]:
    """Pass after pass over a loader; ValueError when a pass is empty."""
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError(
                "the validation split has less than a micro-batch for a data-parallel rank; "
                "prepare more of it, or leave --eval-iters at 0"
            )
