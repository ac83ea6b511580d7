"""What Megatron asks of CUDA, answered by the CPU.

Every entry names the call in Megatron that needs it. `torch.cuda.is_available()` stays False:
code that asks it already has a CPU path.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from examples.mimo.host.stand_in import StandIn

CPU = torch.device("cpu")
FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "linspace", "as_tensor", "eye"),
)


class CpuStream:
    """A stream on which everything has already happened."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> CpuEvent:
        """An event that has already been reached."""
        return CpuEvent()


class CpuEvent:
    """An event that has already been reached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        """Whether the event has been reached: always."""
        return True


def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory` with `device="cuda"` read as the CPU and pinned memory as plain memory."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


class TensorType(str):
    """A tensor type's name that equals its CUDA spelling: `torch.FloatTensor` and the other."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) == other.replace("torch.cuda.", "torch.")

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_or_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            return TensorType(original(self))
        return original(self, *args, **kwargs)

    return type_or_name


def _barrier(original: Callable[..., Any]) -> Callable[..., Any]:
    def barrier(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return barrier


@contextlib.contextmanager
def _stream_context(stream: Any) -> Iterator[None]:
    yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def torch_stand_ins() -> list[StandIn]:
    """The entries in torch itself; they must stand before Megatron is imported."""
    cuda = torch.cuda
    properties = SimpleNamespace(
        name="CPU", major=0, minor=0, multi_processor_count=1, total_memory=0
    )
    found = [
        StandIn(cuda, "current_device", lambda: CPU, "training.py and 40 more: device= arguments"),
        StandIn(cuda, "device_count", lambda: 1, "initialize.py _set_random_seed"),
        StandIn(cuda, "set_device", _nothing, "initialize.py _initialize_distributed"),
        StandIn(
            cuda, "get_device_properties", lambda *_: properties, "common_utils.py arch version"
        ),
        StandIn(cuda, "get_device_capability", lambda *_: (0, 0), "core/utils.py capability tests"),
        StandIn(cuda, "synchronize", _nothing, "timers.py, p2p_communication.py"),
        StandIn(cuda, "empty_cache", _nothing, "training.py train_step"),
        StandIn(cuda, "Stream", CpuStream, "training.py get_model"),
        StandIn(cuda, "Event", CpuEvent, "param_and_grad_buffer.py"),
        StandIn(cuda, "current_stream", CpuStream, "training.py get_model"),
        StandIn(cuda, "stream", _stream_context, "training.py get_model"),
        StandIn(
            cuda,
            "get_rng_state",
            lambda *_: torch.get_rng_state(),
            "tensor_parallel/random.py, checkpointing.py get_rng_state",
        ),
        StandIn(
            cuda.random,
            "get_rng_state",
            lambda *_, **__: torch.get_rng_state(),
            "tensor_parallel/random.py _get_cuda_rng_state",
        ),
        StandIn(
            cuda,
            "set_rng_state",
            lambda state, *_: torch.set_rng_state(state),
            "checkpointing.py load_checkpoint",
        ),
        StandIn(cuda, "manual_seed", torch.manual_seed, "tensor_parallel/random.py"),
        StandIn(
            torch.Tensor, "cuda", lambda self, *a, **k: self, "clip_vit_model.py position_ids"
        ),
        StandIn(torch.nn.Module, "cuda", lambda self, *a, **k: self, "training.py get_model"),
        StandIn(
            torch.Tensor,
            "type",
            _tensor_type(torch.Tensor.type),
            "optimizer.py, distrib_optimizer.py, clip_grads.py compare type names",
        ),
        StandIn(
            torch.distributed,
            "barrier",
            _barrier(torch.distributed.barrier),
            "parallel_state.py: gloo's barrier takes no device_ids",
        ),
    ]
    reason = "training.py, schedules.py, clip_grads.py, rope_utils.py: device='cuda', pin_memory"
    return found + [StandIn(torch, name, on_cpu(getattr(torch, name)), reason) for name in FACTORIES]


def megatron_stand_ins() -> list[StandIn]:
    """The entries in Megatron; importing it is slow, so a command does this once."""
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    without_cuda = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    return [
        StandIn(
            training, "initialize_megatron", without_cuda, "training.py pretrain: asserts CUDA"
        ),
        StandIn(
            initialize, "initialize_megatron", without_cuda, "initialize.py: asserts CUDA"
        ),
        StandIn(
            training,
            "set_jit_fusion_options",
            _nothing,
            "training.py pretrain: warms up CUDA kernels, drawing random numbers",
        ),
        StandIn(training, "report_memory", _nothing, "training.py training_log: CUDA's allocator"),
        StandIn(
            megatron_random,
            "_set_cuda_rng_state",
            lambda state, *_, **__: torch.set_rng_state(state),
            "tensor_parallel/random.py: its lazy call would never run without CUDA",
        ),
    ]
