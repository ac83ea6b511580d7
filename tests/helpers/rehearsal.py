"""CPU tensors that behave like those of one GPU: the code for CUDA runs where there is none.

Every storage has a place: "cuda", "cpu" or "pinned" memory. A dispatch mode gives the results of an
operation the place of its arguments, and raises where CUDA would: for operands in two places, for
a collective on a group whose backend does not take them. It notes everything that makes the host
wait for the device, and inside a CUDA graph's capture refuses it, and any tensor of the host.
A captured graph is a list of operations, and a replay runs them again on the same tensors.

`CUDA_VISIBLE_DEVICES=""` hides the device, as it does a real one.

What a rehearsal cannot show: kernels and what they round, their speed, memory, the order of work
on streams, NCCL (hangs, and groups that ranks create in another order), Transformer Engine.

`python -m tests.helpers.rehearsal [PATH...]` runs paths of tests/helpers/rehearsed.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
NAME = "NVIDIA H100 80GB HBM3"
MEMORY = 80 * 2**30
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
            raise RuntimeError(f"capture: the host waits ({reason}) at {_caller()}")
        self.waits[self.part, reason, _caller()] += 1


record = Record()
# The backend that each group was made for; all work over gloo.
backends: dict[str, str] = {}


def _caller() -> str:
    """The innermost line of this package or Megatron, or of whatever else called."""
    frame: Any = sys._getframe(1)
    outside = ""
    while frame:
        file = frame.f_code.co_filename
        for root in ("/examples/mimo/", "/site-packages/megatron/", "/benchmarks/"):
            if root in file:
                return f"{file.rpartition(root)[2]}:{frame.f_lineno}"
        if not outside and "/site-packages/torch/" not in file and file != __file__:
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
            _note_copy(source, target, blocks)
        elif "cuda" in places:
            _check_operands(name, tensors, places)
        if record.graph is not None and target == "cpu" and name != "aten::lift_fresh":
            raise RuntimeError(f"capture: {name} makes a tensor of the host at {_caller()}")
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


def _note_copy(source: str, target: str, blocks: bool) -> None:
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
            f"beside those of cuda:0, at {_caller()}"
        )
    # A Python number in an assignment comes as a tensor, and its value is what is captured.
    numbers = name in ("aten::fill_", *INDEXING) and not on_host
    if record.graph is not None and not numbers and {"cpu", "pinned"} & set(places):
        raise RuntimeError(f"capture: {name} reads a tensor of the host at {_caller()}")
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
        raise RuntimeError(f"{name}: a {backend} group got {wrong} tensors at {_caller()}")


def _moved(tensor: torch.Tensor, where: str, blocks: bool = True) -> torch.Tensor:
    """A copy in another place; the tensor itself if it is there already."""
    current = place(tensor)
    if current == "meta":
        raise NotImplementedError(f"Cannot copy out of meta tensor; no data! ({_caller()})")
    if (current == "cuda") == (where == "cuda"):
        return tensor
    # Asynchronous copies to the host go to pinned memory.
    where = "pinned" if where == "cpu" and not blocks else where
    _note_copy(current, where, blocks)
    return put(tensor.clone(), where)


def _to(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        values = list(args)
        device = kwargs.pop("device", None)
        if values and isinstance(values[0], torch.Tensor):
            device, values[0] = values[0].device, values[0].dtype
        elif values and not isinstance(values[0], torch.dtype):
            device = values.pop(0)
        dtype = values.pop(0) if values else kwargs.pop("dtype", None)
        blocks = not (values[:1] == [True] or kwargs.pop("non_blocking", False))
        kwargs |= {} if dtype is None else {"dtype": dtype}
        if "meta" in (str(device), place(self)):
            return real(self, device, **kwargs)
        result = real(self, **kwargs) if kwargs else self
        if device is None:
            return result
        return _moved(result, "cuda" if is_cuda(device) else "cpu", blocks)

    return to


def _from_list(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor` and `as_tensor`, which fill memory of the host before they copy it."""

    @functools.wraps(real)
    def make(*args: Any, device: Any = None, pin_memory: bool = False, **kw: Any) -> torch.Tensor:
        for number in tree_leaves(args[0]) if args and isinstance(args[0], list | tuple) else ():
            if isinstance(number, torch.Tensor) and place(number) == "cuda":
                record.wait("a number is read")
        if not is_cuda(device):
            kw |= {} if device is None else {"device": device}
            result = real(*args, **kw)
            return put(result.clone(), "pinned") if pin_memory else result
        return _moved(real(*args, **kw), "cuda")

    return make


