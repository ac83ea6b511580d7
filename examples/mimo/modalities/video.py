"""Video modality: decoding, frame sampling, and a ViT over each frame."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image

from examples.mimo.modalities.base import free_field
from examples.mimo.modalities.files import (
    MAX_PIXELS,
    WHITE,
    Colour,
    Source,
    check_size,
    open_source,
    to_rgb,
)
from examples.mimo.modalities.image import VitConfig
from examples.mimo.modalities.recordings import OPTIONS, open_pyav

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
MAX_SECONDS = 2 * 3600.0


def read_frames(
    source: Source,
    frames_per_second: float,
    max_frames: int,
    max_pixels: int = MAX_PIXELS,
    background: Colour = WHITE,
) -> list[Image.Image]:
    """RGB frames, `frames_per_second` of them, spread further apart if there were too many.

    Where a frame is transparent, `background` shows through. Raises ValueError, one line, when the
    file is missing, empty, damaged, no video, longer than two hours, or has frames of more than
    `max_pixels` or mere lines (checked before any is decoded).
    """
    av = open_pyav(source, "videos need")
    try:
        with (
            open_source(source, "video") as stream,
            av.open(stream, mode="r", options=OPTIONS) as container,
        ):
            seconds = _check_header(container, source, max_pixels)
            step = max(1 / frames_per_second, seconds / max_frames)
            # Decoding ends early where the container does not know how long it is.
            sampled = _sample(container, step, source, max_pixels)
            sampled = itertools.islice(sampled, max_frames)
            frames = [_picture(frame, background) for frame in sampled]
    except av.error.FFmpegError as error:
        raise ValueError(f"{source}: not a video that can be read ({error.strerror})") from None
    expected = max(1, min(max_frames, int(seconds / step)))
    if len(frames) < expected:
        raise ValueError(f"{source}: damaged video, {len(frames)} of {expected} frames can be read")
    return frames


def _picture(frame: VideoFrame, background: Colour) -> Image.Image:
    if not any(component.is_alpha for component in frame.format.components):
        return frame.to_image()
    return to_rgb(Image.fromarray(frame.to_ndarray(format="rgba")), background)


def _check_header(container: InputContainer, source: Source, max_pixels: int) -> float:
    """The length in seconds by the header, or 0 when it does not say."""
    if not container.streams.video:
        raise ValueError(f"{source}: no pictures in this file")
    video = container.streams.video[0]
    pixels = video.width * video.height
    if not 0 < pixels <= max_pixels:
        raise ValueError(
            f"{source}: frames of {video.width} x {video.height}, {pixels:,} pixels; from 1 to "
            f"{max_pixels:,} can be read"
        )
    check_size(source, (video.width, video.height), max_pixels)
    seconds = (container.duration or 0) / 1e6
    if video.duration and video.time_base:
        seconds = float(video.duration * video.time_base)
    if seconds > MAX_SECONDS:
        raise ValueError(f"{source}: {seconds:,.0f} seconds of video, but {MAX_SECONDS:,.0f} fit")
    return seconds


def _sample(
    container: InputContainer, step: float, source: Source, max_pixels: int
) -> Iterator[VideoFrame]:
    """The frame on the screen 0, `step`, 2 `step` ... seconds after the first one."""
    start: Any = None
    passed, taken = 0.0, 0
    shown: VideoFrame | None = None
    for frame in container.decode(video=0):
        if frame.time is None:
            continue
        start = frame.time if start is None else start
        passed = frame.time - start
        if passed > MAX_SECONDS:
            return
        check_size(source, (frame.width, frame.height), max_pixels)
        # Times are rounded to the container's clock.
        while shown is not None and passed > taken * step + 1e-3:
            taken += 1
            yield shown
        shown = frame
    if shown is not None and passed + 1e-3 >= taken * step:
        yield shown


@dataclass(frozen=True)
class VideoConfig(VitConfig):
    """Frames of a video through a ViT; their tokens follow one another.

    `frames_per_second` are taken, and of a longer video `max_frames` spread over all of it.
    """

    frames_per_second: float = free_field(1.0, bounds=(1e-3, 1000))
    max_frames: int = free_field(8, bounds=(1, 65_536))

    suffixes: ClassVar[tuple[str, ...]] = VIDEO_SUFFIXES

    @property
    def max_inputs(self) -> int:
        """Frames, each with its tiles."""
        return self.max_frames * super().max_inputs

    def read(self, source: Source) -> Any:
        """A list of frames in RGB."""
        colour = self.background_colour
        return read_frames(source, self.frames_per_second, self.max_frames, background=colour)

    def augment(self, raw: Any, generator: np.random.Generator) -> Any:
        """The same small random change of every frame."""
        seed = int(generator.integers(2**32))
        return [super(VideoConfig, self).augment(f, np.random.default_rng(seed)) for f in raw]

    def describe(self, raw: Any) -> str:
        """The number of frames and their size."""
        return f"{len(raw)} frames of {super().describe(raw[0])}"

    def preview(self, raw: Any) -> list[tuple[str, bytes]]:
        """A PNG of each frame."""
        return [view for frame in raw for view in super(VideoConfig, self).preview(frame)]

    def blank(self, raw: Any) -> Any:
        """Black frames, as many as there are."""
        return [super(VideoConfig, self).blank(frame) for frame in raw]

    def preprocess(self, raw: Any) -> dict[str, torch.Tensor]:
        """`pixel_values` (T, 3, image_size, image_size): the frames, each with its tiles."""
        frames = [super(VideoConfig, self).preprocess(frame)["pixel_values"] for frame in raw]
        return {"pixel_values": torch.cat(frames)}

    def mock_inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise shaped as `max_frames` frames."""
        size = (self.max_frames, 3, self.image_size, self.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}
