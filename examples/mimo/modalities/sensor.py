"""Sensor modality, the worked example: a time series of several channels in a .npy file.

Patches of neighbouring steps go through a linear layer and a few transformer layers, all of
which are the base class's; this file defines only what is particular to the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.mimo.modalities.base import EncoderConfig
from examples.mimo.modalities.files import Source, open_source


@dataclass(frozen=True)
class SensorConfig(EncoderConfig):
    """At most `max_steps` measurements of `num_channels` values; `patch_size` of them a token."""

    num_channels: int
    patch_size: int
    max_steps: int
    suffixes = (".npy",)

    @property
    def max_tokens(self) -> int:
        """The patches of the longest series."""
        return -(-self.max_steps // self.patch_size)

    @property
    def input_size(self) -> int:
        """All channels of a patch's steps."""
        return self.patch_size * self.num_channels

    def read(self, source: Source) -> np.ndarray:
        """(steps, channels) float32, from what `numpy.save` writes; nothing is unpickled.

        The size is checked before memory is taken: a small file's header may promise terabytes.
        """
        with open_source(source, "sensor") as stream:
            try:
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            except Exception:  # damaged headers raise errors of many types
                raise ValueError(f"{source}: not an array that numpy.save wrote") from None
            if len(shape) != 2 or shape[1] != self.num_channels or dtype.kind not in "fiu":
                needed = f"numbers of shape (steps, {self.num_channels}) are needed"
                raise ValueError(f"{source}: {dtype} of shape {shape}, but {needed}")
            if not 0 < shape[0] <= self.max_steps:
                raise ValueError(f"{source}: {shape[0]:,} steps, but 1 to {self.max_steps:,} fit")
            stream.seek(0)
            try:
                raw = np.lib.format.read_array(stream, allow_pickle=False).astype(np.float32)
            except ValueError:
                raise ValueError(f"{source}: damaged array, values are missing") from None
        if not np.isfinite(raw).all():
            raise ValueError(f"{source}: the series holds NaN or infinite values")
        return raw

    def patches(self, raw: np.ndarray) -> list[np.ndarray]:
        """One encoder input; zeros fill up its last patch."""
        padded = np.pad(raw, ((0, -len(raw) % self.patch_size), (0, 0)))
        return [padded.reshape(-1, self.input_size)]
