"""The device of a rehearsal: where each tensor is, what may meet, and what the host waits for.

A storage has a place. `Places` gives the results of an operation the place of its arguments, raises
where CUDA would, and notes every wait in `record`. rehearsal.py puts it in place.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
# No caller of what is here.
OWN_FILES = (__file__, __file__.replace("places.py", "rehearsal.py"))
# The device may take operands of the host where they are single numbers, but not in these.
TAKES_NO_HOST_NUMBERS = {"aten::stack", "aten::cat", "aten::_fused_adamw_", "aten::_fused_adam_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
WAITS = {
    "aten::_local_scalar_dense": "a number is read",
    **dict.fromkeys(("aten::nonzero", "aten::masked_select", "aten::argwhere"), "a count is read"),
    **dict.fromkeys(("aten::_unique2", "aten::unique_dim", "aten::bincount"), "a count is read"),
    **dict.fromkeys(("aten::equal", "aten::is_nonzero", "aten::multinomial"), "a test is read"),
}


@dataclass
class Record:
    """What a process did: where its host waited, and what it put on the device.

    `waits` counts (part of the run, what for, where in the code); `part` is the current one.
    """

    waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    collectives: Counter[tuple[str, str]] = field(default_factory=Counter)
    part: str = ""
    num_on_device: int = 0
    graph: list[tuple[Any, tuple, dict, Any]] | None = None

    def wait(self, reason: str) -> None:
        """The host waits here; RuntimeError while a graph is captured."""
        if self.graph is not None:
            raise RuntimeError(f"capture: the host waits ({reason}) at {caller()}")
        self.waits[self.part, reason, caller()] += 1


record = Record()
# The backend that each group was made for; all work over gloo.
backends: dict[str, str] = {}


def caller() -> str:
    """The innermost line of this package or Megatron, or of whatever else called."""
    frame: Any = sys._getframe(1)
    outside = ""
    while frame:
        file = frame.f_code.co_filename
        for root in ("/examples/mimo/", "/site-packages/megatron/", "/benchmarks/"):
            if root in file:
                return f"{file.rpartition(root)[2]}:{frame.f_lineno}"
        if not outside and "/site-packages/torch/" not in file and file not in OWN_FILES:
            outside = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return outside


def place(tensor: torch.Tensor) -> str:
    """Where a tensor is: "cuda", "cpu", "pinned" or "meta"."""
    if real_device(tensor).type == "meta":
        return "meta"
    try:
        return getattr(tensor.untyped_storage(), "place", "cpu")
    except (RuntimeError, NotImplementedError):  # several shards, each of which has its own
        return "cpu"


def put(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Say of a tensor's storage where it is."""
    tensor.untyped_storage().place = where
    record.num_on_device += where == "cuda"
    return tensor


def real_device(tensor: torch.Tensor) -> torch.device:
    """The device that torch itself knows."""
    with torch._C.DisableTorchFunctionSubclass():  # of a tensor in shards
        return torch._C.TensorBase.device.__get__(tensor)


def is_cuda(device: Any) -> bool:
    """Whether a `device` argument means the GPU."""
    if isinstance(device, bool) or device is None:
        return False
    return isinstance(device, int) or str(device).startswith("cuda")


