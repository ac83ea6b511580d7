"""Where a picture or a recording comes from: a file, or the bytes of one out of a shard."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class Blob:
    """A file's content, and the name that messages give it."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


Source = Path | Blob


@contextlib.contextmanager
def open_source(source: Source, singular: str) -> Iterator[BinaryIO]:
    """The bytes of `source`; ValueError, one line, when there are none."""
    if isinstance(source, Blob):
        if not source.data:
            raise ValueError(f"{source}: the {singular} file is empty")
        yield io.BytesIO(source.data)
        return
    try:
        stream = source.open("rb") if source.is_file() else None
    except OSError as error:
        raise ValueError(
            f"{source}: the {singular} file cannot be read ({error.strerror})"
        ) from None
    if stream is None:
        raise ValueError(f"{source}: no such {singular} file")
    with stream:
        if source.stat().st_size == 0:
            raise ValueError(f"{source}: the {singular} file is empty")
        yield stream
