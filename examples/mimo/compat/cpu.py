"""CPU stand-ins for the CUDA functions that Megatron calls.

Every entry names the code in Megatron that needs it and is an object of its own: torch's compiler
refuses an object that it finds under two names with different rules (torch._dynamo.trace_rules).
`torch.cuda.is_available()` stays False: code that asks it already has a CPU path.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from examples.mimo.compat import Replacement

CPU = torch.device("cpu")
PROPERTIES = SimpleNamespace(name="CPU", major=0, minor=0, multi_processor_count=1, total_memory=0)
FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "linspace", "as_tensor", "eye"),
)


class DoneOnCpu:
    """What streams and events share: everything has already happened."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def record_event(self, event: Any = None) -> EventOnCpu:
        """An event that has already been reached."""
        return EventOnCpu()

    def query(self) -> bool:
        """Whether it is done: always."""
        return True


class StreamOnCpu(DoneOnCpu):
    """A CUDA stream on which everything has already happened."""


class EventOnCpu(DoneOnCpu):
    """A CUDA event that has already been reached."""


class TensorType(str):
    """A tensor type's name that equals its CUDA spelling: `torch.FloatTensor` and the other."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) == other.replace("torch.cuda.", "torch.")

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory` with `device="cuda"` read as the CPU and pinned memory as plain memory."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _named_alike(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    def type_or_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        return TensorType(result) if isinstance(result, str) else result

    return type_or_name


def _without_device_ids(barrier: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, device_ids=None, **kwargs: barrier(*args, **kwargs)


def _returns(value: Any = None) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _gets_rng_state() -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: torch.get_rng_state()


def _sets_rng_state() -> Callable[..., None]:
    return lambda state, *args, **kwargs: torch.set_rng_state(state)


@contextlib.contextmanager
def _in_stream(stream: Any) -> Iterator[None]:
    yield


def compute_in_this_thread_only() -> None:
    """Other threads, such as gloo's, run each operation by themselves from here on.

    Else one that copies a large tensor starts OpenMP threads of its own. When all of those are more
    than the processors, they sleep between operations, and every operation waits until they wake.
    A later `torch.set_num_threads` gives threads that start after it their helpers back.

    A forked process says it again before it has other threads: torch then replaces the thread pool
    it took over, and two threads that do so at once end the process ("Invalid thread pool!").
    """
    torch.get_num_threads()  # this thread's number stands from its first use on
    other = threading.Thread(target=torch.set_num_threads, args=(1,))
    other.start()
    other.join()


def torch_replacements() -> list[Replacement]:
    """The entries in torch itself; put them in place before Megatron is imported."""
    with torch.device("cpu"):
        torch.empty(0)  # torch now remembers its own factories, for `with torch.device(...)`
    cuda, tensor, module, comms = torch.cuda, torch.Tensor, torch.nn.Module, torch.distributed
    type_name, barrier = _named_alike(tensor.type), _without_device_ids(comms.barrier)
    factories = "training.py, schedules.py, clip_grads.py: device='cuda', pin_memory"
    return [
        Replacement(
            cuda,
            "current_device",
            _returns(CPU),
            "training.py and 40 more: device=current_device()",
        ),
        Replacement(
            cuda,
            "device_count",
            _returns(1),
            "initialize.py: _set_random_seed asks whether there is any",
        ),
        Replacement(
            cuda, "set_device", _returns(), "initialize.py: _initialize_distributed, its own"
        ),
        Replacement(
            cuda, "get_device_properties", _returns(PROPERTIES), "common_utils.py: architecture"
        ),
        Replacement(cuda, "get_device_capability", _returns((0, 0)), "core/utils.py: architecture"),
        Replacement(
            cuda, "synchronize", _returns(), "timers.py, p2p_communication.py: wait for kernels"
        ),
        Replacement(cuda, "empty_cache", _returns(), "training.py: train_step may empty it"),
        Replacement(
            cuda, "Stream", StreamOnCpu, "training.py: get_model wraps with DDP on a side stream"
        ),
        Replacement(cuda, "Event", EventOnCpu, "param_and_grad_buffer.py: overlaps communication"),
        Replacement(
            cuda,
            "current_stream",
            _returns(StreamOnCpu()),
            "training.py: get_model wraps with DDP on a side stream",
        ),
        Replacement(
            cuda, "stream", _in_stream, "training.py: get_model wraps with DDP on a side stream"
        ),
        Replacement(cuda, "get_rng_state", _gets_rng_state(), "checkpointing.py: saves it"),
        Replacement(
            cuda.random,
            "get_rng_state",
            _gets_rng_state(),
            "tensor_parallel/random.py: a state per region",
        ),
        Replacement(cuda, "set_rng_state", _sets_rng_state(), "checkpointing.py: restores it"),
        Replacement(
            cuda,
            "manual_seed",
            lambda seed: torch.manual_seed(seed),
            "tensor_parallel/random.py: seeds",
        ),
        Replacement(tensor, "cuda", lambda self, *_, **__: self, "clip_vit_model.py: position_ids"),
        Replacement(module, "cuda", lambda self, *_, **__: self, "training.py: get_model moves it"),
        Replacement(tensor, "type", type_name, "optimizer.py, clip_grads.py: compare type names"),
        Replacement(comms, "barrier", barrier, "parallel_state.py: gloo takes no device_ids"),
        *(Replacement(torch, name, _on_cpu(getattr(torch, name)), factories) for name in FACTORIES),
    ]


def megatron_replacements() -> list[Replacement]:
    """The entries in Megatron for a machine without CUDA; its import takes seconds."""
    import megatron.core.tensor_parallel.random as random
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    # Two objects: an object under two names breaks torch's compiler, see the title.
    start = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    start_too = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    warm_up = "training.py: warms up CUDA kernels, with random numbers the CPU's generator shares"
    never = "tensor_parallel/random.py: defers it until CUDA starts, which never happens"
    return [
        Replacement(training, "initialize_megatron", start, "training.py: pretrain asserts CUDA"),
        Replacement(
            initialize,
            "initialize_megatron",
            start_too,
            "initialize.py: asserts CUDA when answering, too",
        ),
        Replacement(training, "set_jit_fusion_options", _returns(), warm_up),
        Replacement(training, "report_memory", _returns(), "training.py: reads CUDA's allocator"),
        Replacement(random, "_set_cuda_rng_state", _sets_rng_state(), never),
    ]
