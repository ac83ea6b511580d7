"""Replacements in Megatron: those of every machine, and those for training.

`wheel_replacements`, `unpickler_replacements` and `compiled_replacements` are for every command.
The others are for training: hooks that let an observer follow `pretrain()`, which has no callbacks;
the queue of checkpoint writers; the tracker of checkpoints; the position in the data of virtual
stages; and what non-colocated encoders need.

A checkpoint cannot run code. A pickle says which functions to call, so unpickling a stranger's file
runs what the stranger chose, and torch and Megatron unpickle three parts of a checkpoint:

- `.metadata`, which says where each tensor is: here with `MetadataUnpickler`;
- objects among the weights, such as random states, Megatron's arguments (`common_state`) and FP8
  scales (`_extra_state`): here with `torch.load(weights_only=True)` and Megatron's list of classes;
- `common.pt`, which older Megatron wrote instead of `common_state`: the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import io
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import megatron.core.datasets.utils as dataset_utils
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.safe_globals import SAFE_GLOBALS
from megatron.training import checkpointing, training
from torch.distributed.checkpoint import default_planner, filesystem, metadata

from examples.mimo.checkpoint.integrity import COMMON_STATE, checked_first, with_manifest
from examples.mimo.compat import Replacement

# What Megatron's training reads a checkpoint with.
LOADERS = (COMMON_STATE, "load")
TRACKER = "latest_checkpointed_iteration.txt"

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


def wheel_replacements() -> list[Replacement]:
    """Skip the build of an extension that the wheel already holds."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return []
    reason = "initialize.py: _compile_dependencies runs make, and the wheel has no Makefile"
    return [Replacement(dataset_utils, "compile_helpers", lambda: None, reason)]


def compiled_replacements() -> list[Replacement]:
    """Rotary positions compiled into one kernel; for machines with CUDA and a compiler."""
    name = "_apply_rotary_pos_emb_bshd"
    compiled = torch.compile(getattr(rope_utils, name), dynamic=True)
    reason = "rope_utils.py: ten kernels pass over all queries and keys of a layer, and it has two"
    return [Replacement(rope_utils, name, compiled, reason)]


def observer_hooks(observer: Any) -> list[Replacement]:
    """Functions of Megatron's training loop that tell `observer` where this rank is.

    `observer.enter(phase)` is called before and after each; some also report what they returned.
    """

    def hook(
        name: str, phase: str | None, report: Callable[[Any, dict[str, Any]], None] | None = None
    ) -> Replacement:
        wrapped = _observed(observer, getattr(training, name), phase, report)
        return Replacement(training, name, wrapped, "training.py: pretrain() offers no callbacks")

    return [
        hook(
            "setup_model_and_optimizer",
            "building the model and loading weights",
            lambda result, call: observer.model_built(result[0]),
        ),
        hook("build_train_valid_test_data_iterators", "opening the data"),
        hook("train_step", "iteration {iteration}, computing"),
        hook(
            "training_log",
            None,
            lambda result, call: observer.iteration_done(
                call["loss_dict"], call["learning_rate"], call["iteration"], call["grad_norm"]
            ),
        ),
        hook("save_checkpoint_and_time", "iteration {iteration}, saving a checkpoint"),
        hook(
            "evaluate",
            "evaluation after iteration {iteration}",
            lambda result, call: observer.evaluated(result[0]),
        ),
    ]


def _observed(
    observer: Any,
    function: Callable[..., Any],
    phase: str | None,
    report: Callable[[Any, dict[str, Any]], None] | None,
) -> Callable[..., Any]:
    """`function` within `phase`; `report` gets its result and its arguments by name."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def observed(*args: Any, **kwargs: Any) -> Any:
        if phase:
            observer.enter(phase)
        result = function(*args, **kwargs)
        if report:
            report(result, signature.bind(*args, **kwargs).arguments)
        if phase:
            observer.enter("after iteration {iteration}")
        return result

    return observed


def integrity_replacements() -> list[Replacement]:
    """Saving and loading with this package's manifest where Megatron has its `verify_integrity`."""
    reason = (
        "dist_checkpointing/validation.py: on rank 0 alone, save_integrity_manifest reads all that "
        "other ranks wrote, without folders"
    )
    checked = {name: checked_first(getattr(dist_checkpointing, name)) for name in LOADERS}
    changed = {"save": with_manifest(dist_checkpointing.save), **checked}
    return [Replacement(dist_checkpointing, name, new, reason) for name, new in changed.items()]


def results_queue_replacement(queue: Any) -> list[Replacement]:
    """The queue through which the writers of a checkpoint report, from `start_results_queue`."""
    reason = (
        "filesystem_async.py: starts an interpreter on each rank at the first save, which "
        "outlives a rank that is killed or fails"
    )
    return [Replacement(filesystem_async, "_results_queue", queue, reason)]


def dataloader_replacements() -> list[Replacement]:
    """Save the position in the data of a rank whose virtual stages each have an iterator."""
    save = checkpointing.maybe_save_dataloader_state

    def save_of_first_stage(iterators: Any, *args: Any, **kwargs: Any) -> None:
        """All virtual stages of a rank are at the same position between two iterations."""
        save(iterators[0] if isinstance(iterators, list) else iterators, *args, **kwargs)

    reason = "checkpointing.py: maybe_save_dataloader_state takes one iterator, not one per stage"
    return [Replacement(checkpointing, "maybe_save_dataloader_state", save_of_first_stage, reason)]


def tracker_replacement() -> list[Replacement]:
    """File functions that write the tracker whole or not at all."""
    reason = (
        "checkpointing.py: empties the tracker before it writes it, so that a kill or a full disk "
        "between the two loses the checkpoint that it names"
    )
    return [Replacement(checkpointing, "maybe_msc", TrackerFiles(checkpointing.maybe_msc), reason)]


class TrackerFiles:
    """Megatron's own file functions, but a tracker on a local disk is replaced in one step."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    @contextlib.contextmanager
    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Iterator[Any]:
        """As `open`; of a tracker that is written, other processes see the old or the new."""
        is_tracker = os.path.basename(path) == TRACKER and "w" in mode and "://" not in path
        target = f"{path}.new" if is_tracker else path
        with self._files.open(target, mode, **kwargs) as file:
            yield file
            if is_tracker:
                file.flush()
                os.fsync(file.fileno())
        if is_tracker:
            os.replace(target, path)


def start_results_queue() -> Any:
    """A queue served by a forked helper, which ends when this process does, however that is.

    Call it while this process has no threads: a fork keeps the locks that others hold.
    """
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_end_with_parent)
    return manager.Queue()


def _end_with_parent() -> None:
    def wait_for_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    threading.Thread(target=wait_for_parent, daemon=True).start()


def noncolocated_replacements(
    state: dict[str, Any], wrap_optimizer: Callable[..., Any]
) -> list[Replacement]:
    """Parallel state of one module, and an optimizer whose gradient norm spans all modules."""
    one_model = "parallel_state.py: knows the groups of one model, and each module has its own"
    one_norm = "training.py: setup_model_and_optimizer clips the gradient of this rank's module"
    build = wrap_optimizer(training.get_megatron_optimizer)
    return [
        Replacement(training, "get_megatron_optimizer", build, one_norm),
        *(Replacement(parallel_state, name, value, one_model) for name, value in state.items()),
    ]


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
