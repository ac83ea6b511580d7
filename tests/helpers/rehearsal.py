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
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.helpers.places import (
    CUDA,
    Places,
    backends,
    caller,
    is_cuda,
    note_copy,
    place,
    put,
    real_device,
    record,
)

NAME = "NVIDIA H100 80GB HBM3"
MEMORY = 80 * 2**30


def _moved(tensor: torch.Tensor, where: str, blocks: bool = True) -> torch.Tensor:
    """A copy in another place; the tensor itself if it is there already."""
    current = place(tensor)
    if current == "meta":
        raise NotImplementedError(f"Cannot copy out of meta tensor; no data! ({caller()})")
    if (current == "cuda") == (where == "cuda"):
        return tensor
    # Asynchronous copies to the host go to pinned memory.
    where = "pinned" if where == "cpu" and not blocks else where
    note_copy(current, where, blocks)
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
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy at {caller()}")
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
