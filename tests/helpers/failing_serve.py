"""serve.py whose model fails when it is asked for so many tokens; run under torchrun.

START: on every rank, as a prompt starts. LATE: on the last rank alone, after a step that all ranks
made. ALONE: on rank 1 alone, before a step that the others then wait in. And the last rank has no
memory for more than SLOTS answers at once.
"""

from __future__ import annotations

import os

START, LATE, ALONE = 101, 102, 103
SLOTS = 10
# What ranks wait for one that does not come.
AGREE_SECONDS = 3.0


def main() -> None:
    from examples.mimo import serve
    from examples.mimo.cli import command

    rank, run = os.environ.get("RANK", "0"), serve.serve
    last = str(int(os.environ.get("WORLD_SIZE", "1")) - 1)

    def fail(engine, limit, ranks):
        limits = {sequence.request.max_new_tokens for sequence in engine.sequences}
        if limit in limits and rank in ranks:
            raise RuntimeError(f"a fault at {limit}")

    def serve_with_faults(*inputs):
        # Imported only now, as Megatron must find what serve.py has installed.
        import torch

        from examples.mimo.generation.engine import Engine
        from examples.mimo.generation.transformer import KeyValueCache
        from examples.mimo.serving import worker

        worker.AGREE_SECONDS = AGREE_SECONDS
        start, step, reserve = Engine.start, Engine.step, KeyValueCache.reserve

        def start_with_faults(self, requests):
            outputs = start(self, requests)
            fail(self, START, "01")
            return outputs

        def step_with_faults(self):
            fail(self, ALONE, "1")
            outputs = step(self)
            fail(self, LATE, last)
            return outputs

        def reserve_on_a_small_gpu(self, slots, length):
            if slots > SLOTS and rank == last:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            reserve(self, slots, length)

        Engine.start, Engine.step = start_with_faults, step_with_faults
        KeyValueCache.reserve = reserve_on_a_small_gpu
        run(*inputs)

    serve.serve = serve_with_faults
    command.run("serve.py", serve.main)


if __name__ == "__main__":
    main()
