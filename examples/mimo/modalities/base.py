"""Base classes of encoder, projector and codec configs: what a modality must define, and defaults.

A modality is one file with a subclass of `EncoderConfig` for what the model takes in, of
`CodecConfig` for what it puts out, or both. An encoder must have `suffixes`, `max_tokens`,
`input_size`, `read` and `patches`; everything else has a default that suits a transformer over
patches (`sensor.py` is such a file). An encoder of another kind overrides more: `stem` and
`select` for other ends of the same transformer (`image.py`, `audio.py`), `build` for a module
that is no such transformer at all. A codec must have `num_codes`, `encode`, `decode` and `save`.
Nothing here imports Megatron before a module is built.
"""

from __future__ import annotations

import dataclasses
import mimetypes
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from examples.mimo.modalities.files import Blob, Source
from examples.mimo.modalities.values import check, check_divisible, upload

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def free_field(default: Any, **metadata: Any) -> Any:
    """A field that shapes no weight, so that two runs of one model may set it differently."""
    return dataclasses.field(default=default, metadata={"shapes_weights": False, **metadata})


@dataclass(frozen=True)
class EncoderConfig(ABC):
    """The sizes of an encoder, how files become its inputs, and the module that it builds.

    An item (a file) becomes one or more encoder inputs, such as the windows of a recording or
    the tiles of a picture; every tensor of `preprocess` has one entry per input along dim 0.
    The tokens of an item's inputs follow one another in the language model's sequence.

    The metadata of a dataclass field may hold `choices`, the values it can take, `bounds` (see
    `values.py`), and `shapes_weights` False (see `free_field`).
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int

    # "package.module:NAME" of the Hugging Face weight tables (a tuple of `hf.weights.Family`).
    # Without any, the weights are exported under the names they have here.
    hf_families: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check(self)
        check_divisible(self, "hidden_size", "num_attention_heads")

    # Required of every modality.

    @property
    @abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """How names of this modality's files end, in lower case."""

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """The most language-model tokens that one encoder input becomes."""

    @abstractmethod
    def read(self, source: Source) -> Any:
        """A decoded file; ValueError, one line, on anything that is damaged or does not fit."""

    # Required unless `preprocess`, `num_tokens`, `mock_inputs` and `stem` are overridden.

    @property
    def input_size(self) -> int:
        """The number of features in a patch, from which one token is made."""
        raise ValueError(f"{type(self).__name__} needs input_size, or an own stem")

    def patches(self, raw: Any) -> list[np.ndarray]:
        """An item's encoder inputs, each of shape (tokens, input_size)."""
        raise ValueError(f"{type(self).__name__} needs patches, or an own preprocess")

    # Data: defaults for items that are arrays.

    @property
    def max_inputs(self) -> int:
        """The most encoder inputs that one item becomes."""
        return 1

    def augment(self, raw: Any, generator: np.random.Generator) -> Any:
        """A slightly different `raw`, for training with --augment."""
        return raw

    def blank(self, raw: Any) -> Any:
        """`raw` without its content, of the same shape: measures how much a model relies on it."""
        return np.zeros_like(raw)

    def describe(self, raw: Any) -> str:
        """The size of an item in a few words, for statistics."""
        return " x ".join(map(str, raw.shape))

    def preview(self, raw: Any) -> list[tuple[str, bytes]]:
        """What the encoder receives, as files for a browser: (media type, content)."""
        return []

    def preprocess(self, raw: Any) -> dict[str, torch.Tensor]:
        """`patches` (N, max_tokens, input_size), padded with zeros, and `num_patches` (N,).

        Tensors whose names begin with `num_` stay on the host, all others go to the device.
        """
        items = [np.asarray(patches, np.float32) for patches in self.patches(raw)]
        if not 1 <= len(items) <= self.max_inputs:
            raise ValueError(f"{len(items)} encoder inputs, but 1 to {self.max_inputs} fit an item")
        padded = np.zeros((len(items), self.max_tokens, self.input_size), np.float32)
        for number, item in enumerate(items):
            # Caught here, where the file is known, instead of when a batch is put together.
            fits = item.ndim == 2 and item.shape[1] == self.input_size
            if not fits or not 1 <= len(item) <= self.max_tokens:
                raise ValueError(
                    f"an encoder input has shape {item.shape}, but (1 to {self.max_tokens}, "
                    f"{self.input_size}) is needed"
                )
            padded[number, : len(item)] = item
        counts = torch.tensor([len(item) for item in items])
        return {"patches": torch.from_numpy(padded), "num_patches": counts}

    def num_tokens(self, inputs: dict[str, torch.Tensor]) -> int:
        """How many placeholder tokens preprocessed inputs take, of an item or of several."""
        return int(inputs["num_patches"].sum())

    def mock_inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random inputs as `preprocess` makes them, for runs without data."""
        patches = torch.randn((1, self.max_tokens, self.input_size), generator=generator)
        counts = torch.randint(1, self.max_tokens + 1, (1,), generator=generator)
        return {"patches": patches, "num_patches": counts}

    # The module.

    @property
    def output_size(self) -> int:
        """The width of the features that leave the encoder for the projector."""
        return self.hidden_size

    @property
    def sequence_length(self) -> int:
        """The length of the sequence that the transformer layers work on."""
        return self.max_tokens

    @property
    def built_layers(self) -> int:
        """The number of transformer layers that are built."""
        return self.num_layers

    @property
    def stem_flops(self) -> int:
        """Operations of the stem's forward pass on one input; a multiply-add is two."""
        return 2 * self.max_tokens * self.input_size * self.hidden_size

    @property
    def pre_norm(self) -> bool:
        """Whether there is a norm between the stem and the layers."""
        return False

    @property
    def final_norm(self) -> bool:
        """Whether there is a norm behind the layers."""
        return True

    @property
    def layer_scale(self) -> bool:
        """Whether what a layer adds is scaled by a trained factor per feature."""
        return False

    def transformer_fields(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig that differ from those all encoders share."""
        return {}

    def stem(self) -> torch.nn.Module:
        """Plain torch: preprocessed inputs, passed by name -> (N, sequence_length, hidden_size).

        Its weights are the same on all tensor-parallel ranks. If it has a method
        `initialize(init_method)`, that is called once the layers are built.
        """
        return LinearPatchEmbedding(self.max_tokens, self.input_size, self.hidden_size)

    def select(self, hidden: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """(N, sequence_length, hidden_size) -> (tokens, output_size), inputs in order."""
        return first_tokens(hidden, inputs["num_patches"])

    def build(self, transformer_config: TransformerConfig, pg_collection: Any) -> torch.nn.Module:
        """The encoder: preprocessed inputs, passed by name -> (tokens, output_size).

        `transformer_config` is the language model's: it says how things are computed.
        """
        from examples.mimo.model.layers import TransformerEncoder

        return TransformerEncoder(self, transformer_config, pg_collection)


class LinearPatchEmbedding(torch.nn.Module):
    """A linear layer on each patch, and fixed sinusoidal positions."""

    positions: torch.Tensor

    def __init__(self, max_tokens: int, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(input_size, hidden_size)
        # Computed, so no checkpoint needs to hold them.
        self.register_buffer("positions", sinusoids(max_tokens, hidden_size), persistent=False)

    def forward(self, patches: torch.Tensor, num_patches: torch.Tensor) -> torch.Tensor:
        """(N, T, input_size) -> (N, T, hidden_size); padding is embedded like any patch."""
        hidden = self.linear(patches)
        return hidden + self.positions.to(hidden.dtype)


def sinusoids(length: int, width: int) -> torch.Tensor:
    """(length, width): sines, then cosines, of wavelengths from 2 pi to 10,000 * 2 pi.

    The positions of Whisper (arXiv:2212.04356), bit for bit.
    """
    if width < 4 or width % 2:
        raise ValueError(f"hidden_size {width}: sinusoidal positions need an even size from 4 on")
    step = torch.log(torch.tensor(10_000.0)) / (width // 2 - 1)
    scaled = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(width // 2))[None, :]
    return torch.cat([scaled.sin(), scaled.cos()], dim=1)


def first_tokens(tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(N, T, H), (N,) -> (sum of counts, H): the first `counts` tokens of each input.

    `counts` are on the host: from there a GPU gets the places of the tokens without a wait.
    """
    is_kept = torch.arange(tokens.shape[1]) < counts.cpu()[:, None]
    places = upload(is_kept.flatten().nonzero()[:, 0], tokens.device)
    return tokens.flatten(0, 1).index_select(0, places)


@dataclass(frozen=True)
class ProjectorConfig(ABC):
    """What leads from an encoder's features to the language model's.

    A module built of plain torch layers is right under tensor parallelism: all ranks hold the
    same weights, and receive the same inputs and the same gradients.
    """

    # As of `EncoderConfig`.
    hf_families: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check(self)

    @abstractmethod
    def build(
        self, input_size: int, transformer_config: TransformerConfig, pg_collection: Any
    ) -> torch.nn.Module:
        """The module: (tokens, input_size) -> (tokens, the language model's hidden size)."""

    @abstractmethod
    def flops(self, input_size: int, output_size: int) -> int:
        """Operations of a token's forward pass; a multiply-add is two."""


@dataclass(frozen=True)
class MLPProjectorConfig(ProjectorConfig):
    """Two tensor-parallel linear layers with a GELU between, as in LLaVA-1.5."""

    ffn_hidden_size: int

    hf_families: ClassVar[str | None] = "examples.mimo.hf.families:PROJECTOR"

    def build(
        self, input_size: int, transformer_config: TransformerConfig, pg_collection: Any
    ) -> torch.nn.Module:
        """Megatron's projector, its first layer split by columns and its second by rows."""
        from megatron.core.models.vision.multimodal_projector import MultimodalProjector

        from examples.mimo.model.layers import mlp_submodules
        from examples.mimo.model.parts import encoder_transformer_config

        config = encoder_transformer_config(
            transformer_config,
            num_layers=1,  # TransformerConfig wants layers and heads; a projector has none
            hidden_size=transformer_config.hidden_size,
            num_attention_heads=transformer_config.num_attention_heads,
            ffn_hidden_size=self.ffn_hidden_size,
            activation_func=functional.gelu,
        )
        return MultimodalProjector(
            config=config,
            submodules=mlp_submodules(),
            projector_type="mlp",
            input_size=input_size,
            pg_collection=pg_collection,
        )

    def flops(self, input_size: int, output_size: int) -> int:
        """Both layers' products."""
        return 2 * self.ffn_hidden_size * (input_size + output_size)


@dataclass(frozen=True)
class CodedItem(Blob):
    """An item that is codes already: what the model put out in an earlier answer."""

    codes: Sequence[int] = ()


@dataclass(frozen=True)
class CodecConfig(ABC):
    """How a modality's raw items become codes, and codes raw items: what the model puts out.

    A code is a token of the language model, with an id behind the text's (`MimoConfig.outputs`), so
    an output is trained, generated and streamed as text is. Codes come in units, such as the
    codebooks of a frame: an output is whole units, at least one. Codes are 0 to `num_codes` - 1.
    """

    # Where its files are: set when a data folder or a checkpoint is opened, and never saved.
    folder: str = dataclasses.field(
        default="", kw_only=True, compare=False, metadata={"shapes_weights": False, "saved": False}
    )

    # The files in `folder` that encoding and decoding need, and what makes them, for messages.
    files: ClassVar[tuple[str, ...]] = ()
    origin: ClassVar[str] = "copy it from where the codec was made"

    def __post_init__(self) -> None:
        check(self)

    # Required of every codec.

    @property
    @abstractmethod
    def num_codes(self) -> int:
        """The number of different codes; known without the files."""

    @abstractmethod
    def encode(self, raw: Any) -> list[int]:
        """The codes of an item."""

    @abstractmethod
    def decode(self, codes: Sequence[int]) -> Any:
        """The item that codes stand for; ValueError where `check_codes` finds one."""

    @abstractmethod
    def save(self, raw: Any, path: Path) -> None:
        """Write an item to a file; ValueError, one line, for a format that cannot be written."""

    # Defaults.

    @property
    def suffixes(self) -> tuple[str, ...]:
        """How names of files end, in lower case; the first is what an answer is saved as."""
        return ()

    def read(self, source: Source) -> Any:
        """A decoded file, as of `EncoderConfig.read`, which is called where there is an encoder."""
        raise ValueError(f"{type(self).__name__} needs read: this modality has no encoder")

    @property
    def unit(self) -> int:
        """How many codes belong together."""
        return 1

    def allowed(self, position: int) -> range:
        """The codes that may stand at this position of an output."""
        return range(self.num_codes)

    def check_codes(self, codes: Sequence[int]) -> None:
        """ValueError, one line, unless these are whole units of codes that are allowed there."""
        if not codes or len(codes) % self.unit:
            raise ValueError(f"{len(codes)} codes, but an output is whole units of {self.unit}")
        for position, code in enumerate(codes):
            allowed = self.allowed(position)
            if not allowed:
                raise ValueError(f"{len(codes)} codes, but {position} are all that fit an output")
            if code not in allowed or not 0 <= code < self.num_codes:
                last = min(allowed.stop, self.num_codes) - 1
                raise ValueError(
                    f"code {code} at position {position}, but {allowed.start} to {last} may stand "
                    "there"
                )

    def decode_pieces(self, codes: Iterable[int]) -> Iterator[Any]:
        """Raw pieces as the codes come, which together are a decoded output; one by default."""
        yield self.decode(list(codes))

    def encode_bytes(self, raw: Any, format: str) -> bytes:
        """An item as a file of a `format` such as wav, for a server."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"output.{format}"
            self.save(raw, path)
            return path.read_bytes()

    def mime_type(self, format: str) -> str:
        """What a browser calls files of a `format`."""
        return mimetypes.guess_type(f"output.{format}")[0] or "application/octet-stream"