class Places(TorchDispatchMode):
    """Every operation, below autograd: forward and backward, and collectives."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        places = [place(tensor) for tensor in tensors]
        if name.startswith("c10d::"):
            _check_collective(name, tensors, args)
            return func(*args, **kwargs)
        target = _target(name, places, kwargs)
        if name in ("aten::copy_", "aten::_to_copy"):
            blocks = not (args[2:] and args[2]) and not kwargs.get("non_blocking")
            source = places[-1] if name == "aten::copy_" else places[0]
            note_copy(source, target, blocks)
        elif "cuda" in places:
            _check_operands(name, tensors, places)
        if record.graph is not None and target == "cpu" and name != "aten::lift_fresh":
            raise RuntimeError(f"capture: {name} makes a tensor of the host at {caller()}")
        result = func(*args, **kwargs)
        if target in ("cuda", "pinned"):
            known = {tensor.untyped_storage()._cdata for tensor in tensors}
            for output in tree_leaves(result):
                is_tensor = isinstance(output, torch.Tensor) and place(output) != "meta"
                if is_tensor and output.untyped_storage()._cdata not in known:
                    put(output, target)
        if record.graph is not None:
            record.graph.append((func, args, kwargs, result))
        return result


def _target(name: str, places: list[str], kwargs: dict[str, Any]) -> str:
    """Where the results go; turns a `device` and `pin_memory` that torch would act on into none."""
    device = kwargs.get("device")
    if kwargs.pop("pin_memory", False):
        return "pinned"
    if is_cuda(device):
        kwargs["device"] = torch.device("cpu")
        return "cuda"
    if device is not None and name != "aten::_to_copy":
        return "cuda" if _is_autograds_own() else "cpu"
    if name in ("aten::copy_", *INDEXING):
        return places[0]
    return "cuda" if "cuda" in places else "cpu"


def _is_autograds_own() -> bool:
    """Whether a formula of autograd calls, which takes the device of a tensor that torch knows."""
    if torch._C._current_graph_task_id() == -1:
        return False
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/torch/_" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_name in ("custom_backward", "_engine_run_backward")


def note_copy(source: str, target: str, blocks: bool) -> None:
    """The host waits for a copy from pageable memory, and for any that is not asynchronous."""
    if "meta" in (source, target) or (source == "cuda") == (target == "cuda"):
        return
    host = target if source == "cuda" else source
    if blocks or host != "pinned":
        what = "to the host" if source == "cuda" else "to the device"
        record.wait(f"copy {what}, {'blocking' if host == 'pinned' else 'pageable'}")


def _check_operands(name: str, tensors: list[torch.Tensor], places: list[str]) -> None:
    """RuntimeError for operands on two devices; notes what makes the host wait."""
    strict = name in TAKES_NO_HOST_NUMBERS
    on_host = [
        (tuple(tensor.shape), tensor.dtype)
        for tensor, where in zip(tensors, places, strict=True)
        if where in ("cpu", "pinned") and (strict or tensor.dim())
    ]
    if on_host and name in INDEXING and places[0] == "cuda":
        values = places[-1:] if name != "aten::index" else []
        if values == ["cuda"] or not values or not tensors[-1].dim():
            record.wait("an index of the host")
            on_host = []
    if on_host and name != "aten::set_":
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {name} got {on_host} of the host "
            f"beside those of cuda:0, at {caller()}"
        )
    # A Python number in an assignment comes as a tensor, and its value is what is captured.
    numbers = name in ("aten::fill_", *INDEXING) and not on_host
    if record.graph is not None and not numbers and {"cpu", "pinned"} & set(places):
        raise RuntimeError(f"capture: {name} reads a tensor of the host at {caller()}")
    if name in WAITS:
        record.wait(WAITS[name])
    masks = [tensor for tensor in tensors[1:] if tensor.dtype in (torch.bool, torch.uint8)]
    fills = name != "aten::index" and tensors[-1].dim() == 0  # becomes masked_fill
    if name in INDEXING and masks and not fills:
        record.wait("a count of a mask is read")
    if name == "aten::repeat_interleave" and len(tensors) == 1:
        record.wait("a count is read")


def _check_collective(name: str, tensors: list[torch.Tensor], args: tuple) -> None:
    """RuntimeError unless the group's backend takes tensors that are where these are."""
    objects = [x for x in tree_leaves(args) if isinstance(x, torch.ScriptObject)]
    groups = [x for x in objects if "ProcessGroup" in str(x._type())]
    names = {dist.ProcessGroup.unbox(group).group_name for group in groups}
    backend = next((backends.get(group, "nccl") for group in names), "nccl")
    record.collectives[name, backend] += 1
    wrong = {place(tensor) for tensor in tensors} - {{"nccl": "cuda"}.get(backend, "cpu")}
    if wrong and name != "c10d::barrier" and backend != "fake":
        raise RuntimeError(f"{name}: a {backend} group got {wrong} tensors at {caller()}")
