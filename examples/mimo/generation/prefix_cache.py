"""Beginnings of rows whose keys and values are known already, so that they need no work again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import EncoderInputs, Sample
from examples.mimo.generation.transformer import KeyValueCache

# What a place in a row holds: a token of text, or a token of an item by the item's content.
Unit = int | tuple[str, int]


@dataclass(frozen=True)
class PromptUnits:
    """A prompt's places, and the items in it: (modality, number, first place, end)."""

    units: list[Unit]
    items: list[tuple[str, int, int, int]]


def units_of(sample: Sample, config: MimoConfig) -> PromptUnits:
    """What the places of a prompt hold; equal media give equal units, whatever their file."""
    names = {modality.token_id: name for name, modality in config.modalities.items()}
    units: list[Unit] = list(sample.tokens.ids)
    items: list[tuple[str, int, int, int]] = []
    counts = dict.fromkeys(sample.media, 0)
    place = 0
    while place < len(units):
        name = names.get(sample.tokens.ids[place])
        if name is None:
            place += 1
            continue
        number = counts[name]
        counts[name] += 1
        item = sample.media[name][number]
        tokens = config.modalities[name].encoder.num_tokens(item)
        digest = _digest(name, item)
        units[place : place + tokens] = [(digest, index) for index in range(tokens)]
        items.append((name, number, place, place + tokens))
        place += tokens
    return PromptUnits(units, items)


def shared_length(first: Sequence[Unit], second: Sequence[Unit]) -> int:
    """How many units two rows begin with alike."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def usable_length(shared: int, prompt: PromptUnits) -> int:
    """How much of a shared beginning a prompt can take over: whole items, and not all of it.

    The last token is worked out again, as its logits choose the first token of the answer.
    """
    usable = min(shared, len(prompt.units) - 1)
    for _, _, first, end in prompt.items:
        if first < usable < end:
            usable = first
    return usable


class PrefixStore:
    """The rows answered last, the least recently used of `size` leaving first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: OrderedDict[int, tuple[list[Unit], KeyValueCache]] = OrderedDict()
        self.count = 0

    def add(self, units: list[Unit], cache: KeyValueCache) -> None:
        """Keep a row that holds something; rows that are its beginning leave."""
        if not units:
            return
        for number, (other, _) in list(self.rows.items()):
            if shared_length(other, units) == len(other):
                del self.rows[number]
        self.count += 1
        self.rows[self.count] = (units, cache)
        while len(self.rows) > self.size:
            self.rows.popitem(last=False)

    def find(self, prompt: PromptUnits) -> tuple[int, KeyValueCache | None]:
        """The longest beginning of a prompt that is kept, and the cache whose row 0 holds it."""
        best, found = 0, None
        for number, (units, _) in self.rows.items():
            usable = usable_length(shared_length(units, prompt.units), prompt)
            if usable > best:
                best, found = usable, number
        if found is None:
            return 0, None
        self.rows.move_to_end(found)
        return best, self.rows[found][1]


def _digest(name: str, item: EncoderInputs) -> str:
    found = hashlib.blake2b(name.encode(), digest_size=16)
    for key in sorted(item):
        tensor = item[key].contiguous()
        found.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.view(torch.uint8).numpy())
    return found.hexdigest()
