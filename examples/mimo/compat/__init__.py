"""Everything this package replaces in torch and Megatron, in one table.

`replacements()` returns the table and `python -m examples.mimo.compat` prints it: what is
replaced, and which Megatron file needs that. Nothing else in the package sets an attribute of a
module or class of theirs.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from examples.mimo.cli.command import log_line

# torch reads it when something is to be compiled, which Megatron does while it is imported.
DISABLE_COMPILER = "TORCHDYNAMO_DISABLE"


class Replacement(NamedTuple):
    """`owner.attribute` becomes `replacement`, for the Megatron file and reason in `needed_by`."""

    owner: Any
    attribute: str
    replacement: Any
    needed_by: str

    @property
    def name(self) -> str:
        """The attribute with its full path, as one would type it."""
        module = self.owner.__name__
        if isinstance(self.owner, type):
            module = f"{self.owner.__module__}.{self.owner.__qualname__}"
        return f"{module}.{self.attribute}"


@functools.cache
def install() -> list[Replacement]:
    """Make Megatron run on this machine; every command calls this before it imports Megatron.

    With CUDA, five functions change: three that unpickle checkpoints, which know the classes that
    checkpoints need and no others; the one that runs `make` in Megatron's source tree, which a
    wheel lacks; and rotary positions, which are compiled. Where torch's compiler cannot work,
    `TORCHDYNAMO_DISABLE` is set instead. Without CUDA, the importing process changes for good:

    - `Tensor.cuda` and `Module.cuda` return the tensor or module as it is, and factories such as
      `torch.zeros` take `device="cuda"` and `pin_memory=True` to mean plain CPU memory;
    - `torch.cuda`'s device, stream, event and random-number functions answer for the CPU, while
      `torch.cuda.is_available()` stays False;
    - `Tensor.type()` returns a name that equals both `torch.FloatTensor` and its CUDA spelling;
    - `torch.distributed.barrier` ignores `device_ids`, and ranks of one machine reduce tensors
      through shared memory;
    - Megatron starts without asserting CUDA and does not warm up CUDA kernels;
    - `TORCHDYNAMO_DISABLE` is set, and threads other than this one compute without helpers.

    A Transformer Engine that is installed and does not import is hidden from Megatron.

    A second call changes nothing more. Returns the entries now in place.
    """
    import torch

    _hide_broken_transformer_engine()
    entries = []
    if not torch.cuda.is_available():
        from examples.mimo.compat import cpu

        os.environ.setdefault(DISABLE_COMPILER, "1")
        cpu.compute_in_this_thread_only()
        os.register_at_fork(after_in_child=cpu.compute_in_this_thread_only)
        # Megatron takes some of these by name when it is imported, so torch comes first.
        entries += _put_in_place(cpu.torch_replacements())
        entries += _put_in_place(cpu.megatron_replacements())
        from examples.mimo.compat import kernels, shared_memory

        entries += _put_in_place(kernels.cpu_replacements())
        entries += _put_in_place(shared_memory.allreduce_replacement())
    elif missing := missing_for_compiling():
        disable_compiler(missing)
    from examples.mimo.compat import megatron

    if torch.cuda.is_available() and os.environ.get(DISABLE_COMPILER) != "1":
        entries += _put_in_place(megatron.compiled_replacements())

    entries += _put_in_place(megatron.unpickler_replacements())
    return entries + _put_in_place(megatron.wheel_replacements())


def _hide_broken_transformer_engine() -> None:
    """Have every import of a Transformer Engine that does not work say that there is none.

    Megatron looks for it in many places. Some are content with the package, and fail at what it
    lacks: without its torch part, or without the driver's library, Megatron could not be imported.
    """
    name = "transformer_engine"
    if sys.modules.get(name) or importlib.util.find_spec(name) is None:
        return
    try:
        importlib.import_module(f"{name}.pytorch")
    except Exception as error:
        for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
            del sys.modules[loaded]
        sys.modules[name] = None  # type: ignore[assignment]  # what Python knows as absent
        if os.environ.get("RANK", "0") == "0":
            reason = " ".join(str(error).split())
            logging.getLogger(__name__).warning(
                "  Transformer Engine is installed, but does not import (%s: %s); layers are local",
                type(error).__name__,
                reason,
            )


def missing_for_compiling() -> str | None:
    """What torch's compiler needs and this machine lacks; None where it has all.

    For every kernel Triton builds a launcher, by $CC, gcc or clang, which includes Python.h.
    """
    compiler = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([compiler] if compiler else ["gcc", "clang"])):
        return f"{compiler} ($CC)" if compiler else "a C compiler (gcc or clang, or $CC)"
    scheme = sysconfig.get_default_scheme()
    # As Triton has it: the other is Debian's, for what `pip install` adds.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    return None if header.is_file() else str(header)


def disable_compiler(missing: str) -> None:
    """Let Megatron's fused functions run uncompiled; rank 0 says so, unless the user chose that."""
    if DISABLE_COMPILER in os.environ:
        return
    os.environ[DISABLE_COMPILER] = "1"
    if os.environ.get("RANK", "0") == "0":
        log_line(
            f"  {missing} is missing, so nothing is compiled and the GPU computes more slowly; "
            "install it"
        )


def install_for_training(observer: Any, saves_checkpoints: bool) -> None:
    """Let `observer` follow `pretrain()`, and give Megatron what checkpoints need to load and save.

    Call it before the process group starts: saving forks a helper while there are no threads.
    """
    from examples.mimo.compat import kernels, megatron

    _put_in_place(megatron.observer_hooks(observer))
    _put_in_place(kernels.optimizer_replacements())
    _put_in_place(megatron.integrity_replacements())
    if saves_checkpoints:
        _put_in_place(megatron.dataloader_replacements())
        _put_in_place(megatron.tracker_replacement())
        install_results_queue()


def install_results_queue() -> None:
    """Start the helper through which this rank's checkpoint writers report; once a process."""
    from examples.mimo.compat import megatron

    _put_in_place(megatron.results_queue_replacement(megatron.start_results_queue()))


def install_for_noncolocated(
    parallel_state: dict[str, Any], wrap_optimizer: Callable[..., Any]
) -> None:
    """Give Megatron the parallel state of this rank's module, and an optimizer for all modules.

    `parallel_state` maps Megatron's globals to values; `wrap_optimizer` takes the function that
    builds Megatron's optimizer and returns the one to call instead.
    """
    from examples.mimo.compat import megatron

    _put_in_place(megatron.noncolocated_replacements(parallel_state, wrap_optimizer))


def replacements() -> dict[str, list[Replacement]]:
    """Every entry that this machine needs, by the commands that put it in place."""
    entries = install()
    from examples.mimo.compat import kernels, megatron
    from examples.mimo.parallel.noncolocated import parallel_state_globals

    return {
        "every command and Mimo.load": entries,
        "train.py": [
            *megatron.observer_hooks(None),
            *kernels.optimizer_replacements(),
            *megatron.dataloader_replacements(),
            *megatron.integrity_replacements(),
            *megatron.results_queue_replacement(None),
            *megatron.tracker_replacement(),
        ],
        "train.py --encoder-ranks": megatron.noncolocated_replacements(
            parallel_state_globals(), lambda build: build
        ),
    }


def _put_in_place(entries: list[Replacement]) -> list[Replacement]:
    for entry in entries:
        setattr(entry.owner, entry.attribute, entry.replacement)
    return entries
