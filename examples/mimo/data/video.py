"""Frames from videos that nobody has checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from examples.mimo.data.images import MAX_PIXELS
from examples.mimo.data.sources import Source, open_source

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
MAX_SECONDS = 2 * 3600.0
# Containers of pictures and sound; a playlist would name other files and addresses.
OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "protocol_whitelist": "",
}


def read_frames(
    source: Source, frames_per_second: float, max_frames: int, max_pixels: int = MAX_PIXELS
) -> list[Image.Image]:
    """RGB frames, `frames_per_second` of them, spread further apart if there were too many.

    Raises ValueError, one line, when the file is missing, empty, damaged, no video, longer than
    two hours, or has frames of more than `max_pixels` (checked before any is decoded).
    """
    try:
        import av
    except ImportError:
        raise ValueError(f"{source}: videos need PyAV: pip install 'mimo-examples[data]'") from None
    try:
        with (
            open_source(source, "video") as stream,
            av.open(stream, mode="r", options=OPTIONS) as container,
        ):
            seconds = _check(container, source, max_pixels)
            step = max(1 / frames_per_second, seconds / max_frames)
            # Decoding ends early where the container does not know how long it is.
            wanted = itertools.islice(_every(container, step, source, max_pixels), max_frames)
            frames = [frame.to_image() for frame in wanted]
    except av.error.FFmpegError as error:
        raise ValueError(f"{source}: not a video that can be read ({error.strerror})") from None
    expected = max(1, min(max_frames, int(seconds / step)))
    if len(frames) < expected:
        raise ValueError(f"{source}: damaged video, {len(frames)} of {expected} frames can be read")
    return frames


def _check(container: InputContainer, source: Source, max_pixels: int) -> float:
    """The seconds of pictures that the header speaks of."""
    if not container.streams.video:
        raise ValueError(f"{source}: no pictures in this file")
    video = container.streams.video[0]
    pixels = video.width * video.height
    if not 0 < pixels <= max_pixels:
        raise ValueError(
            f"{source}: frames of {video.width} x {video.height}, {pixels:,} pixels; from 1 to "
            f"{max_pixels:,} can be read"
        )
    seconds = (container.duration or 0) / 1e6
    if video.duration and video.time_base:
        seconds = float(video.duration * video.time_base)
    if seconds > MAX_SECONDS:
        raise ValueError(f"{source}: {seconds:,.0f} seconds of video, but {MAX_SECONDS:,.0f} fit")
    return seconds


def _every(
    container: InputContainer, step: float, source: Source, max_pixels: int
) -> Iterator[VideoFrame]:
    """What is on the screen 0, `step`, 2 `step` ... seconds after the first frame."""
    start: Any = None
    passed, wanted = 0.0, 0
    shown: VideoFrame | None = None
    for frame in container.decode(video=0):
        if frame.time is None:
            continue
        start = frame.time if start is None else start
        passed = frame.time - start
        if passed > MAX_SECONDS:
            return
        if frame.width * frame.height > max_pixels:
            raise ValueError(f"{source}: a frame of {frame.width} x {frame.height} is too large")
        # Times are rounded to the container's clock.
        while shown is not None and passed > wanted * step + 1e-3:
            wanted += 1
            yield shown
        shown = frame
    if shown is not None and passed + 1e-3 >= wanted * step:
        yield shown
