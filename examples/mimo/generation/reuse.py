"""What the engine reuses: keys and values of prompts that start alike, and CUDA graphs.

The prefix cache keeps the first; a graph decodes a token by one launch for all layers instead of
one per operation.
"""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from examples.mimo.cli import command
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import EncoderInputs, Sample, TokenSequence
from examples.mimo.generation.transformer import CachedTransformer, KeyValueCache, Positions
from examples.mimo.modalities.values import upload

# What one position holds: a text token's id, or (digest of the item, index of the token in it).
Unit = int | tuple[str, int]
# Kernels are chosen and workspaces allocated in the first runs, which a graph must not record.
WARM_UP_RUNS = 3
Replay = Callable[[], torch.Tensor]


class PromptItem(NamedTuple):
    """Item `number` of a modality, at the positions from `start` to `end`."""

    modality: str
    number: int
    start: int
    end: int


@dataclass(frozen=True)
class PromptUnits:
    """The content of a prompt by position, and where its media items lie."""

    units: list[Unit]
    items: list[PromptItem]


def prompt_units(sample: Sample, config: MimoConfig) -> PromptUnits:
    """The units of a prompt; items of equal content give equal units, whatever their file."""
    names = {modality.token_id: name for name, modality in config.inputs.items()}
    units: list[Unit] = list(sample.tokens.ids)
    items: list[PromptItem] = []
    counts = dict.fromkeys(sample.media, 0)
    position = 0
    while position < len(units):
        name = names.get(sample.tokens.ids[position])
        if name is None:
            position += 1
            continue
        inputs = sample.media[name][counts[name]]
        end = position + config.inputs[name].encoder.num_tokens(inputs)
        digest = _digest(name, inputs)
        units[position:end] = [(digest, index) for index in range(end - position)]
        items.append(PromptItem(name, counts[name], position, end))
        counts[name] += 1
        position = end
    return PromptUnits(units, items)


def shared_length(first: Sequence[Unit], second: Sequence[Unit]) -> int:
    """The number of leading units that two sequences have in common."""
    for position, (unit, other) in enumerate(zip(first, second, strict=False)):
        if unit != other:
            return position
    return min(len(first), len(second))


def usable_length(shared: int, prompt: PromptUnits) -> int:
    """How many of `shared` leading units a prompt can reuse: whole items, and not all of it.

    The last token must be computed, as its logits choose the first token of the answer.
    """
    usable = min(shared, len(prompt.units) - 1)
    for item in prompt.items:
        if item.start < usable < item.end:
            usable = item.start
    return usable


def remaining_sample(sample: Sample, prompt: PromptUnits, start: int) -> Sample:
    """The prompt from position `start` on, with the media items that begin there or later."""
    if not start:
        return sample
    remaining = {(i.modality, i.number) for i in prompt.items if i.start >= start}

    def select(name: str, values: list) -> list:
        return [value for number, value in enumerate(values) if (name, number) in remaining]

    media = {name: select(name, items) for name, items in sample.media.items()}
    tokens = sample.tokens
    return Sample(
        sample.key,
        TokenSequence(tokens.ids[start:], tokens.labels[start:], tokens.loss_mask[start:]),
        {name: items for name, items in media.items() if items},
        {name: select(name, files) for name, files in sample.sources.items()},
    )


