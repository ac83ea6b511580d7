"""Videos that grow brighter."""

import numpy as np
import pytest

av = pytest.importorskip("av")


def write_video(path, frames, rate, shape=(32, 48)):
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = shape
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            grey = np.full((*shape, 3), 255 * number // max(1, frames - 1), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path
