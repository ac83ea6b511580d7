"""States of energon's loaders as plain values, so that a checkpoint is read without its classes.

A pickle can make an instance of any class; `torch.load(weights_only=True)` reads numbers, text,
lists, dicts and tensors alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState

KIND, FIELDS = "kind", "fields"
RECORDS = {
    kind.__name__: kind
    for kind in (
        SavableDataLoaderState,
        SavableDatasetCheckpoint,
        SavableDatasetState,
        SliceState,
        SystemRngState,
    )
}


def to_plain(value: Any) -> Any:
    """`value` with every instance of a class as a dict that names it."""
    if type(value).__name__ in RECORDS:
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {KIND: type(value).__name__, FIELDS: fields}
    if isinstance(value, np.ndarray):
        return {KIND: "array", FIELDS: [str(value.dtype), value.tolist()]}
    if isinstance(value, dict):
        kind = "FlexState" if isinstance(value, FlexState) else "dict"
        return {KIND: kind, FIELDS: {key: to_plain(inner) for key, inner in value.items()}}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_plain, value))
    return value


def from_plain(value: Any) -> Any:
    """What `to_plain` was given; ValueError for a kind that it does not write."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(from_plain, value))
    if not isinstance(value, dict):
        return value
    kind, fields = value[KIND], value[FIELDS]
    if kind == "array":
        return np.array(fields[1], dtype=fields[0])
    inner = {key: from_plain(field) for key, field in fields.items()}
    if kind == "dict":
        return inner
    if kind == "FlexState":
        return FlexState(**inner)
    if kind not in RECORDS:
        raise ValueError(f"a loader's state holds {kind!r}, which is none of {', '.join(RECORDS)}")
    return RECORDS[kind](**inner)
