"""The eye on moving pictures: a ViT that sees frame after frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from examples.mimo.data.sources import Source
from examples.mimo.data.video import VIDEO_SUFFIXES, read_frames
from examples.mimo.models.vit import VitConfig


@dataclass(frozen=True)
class VideoConfig(VitConfig):
    """Frames of a video through a ViT; their tokens follow one another.

    `frames_per_second` are taken, and of a longer video `max_frames` spread over all of it.
    """

    frames_per_second: float = 1.0
    max_frames: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames_per_second <= 0 or self.max_frames < 1:
            raise ValueError(
                f"frames_per_second {self.frames_per_second} and max_frames {self.max_frames} must "
                "be above 0"
            )

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Names that videos have; their content decides."""
        return VIDEO_SUFFIXES

    @property
    def max_inputs(self) -> int:
        """Frames, each with its tiles."""
        return self.max_frames * super().max_inputs

    def read(self, source: Source) -> Any:
        """A list of RGB frames."""
        return read_frames(source, self.frames_per_second, self.max_frames)

    def augment(self, raw: Any, generator: np.random.Generator) -> Any:
        """The frames, all moved alike."""
        seed = int(generator.integers(2**32))
        return [super(VideoConfig, self).augment(f, np.random.default_rng(seed)) for f in raw]

    def describe(self, raw: Any) -> str:
        """Its frames and their size."""
        return f"{len(raw)} frames of {super().describe(raw[0])}"

    def preview(self, raw: Any) -> list[tuple[str, bytes]]:
        """A PNG of each frame."""
        return [view for frame in raw for view in super(VideoConfig, self).preview(frame)]

    def blank(self, raw: Any) -> Any:
        """As many black frames."""
        return [super(VideoConfig, self).blank(frame) for frame in raw]

    def preprocess(self, raw: Any) -> dict[str, torch.Tensor]:
        """`pixel_values` (T, 3, image_size, image_size): the frames, each with its tiles."""
        frames = [super(VideoConfig, self).preprocess(frame)["pixel_values"] for frame in raw]
        return {"pixel_values": torch.cat(frames)}

    def mock_inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise of the shape of `max_frames` frames."""
        size = (self.max_frames, 3, self.image_size, self.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}
