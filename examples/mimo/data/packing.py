"""Which samples share a row of a fixed length."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Indices of `lengths` by row: each once, no row longer than `row_length`.

    Best fit, the longest first: each goes where the least room is left. Rows come in the order of
    the first index that they hold, so that they are not sorted by length.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > row_length:
            raise ValueError(f"a sample of {length} tokens does not fit a row of {row_length}")
        fitting = [row for row, left in enumerate(room) if left >= length]
        if not fitting:
            rows.append([])
            room.append(row_length)
            fitting = [len(rows) - 1]
        best = min(fitting, key=lambda row: room[row])
        rows[best].append(index)
        room[best] -= length
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])
