"""Image modality: preprocessing, and the vision transformer (arXiv:2010.11929).

CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343) and DINOv2 (arXiv:2304.07193) differ by the
entries of `FAMILIES` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from examples.mimo.modalities.base import EncoderConfig, free_field
from examples.mimo.modalities.files import Source, fit_picture, grid_of_tiles, read_image, to_png
from examples.mimo.modalities.values import bounds

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".img"),
    *(".avif", ".heic", ".heif"),
)
FITS = ("crop", "stretch", "pad")
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # as Pillow numbers them
MAX_SIDE = 16_384


def tanh_gelu(values: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (arXiv:1606.08415), as SigLIP was trained."""
    return functional.gelu(values, approximate="tanh")


def quick_gelu(values: torch.Tensor) -> torch.Tensor:
    """GELU by a sigmoid, as CLIP was trained; Megatron has it too, but is not imported here."""
    return values * torch.sigmoid(1.702 * values)


@dataclass(frozen=True)
class VitFamily:
    """What sets one kind of ViT apart from a plain one."""

    activation: Callable[[torch.Tensor], torch.Tensor]
    norm_epsilon: float
    class_token: bool = True
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    layer_scale: bool = False
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


FAMILIES = {
    "clip": VitFamily(
        quick_gelu,
        norm_epsilon=1e-5,
        patch_bias=False,
        pre_norm=True,
        final_norm=False,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    "siglip": VitFamily(tanh_gelu, norm_epsilon=1e-6, class_token=False),
    "dinov2": VitFamily(
        functional.gelu,
        norm_epsilon=1e-6,
        layer_scale=True,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
}


@dataclass(frozen=True)
class VitConfig(EncoderConfig):
    """A ViT over square pictures of `image_size` pixels in patches of `patch_size`.

    `family` is one of `FAMILIES`. `feature_layer` counts from the end as in Hugging Face: -1 is
    the last layer's output, behind the final norm if the family has one; -2 the layer before it
    (LLaVA's choice), without. Layers behind it are not built.
    `fit` says how a picture of another shape becomes square: `crop` cuts the centre out, `stretch`
    scales the sides apart, `pad` fills the shorter side up with the mean colour. With `resize_side`
    a picture is scaled or stretched to that side first, and its centre cut out; `resample` is the
    filter. Then (value / 255 - mean) / std, with the family's mean and std unless given.
    `background` shows through transparent pictures: white, black or the mean colour.
    A picture that is larger than the input becomes the fitted picture and up to `max_tiles` tiles
    of it in more detail, row by row; their tokens follow one another.
    `augment_shift`, `augment_degrees` and `augment_scale` bound the random changes in training:
    shift and scale as parts of the picture's side, rotation in degrees.
    """

    image_size: int = field(metadata=bounds(1, MAX_SIDE))
    patch_size: int = field(metadata=bounds(1, 512))
    family: str = field(default="clip", metadata={"choices": tuple(FAMILIES)})
    feature_layer: int = field(default=-1, metadata=bounds(-1024, -1))
    patches_per_token: int = 1
    fit: str = free_field("crop", choices=FITS)
    resize_side: int | None = free_field(None, bounds=(1, MAX_SIDE))
    resample: str = free_field("bicubic", choices=FILTERS)
    mean: tuple[float, float, float] | None = free_field(None, bounds=(-1e6, 1e6))
    std: tuple[float, float, float] | None = free_field(None, bounds=(1e-6, 1e6))
    background: str = free_field("white", choices=("white", "black", "mean"))
    max_tiles: int = free_field(0, bounds=(0, 1024))
    augment_shift: float = free_field(0.0, bounds=(0, 1))
    augment_degrees: float = free_field(0.0, bounds=(0, 180))
    augment_scale: float = free_field(0.0, bounds=(0, 0.9))

    suffixes: ClassVar[tuple[str, ...]] = IMAGE_SUFFIXES
    hf_families: ClassVar[str | None] = "examples.mimo.hf.families:VISION"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} must hold a patch of {self.patch_size} pixels"
            )
        if not -self.num_layers <= self.feature_layer <= -1:
            raise ValueError(
                f"feature_layer {self.feature_layer} must lie in -{self.num_layers}..-1"
            )
        side = self.token_side
        if side**2 != self.patches_per_token or not side or self.patches_per_side % side:
            raise ValueError(
                f"patches_per_token {self.patches_per_token} must be the square of a number that "
                f"divides the {self.patches_per_side} patches of a side"
            )
        if self.resize_side is not None and self.resize_side < self.image_size:
            raise ValueError(
                f"resize_side {self.resize_side}: at least image_size {self.image_size}"
            )
        if self.resize_side is not None and self.fit == "pad":
            raise ValueError(
                f"resize_side {self.resize_side}: fit pad scales to image_size; leave it out"
            )

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the channels, of values from 0 to 1."""
        return self.mean or FAMILIES[self.family].mean, self.std or FAMILIES[self.family].std

    @property
    def mean_colour(self) -> tuple[int, ...]:
        """The colour that the encoder sees as 0, rounded down as LLaVA's."""
        return tuple(min(255, max(0, int(255 * part))) for part in self.normalization[0])

    @property
    def background_colour(self) -> tuple[int, ...]:
        """What shows through a transparent picture."""
        return {"white": (255,) * 3, "black": (0,) * 3, "mean": self.mean_colour}[self.background]

    @property
    def token_side(self) -> int:
        """Patches along the side of the square that becomes a token."""
        return math.isqrt(self.patches_per_token)

    @property
    def patches_per_side(self) -> int:
        """Whole patches along a side; pixels that fill no patch are not seen."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """The number of patches of an encoder input."""
        return self.patches_per_side**2

    @property
    def max_tokens(self) -> int:
        """`patches_per_token` patches make a token; the class token is dropped."""
        return self.num_patches // self.patches_per_token

    @property
    def max_inputs(self) -> int:
        """The picture, and its tiles."""
        return 1 + self.max_tiles

    def read(self, source: Source) -> Image.Image:
        """A picture in RGB, upright, on `background` where it was transparent."""
        return read_image(source, background=self.background_colour)

    def augment(self, raw: Image.Image, generator: np.random.Generator) -> Image.Image:
        """A small random rotation, scaling and shift; the upper left pixel's colour fills gaps."""
        degrees, scale = generator.uniform(-1, 1, 2) * (self.augment_degrees, self.augment_scale)
        dx, dy = generator.uniform(-1, 1, 2) * self.augment_shift * raw.width
        radians = np.deg2rad(degrees)
        cos, sin = np.cos(radians) / (1 + scale), np.sin(radians) / (1 + scale)
        x, y = raw.width / 2, raw.height / 2
        upper = (cos, sin, x - cos * (x + dx) - sin * (y + dy))
        lower = (-sin, cos, y + sin * (x + dx) - cos * (y + dy))
        matrix = (*upper, *lower)  # from output to input pixels, as Pillow takes it
        return raw.transform(
            raw.size,
            Image.Transform.AFFINE,
            matrix,
            Image.Resampling.BILINEAR,
            fillcolor=raw.getpixel((0, 0)),
        )

    def blank(self, raw: Image.Image) -> Image.Image:
        """A black picture of the same size."""
        return Image.new("RGB", raw.size)

    def describe(self, raw: Image.Image) -> str:
        """Width x height in pixels."""
        return f"{raw.width} x {raw.height}"

    def preview(self, raw: Image.Image) -> list[tuple[str, bytes]]:
        """A PNG of each encoder input, normalisation undone."""
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in self.normalization)
        pixels = self.preprocess(raw)["pixel_values"] * std + mean
        bytes_ = (pixels * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return [("image/png", to_png(Image.fromarray(picture))) for picture in bytes_]

    def preprocess(self, raw: Image.Image) -> dict[str, torch.Tensor]:
        """`pixel_values` (T, 3, image_size, image_size): the fitted picture, then its tiles."""
        size, colour = self.image_size, self.mean_colour
        resample = Image.Resampling(FILTERS.index(self.resample))
        first = fit_picture(raw, (size, size), self.fit, colour, resample, self.resize_side)
        pictures = [first]
        columns, rows = grid_of_tiles(raw.size, size, self.max_tiles)
        if columns * rows:  # none where the picture is no larger than the input
            whole = fit_picture(raw, (columns * size, rows * size), "pad", colour, resample)
            corners = [(size * x, size * y) for y in range(rows) for x in range(columns)]
            pictures += [whole.crop((x, y, x + size, y + size)) for x, y in corners]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        # (byte / 255 - mean) / std in one pass over the pixels.
        mean, std = (torch.tensor(values) for values in self.normalization)
        scale, shift = 1 / (255 * std), -mean / std
        values = torch.addcmul(shift.view(3, 1, 1), pixels.permute(0, 3, 1, 2), scale.view(3, 1, 1))
        return {"pixel_values": values.contiguous()}

    def num_tokens(self, inputs: dict[str, torch.Tensor]) -> int:
        """The picture and each of its tiles take equally many."""
        return len(inputs["pixel_values"]) * self.max_tokens

    def mock_inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise shaped as a picture without tiles."""
        size = (1, 3, self.image_size, self.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}

    @property
    def output_size(self) -> int:
        """The features of a token's patches, side by side."""
        return self.hidden_size * self.patches_per_token

    @property
    def sequence_length(self) -> int:
        """The patches, and the class token."""
        return self.num_patches + FAMILIES[self.family].class_token

    @property
    def built_layers(self) -> int:
        """The layers up to the one whose output is used."""
        return self.num_layers + self.feature_layer + 1

    @property
    def stem_flops(self) -> int:
        """The patch embedding of one input."""
        return 2 * self.num_patches * 3 * self.patch_size**2 * self.hidden_size

    @property
    def pre_norm(self) -> bool:
        """CLIP norms what enters the layers."""
        return FAMILIES[self.family].pre_norm

    @property
    def final_norm(self) -> bool:
        """Features of an earlier layer are taken before the norm."""
        return FAMILIES[self.family].final_norm and self.feature_layer == -1

    @property
    def layer_scale(self) -> bool:
        """DINOv2 scales what a layer adds."""
        return FAMILIES[self.family].layer_scale

    def transformer_fields(self) -> dict[str, Any]:
        """The family's activation and norm."""
        family = FAMILIES[self.family]
        return {"activation_func": family.activation, "layernorm_epsilon": family.norm_epsilon}

    def stem(self) -> torch.nn.Module:
        """Patch embedding, class token and position table."""
        return PatchEmbedding(self)

    def select(self, hidden: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """(N, S, H) -> (N * P, k * k * H): squares of k by k patches, row by row."""
        patches = hidden[:, FAMILIES[self.family].class_token :]
        side = (self.patches_per_side // self.token_side, self.token_side)  # tokens, patches of one
        squares = patches.unflatten(1, (*side, *side)).transpose(2, 3)
        return squares.flatten(3).flatten(0, 2)


class PatchEmbedding(torch.nn.Module):
    """A convolution over patches, a class token in front if the family has one, positions."""

    def __init__(self, vit: VitConfig) -> None:
        super().__init__()
        family, width = FAMILIES[vit.family], vit.hidden_size
        # Also for sides that are no multiple of a patch: the convolution ignores the rest.
        self.conv1 = torch.nn.Conv2d(
            3, width, kernel_size=vit.patch_size, stride=vit.patch_size, bias=family.patch_bias
        )
        self.positions = torch.nn.Parameter(torch.randn(vit.sequence_length, width))
        self.class_token = (
            torch.nn.Parameter(torch.randn(1, 1, width)) if family.class_token else None
        )

    @torch.no_grad()
    def initialize(self, init_method: Callable[[torch.Tensor], Any]) -> None:
        """Start tables as Megatron starts embeddings; randn's are fifty times as large."""
        for table in (self.positions, self.class_token):
            if table is not None:
                init_method(table)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, side, side) -> (N, S, H)."""
        hidden = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            hidden = torch.cat([self.class_token.expand(len(hidden), -1, -1), hidden], dim=1)
        return hidden + self.positions
