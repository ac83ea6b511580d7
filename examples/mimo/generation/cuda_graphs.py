"""Decoding with CUDA graphs: one launch for all layers of a token, instead of one an operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from examples.mimo.generation.transformer import CachedTransformer, KeyValueCache, Places

WARM_UPS = 3
Replay = Callable[[], torch.Tensor]


class DecodingStep:
    """A token of each of the first `rows` rows of a cache, on tensors that stay where they are.

    `hidden` (B, 1, H) and `places` (B, 1) are filled in before `run`. A row is read to the cache's
    end, with what lies behind its place masked, so that lengths are nowhere but in `places`.
    """

    def __init__(self, transformer: CachedTransformer, cache: KeyValueCache, rows: int) -> None:
        self.transformer, self.cache = transformer, cache
        size, device = transformer.config.hidden_size, transformer.device
        self.hidden = torch.zeros(rows, 1, size, device=device, dtype=transformer.dtype)
        self.places = torch.zeros(rows, 1, device=device, dtype=torch.long)
        # A graph reads these addresses; the transformer may come to make a longer table.
        self.table = transformer.positions(cache.length)

    def fill(self, hidden: torch.Tensor, starts: Sequence[int]) -> None:
        """(B, 1, H), and how many tokens each row has already."""
        self.hidden.copy_(hidden)
        self.places.copy_(torch.tensor(starts)[:, None])

    def run(self) -> torch.Tensor:
        """(B, 1, H) of the last layer."""
        rows = slice(0, len(self.places))
        at = Places(self.transformer, rows, self.places, self.cache.length, start=None)
        return self.transformer.through_layers(self.hidden, self.cache, at)


def capture_on_cuda(step: DecodingStep) -> Replay:
    """Run it a few times, as kernels are chosen and workspaces made then; then record it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
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
    """A graph for each number of rows, captured when it is first needed.

    All go when the cache's tensors are others. `capture` makes of a filled step what runs it again.
    """

    def __init__(
        self,
        transformer: CachedTransformer,
        capture: Callable[[DecodingStep], Replay] = capture_on_cuda,
    ) -> None:
        self.transformer, self.capture = transformer, capture
        self.captured: dict[int, tuple[DecodingStep, Replay]] = {}
        self.keys: torch.Tensor | None = None

    def forward(
        self, hidden: torch.Tensor, cache: KeyValueCache, starts: Sequence[int]
    ) -> torch.Tensor:
        """`CachedTransformer.forward` of one token a row; the next call writes over its answer."""
        if self.keys is not cache.keys:
            self.captured.clear()
            self.keys = cache.keys
        rows = len(starts)
        if rows not in self.captured:
            step = DecodingStep(self.transformer, cache, rows)
            step.fill(hidden, starts)
            self.captured[rows] = step, self.capture(step)
        step, replay = self.captured[rows]
        step.fill(hidden, starts)
        return replay()
