"""Readers and writers of weights, one tensor at a time: no model is held in memory whole.

`Folder` reads a Hugging Face folder: config.json and safetensors; nothing is unpickled.
`write_checkpoint` and `CheckpointReader` write and read Megatron's `torch_dist` format.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
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

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import read_json
from examples.mimo.hf.weights import Family

CONFIG = "config.json"
# How files become inputs: one or the other, the second with a section for each kind of file.
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Beside them: what Megatron holds and the family's tensors cannot, such as the bias of Whisper's
# keys. transformers does not look at this file.
REMAINDER = "mimo.safetensors"
# In the config.json of a language model with outputs: the ids of their markers and codes.
OUTPUT_IDS = "mimo_outputs"
# The model type of a folder whose tensors have this package's names.
OWN_MODEL_TYPE = "mimo"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of files that strangers wrote; models of a trillion weights have fewer.
MAX_JSON_BYTES, MAX_TENSORS, MAX_FILES = 2**26, 200_000, 10_000
# Megatron's; versions before 2.0 order fused queries, keys and values differently.
CHECKPOINT_VERSION = 3.0


@contextlib.contextmanager
def draft_folder(save: Path) -> Iterator[Path]:
    """A folder beside `save` that takes its place at the end, or is gone after an error.

    ValueError when there is something at `save` already.
    """
    save = save.resolve()
    if save.exists() and not save.is_dir():
        raise ValueError(f"--save {save}: this is a file; name a new folder")
    if save.exists() and any(save.iterdir()):
        raise ValueError(f"--save {save}: this folder is not empty; name a new one")
    new_parents = [parent for parent in save.parents if not parent.exists()]
    draft = save.with_name(f".{save.name}.partial")
    # A process that was killed could not clean up.
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(save)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in new_parents:
                parent.rmdir()
        raise


def output_ids(config: MimoConfig) -> dict[str, list[int]]:
    """Begin marker, end marker, first code and number of codes of each output."""
    return {
        name: [output.begin_id, output.end_id, output.first_id, output.codec.num_codes]
        for name, output in config.outputs.items()
    }


class TensorInfo(NamedTuple):
    """Where a tensor is stored, and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Folder:
    """The config and the tensors of a Hugging Face folder.

    ValueError, one line, for a folder that is damaged or incomplete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = self._read_json(CONFIG)
        self.model_type = str(self.settings.get("model_type"))
        self.tensors = self._list_tensors()

    def hf_config(self, family: Family) -> Any:
        """The transformers config of the part that `family` describes, defaults filled in."""
        from transformers import CONFIG_MAPPING

        section = family.sections[self.model_type]
        values = self.settings.get(section, {}) if section else self.settings
        model_type = values.get("model_type", family.name)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"{self.path}/{CONFIG}: unknown model type {model_type!r}")
        return CONFIG_MAPPING[model_type].from_dict(dict(values))

    def preprocessor(self, family: Family) -> tuple[str, dict[str, Any]] | None:
        """Which file says how inputs of `family` are made, and what it says; None without one."""
        if family.preprocessor is None:
            return None
        if (self.path / PROCESSOR).is_file():
            section = self._read_json(PROCESSOR).get(family.preprocessor.section)
            if isinstance(section, dict):
                return PROCESSOR, section
        if (self.path / PREPROCESSOR).is_file():
            return PREPROCESSOR, self._read_json(PREPROCESSOR)
        return None

    def names(self, family: Family) -> dict[str, str]:
        """The family's spelling of a tensor's name -> its name in the files."""
        spelled = {_respell(name, family): name for name in self.tensors}
        for root in family.roots:
            if root + family.anchor in spelled:
                return {n.removeprefix(root): f for n, f in spelled.items() if n.startswith(root)}
        raise ValueError(
            f"{self.path}: no tensor {family.anchor} of a {family.name} in this folder's files"
        )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now; the file is closed again, so that its pages can be forgotten."""
        with _opened(self.tensors[name].file) as opened:
            return opened.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, without reading it."""
        stored = self.tensors[name].dtype
        if stored not in DTYPES:
            raise ValueError(f"{self.path}: {name} is {stored}; {', '.join(DTYPES)} are read")
        return DTYPES[stored]

    def remainder(self) -> dict[str, torch.Tensor]:
        """What `REMAINDER` holds: Megatron key -> values, and `KEY.at` -> flat positions."""
        file = self.path / REMAINDER
        if not file.is_file():
            return {}
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: damaged or half downloaded ({error})") from None

    def _list_tensors(self) -> dict[str, TensorInfo]:
        if (self.path / INDEX).is_file():
            return self._list_indexed_tensors()
        if (self.path / SINGLE).is_file():
            return _list_file(self.path / SINGLE)
        if any(self.path.glob("*.bin")):
            raise ValueError(
                f"{self.path}: holds pickled .bin weights, which are not read; load them with "
                "transformers where you trust them and save_pretrained() them as safetensors"
            )
        raise ValueError(f"{self.path}: no {SINGLE} in this folder")

    def _list_indexed_tensors(self) -> dict[str, TensorInfo]:
        weight_map = self._read_json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{self.path}/{INDEX}: no weight_map in it")
        names = {str(name) for name in weight_map.values()}
        if len(weight_map) > MAX_TENSORS or len(names) > MAX_FILES:
            raise ValueError(
                f"{self.path}/{INDEX}: {len(weight_map):,} tensors in {len(names):,} files, more "
                f"than {MAX_TENSORS:,} in {MAX_FILES:,}"
            )
        files = sorted({self._inside(name) for name in names})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} files of the index are missing, such as "
                f"{missing[0]}; finish the download"
            )
        tensors = {name: info for file in files for name, info in _list_file(file).items()}
        lost = sorted(set(weight_map) - set(tensors))
        if lost:
            raise ValueError(f"{self.path}: the index lists {lost[0]}, and no file holds it")
        return tensors

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
        return read_json(file, MAX_JSON_BYTES)


def _list_file(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file, from its header."""
    with _opened(file) as opened:
        names = opened.keys()
        if len(names) > MAX_TENSORS:
            raise ValueError(f"{file}: {len(names):,} tensors, more than {MAX_TENSORS:,}")
        slices = {name: opened.get_slice(name) for name in names}
        return {
            name: TensorInfo(file, tuple(tensor.get_shape()), tensor.get_dtype())
            for name, tensor in slices.items()
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


@dataclass(frozen=True)
class Chunk:
    """A box of the tensor `key`, whose whole shape is `global_shape`; read when it is written."""

    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    def write_item(self) -> WriteItem:
        """The chunk as torch.distributed.checkpoint plans it."""
        box = ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.shape))
        properties = TensorProperties(dtype=self.dtype)
        return WriteItem(
            MetadataIndex(self.key, torch.Size(self.offsets)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(box, properties, torch.Size(self.global_shape)),
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


def write_checkpoint(
    folder: Path, chunks: Iterable[Chunk], objects: Iterable[ShardedObject]
) -> None:
    """Write `chunks` and Megatron's `objects` into the empty `folder`, as `--load` reads them."""
    common = {"checkpoint_version": CHECKPOINT_VERSION, "iteration": 0}
    all_objects = [*objects, ShardedObject("common_state", common, (1,), (0,))]
    packed = {item.unique_key: _pack(item.data) for item in all_objects}
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


class CheckpointReader:
    """Tensors of a distributed checkpoint by key."""

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        metadata = FileSystemReader(weights).read_metadata().state_dict_metadata
        self.tensors = {
            key: stored
            for key, stored in metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor `key`, all layers."""
        stored = self.tensors[key]
        state = {key: torch.empty(stored.size, dtype=stored.properties.dtype)}
        state_dict_loader.load(state, storage_reader=FileSystemReader(self.weights), no_dist=True)
        return state[key]