def _refuses_device(real: Callable[..., Any]) -> Callable[..., Any]:
    def numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if place(self) == "cuda" and not kwargs.get("force"):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy at {_caller()}")
        return real(self, *args, **kwargs)

    return numpy


def _waits(real: Callable[..., Any], reason: str) -> Callable[..., Any]:
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if place(self) == "cuda":
            record.wait(reason)
        return real(self, *args, **kwargs)

    return call


def _names_cuda(real: Callable[..., Any]) -> Callable[..., Any]:
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        is_name = isinstance(result, str) and place(self) == "cuda"
        return result.replace("torch.", "torch.cuda.") if is_name else result

    return tensor_type


def _pinned(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    return tensor if place(tensor) == "pinned" else put(tensor.clone(), "pinned")


class Graph:
    """`torch.cuda.CUDAGraph`: the operations of a capture, run again on the same tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.operations: list[tuple[Any, tuple, dict, Any]] = []

    def replay(self) -> None:
        """Run them, and put what they make where the captured results are."""
        with _disable_current_modes():
            for func, args, kwargs, captured in self.operations:
                result = func(*args, **kwargs)
                for new, old in zip(tree_leaves(result), tree_leaves(captured), strict=True):
                    is_tensor = isinstance(new, torch.Tensor)
                    if is_tensor and new.untyped_storage()._cdata != old.untyped_storage()._cdata:
                        old.copy_(new)

    def reset(self) -> None:
        """Forget them."""
        self.operations = []


@contextlib.contextmanager
def capture(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    record.graph = graph.operations
    try:
        yield
    finally:
        record.graph = None


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, which has no CPU kernel: (T, heads, d)."""
    assert place(cu_seq_q) == place(cu_seq_k) == "cuda"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.dtype in (torch.float16, torch.bfloat16), "flash attention takes 16 bits"
    with _disable_current_modes():
        bounds = [torch.Tensor.numpy(x, force=True).tolist() for x in (cu_seq_q, cu_seq_k)]
    assert bounds[0][-1] == len(query)
    assert bounds[1][-1] == len(key)
    outputs = []
    for (start, end), (first, last) in zip(*map(pairwise, bounds), strict=True):
        assert end - start <= max_q
        assert last - first <= max_k
        mask = None
        if window_size == (-1, 0):  # causal, and the last query sees the last key
            mask = torch.ones(end - start, last - first, dtype=torch.bool, device=query.device)
            mask = mask.tril(last - first - (end - start))
        parts = query[start:end], key[first:last], value[first:last]
        output = torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in parts), mask, scale=scale, enable_gqa=True
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _is_visible(*args: Any) -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def _over_gloo(start: Callable[..., Any]) -> Callable[..., Any]:
    """A function that starts a process group: over gloo, and those meant for it are remembered."""

    signature = inspect.signature(start)

    @functools.wraps(start)
    def start_group(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **{**kwargs, "device_id": None})
        backend = bound.arguments.get("backend")
        if backend is None:
            backend = _backend() if dist.is_initialized() else "nccl"
        if backend == "nccl":
            bound.arguments["backend"] = "gloo"
        group = start(*bound.args, **bound.kwargs)
        if not isinstance(group, int):  # which says: not a member
            backends[(group or dist.group.WORLD).group_name] = backend
        return group

    return start_group


def _backend(group: Any = None) -> str:
    return backends.get((group or dist.group.WORLD).group_name, "nccl")


