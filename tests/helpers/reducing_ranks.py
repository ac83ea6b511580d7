"""Ranks that reduce tensors of every kind, and print what differs from gloo's own sums."""

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

plain = dist.ProcessGroup.allreduce

from examples.mimo.compat import shared_memory

rank, size, case = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1]
SIZES = (1, 7, 1000, 2**18, 2**18 + 1, 700_000)
OPERATIONS = {name: getattr(dist.ReduceOp, name) for name in ("SUM", "MAX", "MIN", "PRODUCT")}


def tensors(seed: int, strided: bool) -> dict[torch.dtype, torch.Tensor]:
    """Small whole numbers, so that sums are exact in every dtype and order."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    shape = (2, SIZES[seed]) if strided else (SIZES[seed],)
    values = torch.randint(-8, 8, shape, generator=generator)
    values = values.t() if strided else values
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8)
    return {kind: (values.abs() if kind == torch.uint8 else values).to(kind) for kind in kinds}


def compare(group: dist.ProcessGroup) -> list[str]:
    """Cases in which shared memory and gloo disagree."""
    different = []
    for seed in range(len(SIZES)):
        for strided in (False, True):
            for kind, tensor in tensors(seed, strided).items():
                for name, operation in OPERATIONS.items():
                    results = []
                    for allreduce in (plain, through_memory):
                        dist.ProcessGroup.allreduce = allreduce
                        result = tensor.clone()
                        work = dist.all_reduce(result, operation, group, async_op=seed % 2 == 1)
                        if work is not None:
                            work.wait()
                        results.append(result)
                    if not torch.equal(*results):
                        different.append(f"{SIZES[seed]} {strided} {kind} {name}")
    return different


def same_bits() -> bool:
    """Whether sums of random numbers are the same on all ranks."""
    noise = torch.randn(300_000, generator=torch.Generator().manual_seed(rank))
    dist.all_reduce(noise)
    first = noise.clone()
    dist.broadcast(first, 0)
    return torch.equal(first, noise)


class Refusing(shared_memory.SharedMemory):
    """On the last rank, as if it were on another machine; or without memory to share."""

    def _reach(self, name: str) -> bool:
        return super()._reach(name) and self.rank != (0 if case == "no memory" else self.size - 1)


through_memory = shared_memory.allreduce_replacement()[0].replacement
dist.init_process_group("gloo")
made = []
if case in ("no memory", "two machines"):
    shared_memory.SharedMemory = Refusing
original = shared_memory.SharedMemory.__init__


def remember(self, group):
    original(self, group)
    made.append(self)


shared_memory.SharedMemory.__init__ = remember
report = {"rank": rank}
if case == "killed":
    dist.ProcessGroup.allreduce = through_memory
    dist.all_reduce(torch.ones(5))
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        while True:
            dist.all_reduce(torch.ones(5))
    except RuntimeError as error:
        report |= {"error": str(error), "soon": time.monotonic() - began < 30}
    sys.stderr.write(f"{json.dumps(report)}\n")
    os._exit(0)
pairs = [dist.new_group([first, first + 1]) for first in range(0, size - 1, 2)]
mine = pairs[rank // 2] if rank // 2 < len(pairs) else None
report["different"] = compare(dist.group.WORLD)
if mine is not None:
    report["different"] += compare(mine)
dist.ProcessGroup.allreduce = through_memory
report |= {"same bits": same_bits(), "works": [memory.works for memory in made]}
sys.stdout.write(f"{json.dumps(report)}\n")
sys.stdout.flush()
dist.barrier()
dist.destroy_process_group()