class PrefixCache:
    """Keys and values of the last `size` finished sequences; the least recently used goes first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sequences: OrderedDict[int, tuple[list[Unit], KeyValueCache]] = OrderedDict()
        self.count = 0

    def add(self, units: list[Unit], cache: KeyValueCache) -> None:
        """Keep a sequence, and drop those that are a prefix of it."""
        if not units:
            return
        for number, (other, _) in list(self.sequences.items()):
            if shared_length(other, units) == len(other):
                del self.sequences[number]
        self.count += 1
        self.sequences[self.count] = (units, cache)
        while len(self.sequences) > self.size:
            self.sequences.popitem(last=False)

    def find(self, prompt: PromptUnits) -> tuple[int, KeyValueCache | None]:
        """The longest cached prefix of a prompt: its length, and a cache with it in slot 0."""
        best_length, best_number = 0, None
        for number, (units, _) in self.sequences.items():
            usable = usable_length(shared_length(units, prompt.units), prompt)
            if usable > best_length:
                best_length, best_number = usable, number
        if best_number is None:
            return 0, None
        self.sequences.move_to_end(best_number)
        return best_length, self.sequences[best_number][1]


def reserve_on_all_ranks(cache: KeyValueCache, slots: int, length: int) -> None:
    """`cache.reserve` on every rank, or torch.OutOfMemoryError on every rank if one lacks memory.

    Else that rank alone would give up, and the others would wait for it in their next collective.
    """
    if not cache.changes(slots, length):
        return
    before, lacks_memory, numbers = (cache.keys, cache.values), False, ""
    try:
        cache.reserve(slots, length)
    except (MemoryError, RuntimeError) as error:
        if not (lacks_memory := command.is_out_of_memory(error)):
            raise
        numbers = f". {error}"
    if dist.get_world_size() > 1:
        anywhere = torch.tensor(int(lacks_memory), device=cache.keys.device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        lacks_memory = bool(anywhere)
    if lacks_memory:
        cache.keys, cache.values = before
        raise torch.OutOfMemoryError(
            f"out of memory: no room for {slots} slots of {length:,} tokens in the key/value cache"
            f"{numbers}"
        )


def _digest(name: str, inputs: EncoderInputs) -> str:
    digest = hashlib.blake2b(name.encode(), digest_size=16)
    for key in sorted(inputs):
        tensor = inputs[key].contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


class DecodingStep:
    """One token of each of the first `batch_size` slots, on tensors whose addresses stay.

    `hidden` (B, 1, H) and `positions` (B, 1) are filled in before `run`. Attention reads every slot
    to the end of the cache and masks what lies after the position, so no shape depends on lengths.
    """

    def __init__(
        self, transformer: CachedTransformer, cache: KeyValueCache, batch_size: int
    ) -> None:
        self.transformer = transformer
        # A cache that the engine replaces by another is freed, although a graph remembers it.
        self.cache: KeyValueCache = weakref.proxy(cache)
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
        positions = upload(torch.tensor(starts), self.transformer.device)
        self.positions.copy_(positions[:, None])

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
    # Other threads, as those of NCCL and of a server, may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        hidden = step.run()

    def replay() -> torch.Tensor:
        graph.replay()
        return hidden

    return replay


class DecodingGraphs:
    """One graph per batch size, captured when it is first needed.

    Graphs are dropped when the cache's tensors are replaced, and captured anew for the batch sizes
    that still come. NCCL does not close a group while a graph holds its kernels, so they go before
    the process group does. `capture` turns a filled step into a function that runs it again; tests
    pass one that needs no CUDA.
    """

    def __init__(
        self,
        transformer: CachedTransformer,
        capture: Callable[[DecodingStep], Replay] = capture_on_cuda,
    ) -> None:
        self.transformer, self.capture = transformer, capture
        self.graphs: dict[int, tuple[DecodingStep, Replay]] = {}
        # Not the tensor itself, whose memory a cache that grows gives back.
        self.keys: weakref.ref[torch.Tensor] | None = None
        command.dropped_first.add(self)

    def drop(self) -> None:
        """Free all graphs, whatever reference cycles they are in."""
        self.graphs.clear()
        self.keys = None
        gc.collect()

    def forward(
        self, hidden: torch.Tensor, cache: KeyValueCache, starts: Sequence[int]
    ) -> torch.Tensor:
        """`CachedTransformer.forward` for one token per slot; the next call overwrites the result.

        Shapes: (B, 1, H) -> (B, 1, H).
        """
        if self.keys is None or self.keys() is not cache.keys:
            self.graphs.clear()
            self.keys = weakref.ref(cache.keys)
        batch_size = len(starts)
        if batch_size not in self.graphs:
            step = DecodingStep(self.transformer, cache, batch_size)
            step.fill(hidden, starts)
            self.graphs[batch_size] = step, self.capture(step)
        step, replay = self.graphs[batch_size]
        step.fill(hidden, starts)
        return replay()
