"""Which samples share a row of a fixed length."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Indices of `lengths` by row: each once, no row longer than `row_length`.

    The longest sample that is left opens a row, and those join it that leave the least room. Rows
    come in the order of the first index that they hold, so that they are not sorted by length.
    """
    longest = max(lengths, default=0)
    if longest > row_length:
        raise ValueError(f"a sample of {longest} tokens does not fit a row of {row_length}")
    rows: list[list[int]] = []
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while left:
        first, *others = left
        joining = _fullest([lengths[i] for i in others], row_length - lengths[first])
        rows.append(sorted([first, *(others[place] for place in joining)]))
        left = [i for place, i in enumerate(others) if place not in joining]
    return sorted(rows, key=lambda row: row[0])


def _fullest(lengths: Sequence[int], room: int) -> set[int]:
    """Places in `lengths` whose sum is the largest that `room` holds: a subset sum.

    Bit s of `reached[n]` says whether some of the first n lengths sum to s.
    """
    within = (1 << (room + 1)) - 1
    reached = [1]
    for length in lengths:
        reached.append((reached[-1] | reached[-1] << length) & within)
    left = reached[-1].bit_length() - 1
    chosen = set()
    for place in reversed(range(len(lengths))):
        if not reached[place] >> left & 1:
            chosen.add(place)
            left -= lengths[place]
    return chosen
