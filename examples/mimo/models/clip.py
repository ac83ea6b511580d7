"""The eye: CLIP's vision transformer (arXiv:2103.00020) from Megatron-Core blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from PIL import Image

from examples.mimo.data.images import read_image
from examples.mimo.models.encoder_config import encoder_transformer_config
from examples.mimo.models.flops import Flops, layer_flops
from examples.mimo.models.layer_specs import block_submodules
from examples.mimo.models.norm import Norm

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP ViT over square pictures of `image_size` pixels in patches of `patch_size`.

    `feature_layer` counts from the end as in Hugging Face: -1 is the last layer's output, -2
    the one before it (LLaVA's choice), whose layers are then not built at all.
    `augment_shift`, `augment_degrees` and `augment_scale` bound the random changes in training:
    shift and scale as parts of the picture's side, rotation in degrees.
    """

    image_size: int
    patch_size: int
    num_layers: int
    width: int
    num_heads: int
    ffn_hidden_size: int
    feature_layer: int = -1
    augment_shift: float = 0.0
    augment_degrees: float = 0.0
    augment_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )
        if not -self.num_layers <= self.feature_layer <= -1:
            raise ValueError(
                f"feature_layer {self.feature_layer} must lie in -{self.num_layers}..-1"
            )

    @property
    def hidden_size(self) -> int:
        """The width of a patch's features."""
        return self.width

    @property
    def num_patches(self) -> int:
        """Patches in a picture."""
        return (self.image_size // self.patch_size) ** 2

    def read(self, path: Path) -> Image.Image:
        """The picture in RGB, upright, on black where it was transparent."""
        return read_image(path)

    def augment(self, raw: Image.Image, generator: np.random.Generator) -> Image.Image:
        """A random small rotation, scaling and shift of the picture; edges repeat nothing."""
        degrees, scale = generator.uniform(-1, 1, 2) * (self.augment_degrees, self.augment_scale)
        dx, dy = generator.uniform(-1, 1, 2) * self.augment_shift * raw.width
        radians = np.deg2rad(degrees)
        cos, sin = np.cos(radians) / (1 + scale), np.sin(radians) / (1 + scale)
        x, y = raw.width / 2, raw.height / 2
        upper = (cos, sin, x - cos * (x + dx) - sin * (y + dy))
        lower = (-sin, cos, y + sin * (x + dx) - cos * (y + dy))
        matrix = (*upper, *lower)
        return raw.transform(raw.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    def blank(self, raw: Image.Image) -> Image.Image:
        """A black picture of the same size."""
        return Image.new("RGB", raw.size)

    def preprocess(self, raw: Image.Image) -> dict[str, torch.Tensor]:
        """`pixel_values` (3, image_size, image_size): short side resized, centre cut out."""
        scale = self.image_size / min(raw.size)
        width, height = (max(self.image_size, round(side * scale)) for side in raw.size)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        size = (width, height)
        picture = raw if raw.size == size else raw.resize(size, Image.Resampling.BICUBIC)
        picture = picture.crop((left, top, left + self.image_size, top + self.image_size))
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32)) / 255.0
        pixels = (pixels - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
        return {"pixel_values": pixels.permute(2, 0, 1).contiguous()}

    def num_tokens(self, inputs: dict[str, torch.Tensor]) -> int:
        """One token a patch; the class token is dropped."""
        return self.num_patches

    def mock_inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise of the shape `preprocess` makes."""
        size = (3, self.image_size, self.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}

    def flops(self) -> Flops:
        """One picture through the patch embedding and the layers that are kept."""
        num_layers = self.num_layers + self.feature_layer + 1
        embed = 2 * self.num_patches * 3 * self.patch_size**2 * self.width
        rows = self.num_patches + 1
        layer = layer_flops(rows, self.width, self.width, self.ffn_hidden_size)
        return Flops(embed) + layer * num_layers

    def spec(self, language: TransformerConfig, pg_collection: Any) -> ModuleSpec:
        """`ClipEncoder` as a module spec."""
        return ModuleSpec(
            module=ClipEncoder,
            params={"clip": self, "language": language, "pg_collection": pg_collection},
        )


class ClipEncoder(CLIPViTModel):
    """A CLIP ViT that returns its patches' features."""

    def __init__(self, clip: ClipConfig, language: TransformerConfig, pg_collection: Any) -> None:
        num_layers = clip.num_layers + clip.feature_layer + 1
        config = encoder_transformer_config(
            language,
            num_layers=num_layers,
            hidden_size=clip.width,
            num_attention_heads=clip.num_heads,
            ffn_hidden_size=clip.ffn_hidden_size,
            activation_func=quick_gelu,
        )
        super().__init__(
            config,
            block_submodules(config.transformer_impl, AttnMaskType.no_mask, num_layers),
            ln_pre_impl=Norm,
            patch_dim=clip.patch_size,
            img_h=clip.image_size,
            img_w=clip.image_size,
            pg_collection=pg_collection,
        )
        with torch.no_grad():
            config.init_method(self.position_embeddings.weight)
            config.init_method(self.class_token)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """(N, 3, H, W) -> (N * P, width); media order kept."""
        pixel_values = pixel_values.to(self.conv1.weight.dtype)
        return super().forward(pixel_values)[:, self.class_token_len :].flatten(0, 1)
