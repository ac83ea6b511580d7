"""Hugging Face folders: config.json and safetensors, tensor by tensor; nothing is unpickled.

A distributed checkpoint written and read tensor by tensor, so that no model is held whole.

The files are Megatron's own `torch_dist` format: what `--load` and `avlm_inference.py` read.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors import SafetensorError, safe_open
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

from examples.mimo.hf.weights import Family

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored(NamedTuple):
    """Where a tensor is, and what it is like."""

    file: Path
    shape: tuple[int, ...]
    kind: str


class Folder:
    """The config and the tensors of a folder; ValueError, one line, for one that is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = self._read_json("config.json")
        self.model_type = str(self.settings.get("model_type"))
        self._stored = self._find_tensors()

    def section(self, family: Family) -> Any:
        """The transformers config of the part that `family` describes, defaults filled in."""
        from transformers import CONFIG_MAPPING

        where = family.sections[self.model_type]
        values = self.settings.get(where, {}) if where else self.settings
        own = values.get("model_type", family.name)
        if own not in CONFIG_MAPPING:
            raise ValueError(f"{self.path}/config.json: unknown model type {own!r}")
        return CONFIG_MAPPING[own].from_dict(dict(values))

    def names(self, family: Family) -> dict[str, str]:
        """The family's spelling of a tensor's name -> its name in the files."""
        spelled = {_respell(name, family): name for name in self._stored}
        for root in family.roots:
            if root + family.anchor in spelled:
                return {n.removeprefix(root): f for n, f in spelled.items() if n.startswith(root)}
        raise ValueError(
            f"{self.path}: no tensor {family.anchor} of a {family.name} in this folder's files"
        )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now; the file is closed again, so that its pages can be forgotten."""
        with _opened(self._stored[name].file) as opened:
            return opened.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, without reading it."""
        kind = self._stored[name].kind
        if kind not in DTYPES:
            raise ValueError(f"{self.path}: {name} is {kind}; {', '.join(DTYPES)} are read")
        return DTYPES[kind]

    def _find_tensors(self) -> dict[str, Stored]:
        if (self.path / INDEX).is_file():
            listed = self._read_json(INDEX).get("weight_map")
            if not isinstance(listed, dict):
                raise ValueError(f"{self.path}/{INDEX}: no weight_map in it")
            files = sorted({self._inside(str(file)) for file in listed.values()})
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ValueError(
                    f"{self.path}: {len(missing)} files of the index are missing, such as "
                    f"{missing[0]}; finish the download"
                )
            found = {name: entry for file in files for name, entry in _list(file).items()}
            lost = sorted(set(listed) - set(found))
            if lost:
                raise ValueError(f"{self.path}: the index lists {lost[0]}, and no file holds it")
            return found
        if (self.path / SINGLE).is_file():
            return _list(self.path / SINGLE)
        if any(self.path.glob("*.bin")):
            raise ValueError(
                f"{self.path}: holds pickled .bin weights, which are not read; load them with "
                "transformers where you trust them and save_pretrained() them as safetensors"
            )
        raise ValueError(f"{self.path}: no {SINGLE} in this folder")

    def _inside(self, name: str) -> Path:
        file = (self.path / name).resolve()
        if not file.is_relative_to(self.path.resolve()):
            raise ValueError(f"{self.path}/{INDEX}: {name} lies outside the folder")
        return file

    def _read_json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such folder")
        if not file.is_file():
            raise ValueError(f"{self.path}: not a Hugging Face folder ({name} is missing)")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{file}: not JSON") from None
        if not isinstance(values, dict):
            raise ValueError(f"{file}: not a JSON object")
        return values


def _list(file: Path) -> dict[str, Stored]:
    """What a file holds, from its header."""
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: Stored(file, tuple(part.get_shape()), part.get_dtype())
            for name, part in slices.items()
        }


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged or half downloaded ({error})") from None


def _respell(name: str, family: Family) -> str:
    for pattern, replacement in family.spellings:
        name = re.sub(pattern, replacement, name)
    return name


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
