"""Prefix cache: reuses the keys and values of prompts that start alike."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import EncoderInputs, Sample
from examples.mimo.generation.transformer import KeyValueCache

# What one position holds: a text token's id, or (digest of the item, index of the token in it).
Unit = int | tuple[str, int]


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
    names = {modality.token_id: name for name, modality in config.modalities.items()}
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
        end = position + config.modalities[name].encoder.num_tokens(inputs)
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


def _digest(name: str, inputs: EncoderInputs) -> str:
    digest = hashlib.blake2b(name.encode(), digest_size=16)
    for key in sorted(inputs):
        tensor = inputs[key].contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()
