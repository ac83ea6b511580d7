"""The parts of a sample in a shard, and the record that says what they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.samples import Find
from examples.mimo.data.sources import Blob

MAX_RECORD_BYTES = 4 * 2**20


def record_of(key: str, parts: Mapping[str, bytes], config: MimoConfig) -> dict[str, Any]:
    """The record of a sample; where it names no media at all, the parts say what there is.

    `parts` are the contents by name; of them only the record's is looked at.
    """
    if "json" not in parts:
        raise ValueError(f"sample {key}: no {key}.json in the shard")
    text = parts["json"]
    if len(text) > MAX_RECORD_BYTES:
        raise ValueError(
            f"sample {key}: {key}.json has {len(text):,} bytes, more than {MAX_RECORD_BYTES:,}"
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"sample {key}: {key}.json is not JSON ({error})") from None
    if isinstance(record, list):
        record = {"conversations": record}
    if not isinstance(record, dict):
        raise ValueError(f"sample {key}: {key}.json must hold an object or a list of turns")
    record.setdefault("key", key)
    if any(name in record for name in config.modalities):
        return record
    for name, modality in config.modalities.items():
        named = [part for part in parts if part.lower().endswith(modality.encoder.suffixes)]
        found = sorted(named, key=_by_number)
        # A part may be named by its suffix alone, as KEY.mp4.
        found += [part for part in parts if f".{part.lower()}" in modality.encoder.suffixes]
        if found:
            record[name] = found
    return record


def _by_number(part: str) -> list[tuple[int, str]]:
    """Orders 2.jpg before 10.jpg."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", part)]


def words_of(error: Exception) -> str:
    """Why a sample was refused; a decoder's own kind of error is named."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{error}"


def find_in(key: str, parts: Mapping[str, bytes]) -> Find:
    """The parts of a sample as files; a name may begin with the sample's key."""

    def find(name: str) -> Blob:
        part = name.removeprefix(f"{key}.")
        if part not in parts or not isinstance(parts[part], bytes):
            raise ValueError(f"{name}: no such part in the shard")
        return Blob(f"{key}.{part}", parts[part])

    return find
