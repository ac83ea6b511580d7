"""A codec of drawings: patches of a small square picture, each the nearest of learned ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from examples.mimo.modalities.base import CodecConfig
from examples.mimo.modalities.codebook import nearest, read_codebook
from examples.mimo.modalities.files import Source, read_image


@dataclass(frozen=True)
class DrawingCodec(CodecConfig):
    """(side, side) of ink from 0 to 1; a code is a patch of it, row by row."""

    num_codes: int = 64
    side: int = 8
    patch_side: int = 2
    suffixes = (".png",)
    files = ("patches.safetensors",)

    @property
    def unit(self) -> int:
        return (self.side // self.patch_side) ** 2  # a whole drawing

    def allowed(self, position: int) -> range:
        return range(self.num_codes if position < self.unit else 0)

    def read(self, source: Source) -> np.ndarray:
        small = read_image(source).convert("L").resize((self.side,) * 2, Image.Resampling.BOX)
        return 1 - np.asarray(small) / 255

    def patches(self, raw: np.ndarray) -> np.ndarray:
        count, patch = self.side // self.patch_side, self.patch_side
        return raw.reshape(count, patch, count, patch).swapaxes(1, 2).reshape(self.unit, -1)

    def encode(self, raw: np.ndarray) -> list[int]:
        return nearest(self.patches(raw), self.centroids()).tolist()

    def decode(self, codes: Sequence[int]) -> np.ndarray:
        self.check_codes(codes)
        count, patch = self.side // self.patch_side, self.patch_side
        patches = self.centroids()[list(codes)].reshape(count, count, patch, patch)
        return patches.swapaxes(1, 2).reshape(self.side, self.side)

    def save(self, raw: np.ndarray, path: Path) -> None:
        pixels = (255 * (1 - raw)).round().astype(np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(path)

    def centroids(self) -> np.ndarray:
        path = Path(self.folder, self.files[0])
        return read_codebook(path, (self.num_codes, self.patch_side**2)).centroids
