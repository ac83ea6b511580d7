"""Loading of checkpoints that cannot run code: the classes that their pickles may name.

A pickle says which functions to call, so unpickling a stranger's file runs what the stranger chose.
Torch and Megatron unpickle three parts of a distributed checkpoint:

- `.metadata`, which says where each tensor is: here with `MetadataUnpickler`;
- objects among the weights, such as random states, Megatron's arguments (`common_state`) and FP8
  scales (`_extra_state`): here with `torch.load(weights_only=True)` and Megatron's list of classes;
- `common.pt`, which older Megatron wrote instead of `common_state`: the same.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.safe_globals import SAFE_GLOBALS
from torch.distributed.checkpoint import default_planner, filesystem, metadata

from examples.mimo.compat import Replacement

# What torch writes into `.metadata`, by the name in the pickle.
METADATA_CLASSES: dict[str, Any] = {
    f"{item.__module__}.{item.__qualname__}": item
    for item in (
        *(OrderedDict, torch.Size, filesystem._StorageInfo, torch.serialization._get_layout),
        *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta),
        *(metadata.TensorStorageMetadata, metadata.ChunkStorageMetadata),
        *(metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING, metadata.BytesStorageMetadata),
    )
}
METADATA_CLASSES |= {str(x): x for x in vars(torch).values() if isinstance(x, torch.dtype)}
# Where the checkpoint was saved; nothing reads it, and Python 3.13 has its classes elsewhere.
METADATA_CLASSES |= dict.fromkeys(("pathlib.PosixPath", "pathlib._local.PosixPath"), PurePosixPath)


class UnsafePickleError(ValueError):
    """A file of a checkpoint names a class that no checkpoint needs; nothing of it was called."""


def unpickler_replacements() -> list[Replacement]:
    """Load the pickles of a checkpoint with the classes that checkpoints need, and no others."""
    return [
        Replacement(
            filesystem,
            "pickle",
            MetadataPickle(),
            "filesystem.py: FileSystemReader.read_metadata unpickles whatever .metadata names",
        ),
        Replacement(
            default_planner.DefaultLoadPlanner,
            "load_bytes",
            _load_bytes,
            "default_planner.py: load_bytes unpickles objects among the weights with "
            "weights_only=False",
        ),
        Replacement(
            serialization,
            "load_common",
            _load_common,
            "strategies/common.py: load_common leaves weights_only to an environment variable",
        ),
    ]


class MetadataPickle:
    """What `filesystem.py` uses of the module pickle: writes as that does, reads `.metadata`."""

    dump = staticmethod(pickle.dump)

    @staticmethod
    def load(file: Any) -> metadata.Metadata:
        """The `.metadata` in `file`; UnsafePickleError when it holds anything else."""
        result = MetadataUnpickler(file).load()
        if type(result) is not metadata.Metadata:
            raise UnsafePickleError(f".metadata holds {type(result).__name__}, not Metadata")
        _check_files(result)
        return result


class MetadataUnpickler(pickle.Unpickler):
    """Knows METADATA_CLASSES, and imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function that a pickle names; UnsafePickleError for an unknown one."""
        full_name = f"{module}.{name}"
        if full_name not in METADATA_CLASSES:
            _refuse(".metadata", full_name)
        return METADATA_CLASSES[full_name]


def _check_files(checkpoint: metadata.Metadata) -> None:
    """UnsafePickleError for a place outside the checkpoint, such as a device or another folder."""
    for info in checkpoint.storage_data.values():
        place = getattr(info, "relative_path", None)
        if type(place) is not str or not re.fullmatch(r"[\w.-]+", place) or place == "..":
            raise UnsafePickleError(f".metadata names the file {place!r}, outside the checkpoint")


def _load_bytes(planner: default_planner.DefaultLoadPlanner, item: Any, value: io.BytesIO) -> None:
    """As `DefaultLoadPlanner.load_bytes`."""
    name = item.dest_index.fqn
    loaded = load_object(value, name)
    if planner.flatten_state_dict:
        default_planner.set_element(planner.original_state_dict, planner.mappings[name], loaded)
    else:
        planner.state_dict[name] = loaded


def _load_common(checkpoint_dir: str) -> Any:
    """As Megatron's `load_common`; the caller has seen that the file is there."""
    file = Path(checkpoint_dir) / COMMON_STATE_FNAME
    return load_object(io.BytesIO(file.read_bytes()), COMMON_STATE_FNAME)


def load_object(file: io.BytesIO, name: str) -> Any:
    """What `torch.save` wrote to `file`; UnsafePickleError when it names an unknown class."""
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        _refuse(name, named[1] if named else "a pickle of another kind than torch.save writes")


def _refuse(where: str, class_name: str) -> NoReturn:
    raise UnsafePickleError(
        f"{where} holds {class_name}, which no checkpoint needs and which could run code; "
        "nothing was loaded"
    )
