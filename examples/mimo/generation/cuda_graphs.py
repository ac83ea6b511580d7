"""Decoding by CUDA graphs: one launch for all layers of a token instead of one per operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from examples.mimo.generation.transformer import CachedTransformer, KeyValueCache, Positions

# Kernels are chosen and workspaces allocated in the first runs, which a graph must not record.
WARM_UP_RUNS = 3
Replay = Callable[[], torch.Tensor]


class DecodingStep:
    """One token of each of the first `batch_size` slots, on tensors whose addresses stay.

    `hidden` (B, 1, H) and `positions` (B, 1) are filled in before `run`. Attention reads every slot
    to the end of the cache and masks what lies after the position, so no shape depends on lengths.
    """

    def __init__(
        self, transformer: CachedTransformer, cache: KeyValueCache, batch_size: int
    ) -> None:
        self.transformer, self.cache = transformer, cache
        hidden_size, device = transformer.config.hidden_size, transformer.device
        self.hidden = torch.zeros(
            batch_size, 1, hidden_size, device=device, dtype=transformer.dtype
        )
        self.positions = torch.zeros(batch_size, 1, device=device, dtype=torch.long)
        # The graph reads this table's memory, and the transformer may replace it by a longer one.
        self.rotary_table = transformer.rotary_table(cache.length)

    def fill(self, hidden: torch.Tensor, starts: Sequence[int]) -> None:
        """Set (B, 1, H), and the number of tokens that each slot holds already."""
        self.hidden.copy_(hidden)
        self.positions.copy_(torch.tensor(starts)[:, None])

    def run(self) -> torch.Tensor:
        """Run the layers -> (B, 1, H)."""
        slots = slice(0, len(self.positions))
        positions = Positions(
            self.transformer, slots, self.positions, self.cache.length, start=None
        )
        return self.transformer.run_layers(self.hidden, self.cache, positions)


def capture_on_cuda(step: DecodingStep) -> Replay:
    """Record `step.run()` as a CUDA graph; returns a function that runs it again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = step.run()

    def replay() -> torch.Tensor:
        graph.replay()
        return hidden

    return replay


class DecodingGraphs:
    """One graph per batch size, captured when it is first needed.

    Graphs are dropped when the cache's tensors are replaced. `capture` turns a filled step into a
    function that runs it again; tests pass one that needs no CUDA.
    """

    def __init__(
        self,
        transformer: CachedTransformer,
        capture: Callable[[DecodingStep], Replay] = capture_on_cuda,
    ) -> None:
        self.transformer, self.capture = transformer, capture
        self.graphs: dict[int, tuple[DecodingStep, Replay]] = {}
        self.keys: torch.Tensor | None = None

    def forward(
        self, hidden: torch.Tensor, cache: KeyValueCache, starts: Sequence[int]
    ) -> torch.Tensor:
        """`CachedTransformer.forward` for one token per slot; the next call overwrites the result.

        Shapes: (B, 1, H) -> (B, 1, H).
        """
        if self.keys is not cache.keys:
            self.graphs.clear()
            self.keys = cache.keys
        batch_size = len(starts)
        if batch_size not in self.graphs:
            step = DecodingStep(self.transformer, cache, batch_size)
            step.fill(hidden, starts)
            self.graphs[batch_size] = step, self.capture(step)
        step, replay = self.graphs[batch_size]
        step.fill(hidden, starts)
        return replay()
