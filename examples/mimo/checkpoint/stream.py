"""A distributed checkpoint written and read tensor by tensor, so that no model is held whole.

The files are Megatron's own `torch_dist` format: what `--load` and `avlm_inference.py` read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    state_dict_loader,
    state_dict_saver,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

CHECKPOINT_VERSION = 3.0


@dataclass(frozen=True)
class Chunk:
    """A box of the tensor under `key`, of shape `whole`; `read` gives it when it is written."""

    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    def write_item(self) -> WriteItem:
        """Where it goes."""
        box = ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.shape))
        properties = TensorProperties(dtype=self.dtype)
        return WriteItem(
            MetadataIndex(self.key, torch.Size(self.offsets)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(box, properties, torch.Size(self.whole)),
        )

    def data(self) -> torch.Tensor:
        """The tensor, read now, in the box's shape."""
        return self.read().reshape(self.shape).contiguous()


class _Planner(DefaultSavePlanner):
    """Plans from shapes and reads a tensor when it is its turn to be written."""

    def __init__(self, chunks: Iterable[Chunk], objects: dict[str, io.BytesIO]) -> None:
        super().__init__(flatten_state_dict=False)
        self.chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self.objects = objects

    def create_local_plan(self) -> SavePlan:
        items = [chunk.write_item() for chunk in self.chunks.values()]
        items += [WriteItem(MetadataIndex(k), WriteItemType.BYTE_IO) for k in self.objects]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        index = write_item.index
        if index.fqn in self.objects:
            return self.objects[index.fqn]
        assert index.offset is not None
        return self.chunks[index.fqn, tuple(index.offset)].data()


def write(folder: Path, chunks: Iterable[Chunk], objects: Iterable[ShardedObject]) -> None:
    """Write `chunks` and Megatron's `objects` into the empty `folder`."""
    common = {"checkpoint_version": CHECKPOINT_VERSION, "iteration": 0}
    everything = [*objects, ShardedObject("common_state", common, (1,), (0,))]
    packed = {found.unique_key: _pack(found.data) for found in everything}
    state_dict_saver.save(
        {},
        storage_writer=FileSystemWriter(folder, thread_count=1),
        planner=_Planner(chunks, packed),
        no_dist=True,
    )
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def _pack(data: Any) -> io.BytesIO:
    packed = io.BytesIO()
    torch.save([data], packed)
    packed.seek(0)
    return packed


class Reader:
    """Tensors of a distributed checkpoint by key."""

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        metadata = FileSystemReader(weights).read_metadata().state_dict_metadata
        self.shapes = {
            key: entry
            for key, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor under `key`, all layers."""
        entry = self.shapes[key]
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        state_dict_loader.load(state, storage_reader=FileSystemReader(self.weights), no_dist=True)
        return state[key]
