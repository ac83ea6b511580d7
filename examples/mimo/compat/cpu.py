"""CPU stand-ins for the CUDA functions that Megatron calls.

Every entry names the code in Megatron that needs it and is an object of its own: torch's compiler
refuses an object that it finds under two names with different rules (torch._dynamo.trace_rules).
`torch.cuda.is_available()` stays False: code that asks it already has a CPU path.
"""

from __future__ import annotations

import collections
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
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("linspace", "as_tensor", "eye", "randperm"),
)


class DoneOnCpu:
    """What streams and events share: everything has already happened."""

    cuda_stream = stream_id = 0
    device = CPU

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

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The lowest and the highest priority: there is one."""
        return 0, 0


class EventOnCpu(DoneOnCpu):
    """A CUDA event that has already been reached."""

    def elapsed_time(self, end_event: EventOnCpu) -> float:
        """Milliseconds between two events, which nobody has timed."""
        return 0.0


class DeviceOnCpu(contextlib.nullcontext):
    """`with torch.cuda.device(...)`: there is one place to work."""


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


def _moves_to_cpu(move: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`Tensor.to` with any spelling of a CUDA device read as the CPU; `Module.to` calls it."""

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], str | torch.device) and "cuda" in str(args[0]):
            args = (CPU, *args[1:])
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = CPU
        return move(self, *args, **kwargs)

    return to


def _over_gloo(start: Callable[..., Any]) -> Callable[..., Any]:
    """A function that starts a process group, with gloo where it asks for NCCL."""

    @functools.wraps(start)
    def start_group(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if isinstance(a, str) and "nccl" in a else a for a in args)
        if "nccl" in str(kwargs.get("backend")):
            kwargs["backend"] = "gloo"
        kwargs.pop("device_id", None)
        return start(*args, **kwargs)

    return start_group


def _without_device_ids(barrier: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, device_ids=None, **kwargs: barrier(*args, **kwargs)


def _returns(value: Any = None) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _gets_rng_state() -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: torch.get_rng_state()


def _sets_rng_state() -> Callable[..., None]:
    return lambda state, *args, **kwargs: torch.set_rng_state(state)


def _seeds(seed: int) -> None:
    torch.manual_seed(seed)


def _no_counts(*args: Any, **kwargs: Any) -> dict[str, int]:
    return collections.defaultdict(int)


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
    side_stream = "training.py: get_model wraps with DDP on a side stream"
    factories = "training.py, schedules.py, clip_grads.py: device='cuda', pin_memory"
    nccl = "hyper_comm_grid.py: groups over NCCL"
    entries: list[tuple[Any, str, Any, str]] = [
        (cuda, "current_device", _returns(CPU), "training.py and 40 more: current_device()"),
        (cuda, "device_count", _returns(1), "initialize.py: _set_random_seed asks for any"),
        (cuda, "set_device", _returns(), "initialize.py: _initialize_distributed, its own"),
        (cuda, "device", DeviceOnCpu, "module.py: work on one device"),
        (cuda, "get_device_properties", _returns(PROPERTIES), "common_utils.py: architecture"),
        (cuda, "get_device_capability", _returns((0, 0)), "core/utils.py: architecture"),
        (cuda, "synchronize", _returns(), "timers.py, p2p_communication.py: wait for kernels"),
        (cuda, "empty_cache", _returns(), "training.py: train_step may empty it"),
        (cuda, "memory_stats", _no_counts, "training.py, utils.py: log the allocator's counts"),
        (cuda, "Stream", StreamOnCpu, side_stream),
        (cuda, "Event", EventOnCpu, "param_and_grad_buffer.py: overlaps communication"),
        (cuda, "current_stream", _returns(StreamOnCpu()), side_stream),
        (cuda, "default_stream", _returns(StreamOnCpu()), "reuse.py: leaves it"),
        (cuda, "set_stream", _returns(), "initialize.py: a stream with a priority"),
        (cuda, "stream", _in_stream, side_stream),
        (cuda, "is_current_stream_capturing", _returns(False), "token_dispatcher.py: never here"),
        (cuda, "get_rng_state", _gets_rng_state(), "checkpointing.py: saves it"),
        (cuda.random, "get_rng_state", _gets_rng_state(), "tensor_parallel/random.py: regions"),
        (cuda, "set_rng_state", _sets_rng_state(), "checkpointing.py: restores it"),
        (cuda, "manual_seed", _seeds, "tensor_parallel/random.py: seeds"),
        (tensor, "cuda", lambda self, *_, **__: self, "clip_vit_model.py: position_ids"),
        (module, "cuda", lambda self, *_, **__: self, "training.py: get_model moves it"),
        (tensor, "to", _moves_to_cpu(tensor.to), "hybrid_optimizer.py, and programs: to('cuda')"),
        (tensor, "pin_memory", lambda self, *_, **__: self, "param_and_grad_buffer.py: pinned"),
        (tensor, "record_stream", _returns(), "moe_utils.py: a stream that still reads it"),
        (tensor, "type", _named_alike(tensor.type), "optimizer.py, clip_grads.py: type names"),
        (comms, "barrier", _without_device_ids(comms.barrier), "parallel_state.py: device_ids"),
    ]
    # Functions of torch's own module call each other there.
    entries += [
        (owner, name, _over_gloo(getattr(owner, name)), nccl)
        for owner in (comms, comms.distributed_c10d)
        for name in ("init_process_group", "new_group")
    ]
    entries += [(torch, name, _on_cpu(getattr(torch, name)), factories) for name in FACTORIES]
    return [Replacement(*entry) for entry in entries]


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
