"""All-reduce through shared memory, for ranks of one machine without CUDA.

Gloo sends tensors through sockets: the sum of half a megabyte over two ranks took 1.1 ms, that of
four bytes 0.4 ms, and each tensor-parallel layer waits for two sums in either direction.
"""

from __future__ import annotations

import functools
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from examples.mimo.compat import Replacement

SLOT_BYTES = 2**20
CPU = torch.device("cpu")
COMBINE: dict[Any, Callable[..., torch.Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
}
DTYPES = {
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int32, torch.int64),
}


def allreduce_replacement() -> list[Replacement]:
    """The entry for a machine without CUDA."""
    allreduce = _through_memory(dist.ProcessGroup.allreduce)
    reason = "tensor_parallel/mappings.py: sums go through sockets"
    return [Replacement(dist.ProcessGroup, "allreduce", allreduce, reason)]


class SharedMemory:
    """What the ranks of a group reduce tensors through; all of them make it together.

    Each writes a piece of its tensor into its slot, all meet, and each combines the slots in the
    order of the ranks, so all get the same bits. Two sets of slots take turns: a rank that writes
    into one has met the others since they read it.

    `works` is False on all ranks where they are not on one machine, or it shares no memory.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size, self.turn, self.memory = group.rank(), group.size(), 0, -1
        self.timeout = group._get_backend(CPU).options._timeout.total_seconds()
        self.link = socket.socket(socket.AF_UNIX)
        self.link.settimeout(self.timeout)
        # An abstract name: it leaves no file behind, and nobody answers to it on other machines.
        name = [f"\0mimo-{secrets.token_hex(16)}"]
        reached = self.rank == 0 and self._reach(name[0])
        dist.broadcast_object_list(name, group=group, group_src=0)
        reached = reached or (self.rank > 0 and self._reach(name[0]))
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, reached, group=group)
        self.works = all(answers)
        if self.works:
            self._share()
            return
        self.link.close()
        if self.memory >= 0:
            os.close(self.memory)

    def _reach(self, name: str) -> bool:
        """Whether the first rank listens and has memory; whether another one reaches it."""
        try:
            if self.rank:
                self.link.connect(name)
                return True
            self.link.bind(name)
            self.link.listen(self.size)
            # The system's, so that no limit of /dev/shm counts, which readers of data fill.
            self.memory = os.memfd_create("mimo")
            os.truncate(self.memory, 2 * self.size * SLOT_BYTES)
        except OSError:
            return False
        return True

    def _share(self) -> None:
        """The first rank hands the memory to the others, and each maps it."""
        if self.rank:
            self.peers = [self.link]
            _, (self.memory,), _, _ = socket.recv_fds(self.link, 1, 1)
        else:
            self.peers = []
            while len(self.peers) < self.size - 1:
                peer, _ = self.link.accept()
                # All names of a machine are listed, for every user to see.
                _, user, _ = struct.unpack(
                    "3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                )
                if user == os.getuid():
                    socket.send_fds(peer, [b"."], [self.memory])
                    self.peers.append(peer)
            self.link.close()
        for peer in self.peers:
            peer.settimeout(self.timeout)
        slots = torch.frombuffer(
            mmap.mmap(self.memory, 2 * self.size * SLOT_BYTES), dtype=torch.uint8
        )
        os.close(self.memory)
        self.sets = [half.chunk(self.size) for half in slots.chunk(2)]

    @torch.no_grad()
    def reduce(self, tensor: torch.Tensor, combine: Callable[..., torch.Tensor]) -> None:
        """Combine the ranks' tensors, of one shape and dtype, in place."""
        whole = tensor.contiguous()
        for piece in whole.view(-1).split(SLOT_BYTES // tensor.element_size()):
            used = piece.numel() * piece.element_size()
            slots = [slot[:used].view(piece.dtype) for slot in self.sets[self.turn]]
            self.turn = 1 - self.turn
            slots[self.rank].copy_(piece)
            self._meet()
            combine(slots[0], slots[1], out=piece)
            for slot in slots[2:]:
                combine(piece, slot, out=piece)
        if whole is not tensor:
            tensor.copy_(whole)

    def _meet(self) -> None:
        """Wait until all ranks are here: the first hears from all others, and then tells them."""
        try:
            for peer in self.peers if self.rank == 0 else ():
                _hear(peer)
            for peer in self.peers:
                peer.sendall(b".")
            if self.rank:
                _hear(self.link)
        except TimeoutError:
            raise RuntimeError(f"Timed out waiting {self.timeout:.0f} s for a rank") from None
        except OSError as error:
            raise RuntimeError(f"shared memory: {error}") from None


def _hear(peer: socket.socket) -> None:
    if not peer.recv(1):
        raise ConnectionResetError("Connection closed by peer")


class Done(dist.Work):
    """A collective that has ended."""

    def wait(self, *timeout: Any) -> bool:
        """It has."""
        return True

    def is_completed(self) -> bool:
        """It has."""
        return True


def _through_memory(allreduce: Callable[..., Any]) -> Callable[..., Any]:
    """`ProcessGroup.allreduce` through shared memory, where that works and the operation is one."""
    of_groups: WeakKeyDictionary[dist.ProcessGroup, SharedMemory] = WeakKeyDictionary()

    @functools.wraps(allreduce)
    def reduce(group: dist.ProcessGroup, tensors: Any, *rest: Any, **named: Any) -> Any:
        # The answers are the same on all ranks: they make the memory together.
        combine = _combination(tensors, rest[0] if rest else named.get("opts"))
        # A planned run's groups are of a backend that sends nothing.
        is_gloo = isinstance(group._get_backend(CPU), dist.ProcessGroupGloo)
        if combine is not None and group.size() > 1 and is_gloo:
            if group not in of_groups:
                of_groups[group] = SharedMemory(group)
            if of_groups[group].works:
                of_groups[group].reduce(tensors[0], combine)
                return Done()
        return allreduce(group, tensors, *rest, **named)

    return reduce


def _combination(tensors: Any, options: Any) -> Callable[..., torch.Tensor] | None:
    """What combines two ranks' tensors; None where gloo is to do it."""
    if (
        not isinstance(tensors, list)
        or len(tensors) != 1
        or not isinstance(tensors[0], torch.Tensor)
    ):
        return None
    (tensor,) = tensors
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided or not tensor.numel():
        return None
    operation = getattr(options, "reduceOp", None)
    return next((combine for kind, combine in COMBINE.items() if operation == kind), None)