def _barrier(real: Callable[..., Any]) -> Callable[..., Any]:
    def barrier(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        record.wait("barrier")
        return real(*args, **kwargs)

    return barrier


def install() -> None:
    """Put the device in place, for the whole process; before Megatron is imported."""
    from examples.mimo.compat import cpu

    # Threads and the compiler of a GPU: none of what this is about.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    cuda, tensor = torch.cuda, torch.Tensor
    for entry in cpu.torch_replacements():
        if entry.owner in (cuda, cuda.random):
            setattr(entry.owner, entry.attribute, entry.replacement)
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=MEMORY
    )

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    def synchronize(*args: Any) -> None:
        record.wait("synchronize")

    changes: dict[Any, dict[str, Any]] = {
        cuda: {
            "is_available": _is_visible,
            "device_count": lambda: int(_is_visible()) * int(os.environ.get("WORLD_SIZE", "1")),
            "current_device": answer(0),
            "_lazy_init": answer(None),
            "_lazy_call": lambda call, **kwargs: call(),
            "is_initialized": _is_visible,
            "get_device_name": answer(NAME),
            "get_device_capability": answer((9, 0)),
            "get_device_properties": answer(properties),
            "mem_get_info": answer((MEMORY, MEMORY)),
            "synchronize": synchronize,
            "is_current_stream_capturing": lambda: record.graph is not None,
            "default_generators": (torch.default_generator,),
            "CUDAGraph": Graph,
            "graph": capture,
            **{
                name: answer(2**30)
                for name in (
                    *("memory_allocated", "max_memory_allocated", "memory_reserved"),
                    *("max_memory_reserved", "reset_peak_memory_stats"),
                )
            },
        },
        cpu.DoneOnCpu: {"synchronize": synchronize},
        torch.accelerator: {
            "is_available": _is_visible,
            "current_accelerator": answer(CUDA),
            "current_device_index": answer(0),
            "set_device_index": answer(None),
        },
        tensor: {
            "device": property(lambda self: CUDA if place(self) == "cuda" else real_device(self)),
            "is_cuda": property(lambda self: place(self) == "cuda"),
            "to": _to(tensor.to),
            "cuda": lambda self, device=None, non_blocking=False, **_: _moved(
                self, "cuda", not non_blocking
            ),
            "cpu": lambda self, **_: _moved(self, "cpu"),
            "pin_memory": _pinned,
            "is_pinned": lambda self, *_: place(self) == "pinned",
            "record_stream": answer(None),
            "numpy": _refuses_device(tensor.numpy),
            "tolist": _waits(tensor.tolist, "numbers are read"),
            "type": _names_cuda(tensor.type),
            "new_tensor": lambda self, data, device=None, **kwargs: torch.tensor(
                data, device=device or self.device, **{"dtype": self.dtype, **kwargs}
            ),
        },
        torch: {name: _from_list(getattr(torch, name)) for name in ("tensor", "as_tensor")},
    }
    for owner in (dist, dist.distributed_c10d):
        changes[owner] = {
            **{n: _over_gloo(getattr(owner, n)) for n in ("init_process_group", "new_group")},
            "get_backend": _backend,
            "barrier": _barrier(owner.barrier),
        }
    changes[dist.distributed_c10d] |= {
        "_get_object_coll_device": lambda group=None: "cuda" if _backend(group) == "nccl" else "cpu"
    }
    # gloo copies some results when they are waited for; NCCL writes them where they belong.
    wait = dist.Work.wait

    def wait_unwatched(self: Any, *args: Any) -> Any:
        with _disable_current_modes():
            return wait(self, *args)

    changes[dist.Work] = {"wait": wait_unwatched}
    from torch.nn.attention import bias, varlen

    lower_right = bias.causal_lower_right

    def causal_lower_right(*size: int) -> torch.Tensor:
        with _disable_current_modes():  # a tensor without data, which a mode cannot make
            return lower_right(*size)

    changes[varlen] = {"varlen_attn": varlen_attn}
    import torch.nn.attention.bias as bias

    # A tensor of a class of its own cannot be made while operations are watched.
    make_bias = bias.causal_lower_right

    def make_bias_unwatched(*size: int) -> torch.Tensor:
        with _disable_current_modes():
            return make_bias(*size)

    changes[bias] = {"causal_lower_right": make_bias_unwatched}
    changes[bias] = {"causal_lower_right": causal_lower_right}
    for owner, attributes in changes.items():
        for name, value in attributes.items():
            setattr(owner, name, value)
    Places().__enter__()


if __name__ == "__main__":
    from tests.helpers import rehearsed

    rehearsed.main()
