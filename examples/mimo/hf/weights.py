"""Weight mappings between Hugging Face's tensors and Megatron's, with the layout of each.

And what a family's preprocessor_config.json says of how files become an encoder's inputs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch

from examples.mimo.modalities.audio import FFT_SAMPLES, SAMPLE_RATE_HZ
from examples.mimo.modalities.image import FILTERS, MAX_SIDE


class Layout(Protocol):
    """A reversible change between Hugging Face's tensors and this package's one."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Their tensors -> ours."""

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """Ours -> theirs, in the same order."""


class Same:
    """One tensor, the same on both sides."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = theirs
        return tensor

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        return [ours]


SAME = Same()


@dataclass(frozen=True)
class View:
    """One tensor whose dimensions of size one differ."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = theirs
        return tensor.reshape(self.ours)

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        return [ours.reshape(self.theirs)]


@dataclass(frozen=True)
class Qkv:
    """Queries, keys and values <-> for each group its queries, its key and its value.

    Heads are the first dimension of a weight (heads * head_dim, H) or a bias (heads * head_dim).
    """

    num_heads: int
    num_groups: int

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """(q, k, v) -> (groups * (heads / groups + 2) * head_dim, ...)."""
        groups = [tensor.unflatten(0, (self.num_groups, -1)) for tensor in theirs]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        head_dim = ours.shape[0] // (self.num_heads + 2 * self.num_groups)
        queries = self.num_heads // self.num_groups * head_dim
        groups = ours.unflatten(0, (self.num_groups, -1))
        return [part.flatten(0, 1) for part in groups.split([queries, head_dim, head_dim], 1)]


@dataclass(frozen=True)
class QkvWithoutKeyBias:
    """The bias of queries and values; Whisper's keys have none.

    A bias of the keys moves all scores of a query alike, which softmax does not see, so ours is
    zero on the way in and dropped on the way out.
    """

    num_heads: int

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """(q, v) -> (3 * H,)."""
        query, value = theirs
        return Qkv(self.num_heads, self.num_heads).join([query, torch.zeros_like(query), value])

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        query, _, value = Qkv(self.num_heads, self.num_heads).split(ours)
        return [query, value]


class GateUp:
    """The gate projection's weights above the up projection's."""

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """(gate, up) -> (2 * ffn, H)."""
        return torch.cat(list(theirs))

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        return list(ours.chunk(2))


@dataclass(frozen=True)
class Vocabulary:
    """A table with an entry per token; entries beyond theirs start as the mean of theirs."""

    theirs: int
    ours: int

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """(V, H) -> (padded V, H)."""
        (table,) = theirs
        mean = table.mean(dim=0, dtype=torch.float32).to(table.dtype)
        return torch.cat([table, mean.expand(self.ours - self.theirs, -1)])

    def split(self, ours: torch.Tensor) -> list[torch.Tensor]:
        return [ours[: self.theirs]]


@dataclass(frozen=True)
class WeightMapping:
    """Our checkpoint key, the names of their tensors, and the layout between them.

    Names with `{i}` stand for every layer; our checkpoint keeps all layers under one key.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME

    @property
    def layered(self) -> bool:
        """Whether this maps a tensor of every layer."""
        return "{i}" in self.theirs[0]


def renamed(ours: str, theirs: str, *suffixes: str) -> list[WeightMapping]:
    """Mappings of tensors that differ by name alone: `renamed("a.", "b.", "weight", "bias")`."""
    return [WeightMapping(f"{ours}{suffix}", (f"{theirs}{suffix}",)) for suffix in suffixes]


class Preprocessor(Protocol):
    """Reads and writes the preprocessor_config.json of a family."""

    # Where processor_config.json holds the same.
    section: str

    def fields(
        self, values: Mapping[str, Any], config: Any, where: str, part: str
    ) -> dict[str, Any]:
        """What `values` say of the fields of `config` that shape no weight.

        ValueError, one line, for what this package cannot do or `config` cannot be. `where` names
        the file and `part` the part of the model.
        """

    def values(self, config: Any) -> dict[str, Any] | None:
        """A file that describes `config`; None where none can."""


# Processors that scale, cut the centre out and normalise, with the defaults of what a file omits.
_SHORTEST = {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224}
_SQUARE = {"size": {"height": 224, "width": 224}, "do_center_crop": False, "crop_size": 224}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_EVERY_IMAGE = {
    **{"do_resize": True, "resample": 3, "do_pad": False, "default_to_square": False},
    **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True},
}
IMAGE_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {**_EVERY_IMAGE, **_SHORTEST, **_CLIP},
    "LlavaImageProcessor": {**_EVERY_IMAGE, **_SHORTEST, **_CLIP},
    "BitImageProcessor": {**_EVERY_IMAGE, **_SHORTEST, **_CLIP},
    "SiglipImageProcessor": {**_EVERY_IMAGE, **_SQUARE, **_HALF},
    "ViTImageProcessor": {
        **{**_EVERY_IMAGE, **_SQUARE, **_HALF},
        **{"resample": 2, "default_to_square": True},
    },
}
REMEDY = "change the file, or remove it to keep the config's own values"


@dataclass(frozen=True)
class ImagePreprocessor:
    """`processor` is transformers' class for the family, where a file names none."""

    processor: str
    section = "image_processor"

    def fields(
        self, values: Mapping[str, Any], config: Any, where: str, part: str
    ) -> dict[str, Any]:
        """Fit, side, filter, mean and standard deviation of a VitConfig."""
        settings = _Settings({**values, "image_processor_type": self._kind(values)}, where)
        kind = settings.expect("image_processor_type", IMAGE_PROCESSORS)
        settings.defaults = IMAGE_PROCESSORS[kind]
        settings.expect("do_resize", [True])
        settings.expect("do_pad", [False])
        for name in ("do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
            settings.expect(name, [True, False])
        is_cropped = settings["do_center_crop"]
        name = "crop_size" if is_cropped else "size"
        is_square = settings.expect("default_to_square", [True, False])
        by_shortest, side = settings.size("size", is_square)
        cut = settings.size("crop_size", True)[1] if is_cropped else side
        if by_shortest and not is_cropped:
            settings.refuse("do_center_crop", "pictures must become squares")
        if cut != config.image_size:
            settings.refuse(name, f"{part} has image_size {config.image_size}")
        if side < cut:
            settings.refuse("size", f"crop_size is {cut}, which must fit into it")
        # (value * factor - mean) / std = (value / 255 - mean / scale) / (std / scale)
        factor = settings.number("rescale_factor") if settings["do_rescale"] else 1.0
        scale = 1.0 if math.isclose(255 * factor, 1.0, rel_tol=1e-9) else 255 * factor
        is_normal = settings["do_normalize"]
        mean = settings.numbers("image_mean") if is_normal else (0.0,) * 3
        std = settings.numbers("image_std") if is_normal else (1.0,) * 3
        if scale <= 0:
            settings.refuse("rescale_factor", "it must be above 0")
        return {
            "fit": "crop" if by_shortest else "stretch",
            "resize_side": side if side != cut else None,
            "resample": FILTERS[settings.expect("resample", range(len(FILTERS)))],
            "mean": tuple(value / scale for value in mean),
            "std": tuple(value / scale for value in std),
        }

    def values(self, config: Any) -> dict[str, Any] | None:
        """What transformers' processor does as this package; it has none that scales, then pads."""
        if config.fit == "pad":
            return None
        side, cut = config.resize_side or config.image_size, config.image_size
        is_cropped = config.fit == "crop" or side != cut
        mean, std = config.normalization
        square = {"height": side, "width": side}
        # SigLIP's own cuts nothing out.
        is_other = is_cropped and self.processor == "SiglipImageProcessor"
        kind = "CLIPImageProcessor" if is_other else self.processor
        return {
            "image_processor_type": kind,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": side} if config.fit == "crop" else square,
            "resample": FILTERS.index(config.resample),
            "do_center_crop": is_cropped,
            **({"crop_size": {"height": cut, "width": cut}} if is_cropped else {}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(mean),
            "image_std": list(std),
        }

    def _kind(self, values: Mapping[str, Any]) -> str:
        """The class, without what names its implementation; older files name it otherwise."""
        kind = values.get("image_processor_type") or values.get("feature_extractor_type")
        kind = str(kind or self.processor).removesuffix("Fast").removesuffix("Pil")
        return kind.replace("FeatureExtractor", "ImageProcessor")


class WhisperPreprocessor:
    """Whisper's features follow from the encoder's sizes, so there is nothing to choose."""

    section = "feature_extractor"

    def fields(
        self, values: Mapping[str, Any], config: Any, where: str, part: str
    ) -> dict[str, Any]:
        """None; ValueError where `values` are not those of `config`."""
        settings = _Settings(values, where)
        expected = self.values(config)
        settings.defaults = {**expected, "feature_size": 80, "hop_length": 160, "chunk_length": 30}
        # The last three are not the extractor's to choose.
        for name in list(expected)[:-3]:
            settings.expect(name, [expected[name]], f"{part} has {expected[name]}")
        return {}

    def values(self, config: Any) -> dict[str, Any]:
        """The feature extractor of a WhisperConfig."""
        seconds = config.window_seconds
        return {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": config.num_mel_bins,
            "sampling_rate": SAMPLE_RATE_HZ,
            "hop_length": config.hop_samples,
            "chunk_length": int(seconds) if seconds == int(seconds) else seconds,
            "n_fft": FFT_SAMPLES,
            "padding_side": "right",
            "padding_value": 0.0,
            "dither": 0.0,
            "return_attention_mask": False,
            "n_samples": config.window_samples,
            "nb_max_frames": 2 * config.window_frames,
        }


def unchosen(fields: Mapping[str, Any], part: str, chosen: Collection[str]) -> dict[str, Any]:
    """What a file says, without the fields that the user set, such as `images.encoder.fit`.

    A `fit` of the user's own goes without the file's `resize_side`, which belongs to another one.
    """
    kept = {name: value for name, value in fields.items() if f"{part}.{name}" not in chosen}
    if f"{part}.fit" in chosen:
        kept.pop("resize_side", None)
    return kept


class _Settings:
    """The values of a preprocessor_config.json, checked as they are read."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self.defaults: Mapping[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The file's value; null is not given, and the default holds."""
        value = self.values.get(name)
        return self.defaults.get(name) if value is None else value

    def refuse(self, name: str, but: str) -> NoReturn:
        """ValueError that names the field, its value and what it meets."""
        raise ValueError(f"{self.where}: {name} is {_short(self[name])}, but {but}; {REMEDY}")

    def expect(self, name: str, allowed: Iterable[Any], but: str = "") -> Any:
        """The value, one of `allowed`; True is not 1 here."""
        value, allowed = self[name], list(allowed)
        for item in allowed:
            if value == item and isinstance(value, bool) == isinstance(item, bool):
                return item
        self.refuse(name, but or f"{' or '.join(map(str, allowed))} is needed")

    def number(self, name: str) -> float:
        """A finite number."""
        return self.numbers(name, 1)[0]

    def numbers(self, name: str, count: int = 3) -> tuple[float, ...]:
        """`count` finite numbers; one may stand for all."""
        value = self[name]
        items = value if isinstance(value, list) else [value] * count
        if len(items) != count or not all(_is_number(item) for item in items):
            self.refuse(
                name, f"{count} finite numbers are needed" if count > 1 else "it is no number"
            )
        return tuple(map(float, items))

    def size(self, name: str, is_square: bool) -> tuple[bool, int]:
        """Whether it is the shortest edge's, and the side; a size that is not square is refused."""
        value = self[name]
        if isinstance(value, list) and len(value) == 2:
            value = {"height": value[0], "width": value[1]}
        elif not isinstance(value, dict):
            value = {"height": value, "width": value} if is_square else {"shortest_edge": value}
        lengths = {key: side for key, side in value.items() if side is not None}
        sides = set(lengths.values()) if all(map(_is_side, lengths.values())) else set()
        if len(sides) != 1 or set(lengths) not in ({"height", "width"}, {"shortest_edge"}):
            self.refuse(name, "a shortest_edge, or equal height and width, is needed")
        return "shortest_edge" in lengths, sides.pop()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIDE


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


@dataclass(frozen=True)
class Family:
    """One kind of Hugging Face model and its weight mappings, which serve both directions.

    `sections` maps a config.json's model type to where this family's part of it lies ("" for all
    of it). `roots` are the prefixes its tensors may have, told apart by the tensor `anchor`, and
    `spellings` replace names that versions of transformers write differently. `required` are the
    config values this package computes with; `fields` are those that must equal our config's.
    `unused` names their tensors that have no place here; `fixed` makes those that are computed
    here instead of trained. `config` writes a config.json, for a family that transformers can load.
    `describes` says whether a config of ours can be of this family at all. `preprocessor` reads its
    preprocessor_config.json.
    """

    name: str
    sections: dict[str, str]
    roots: tuple[str, ...]
    anchor: str
    required: dict[str, Any]
    fields: Callable[[Any], dict[str, Any]]
    num_layers: Callable[[Any], int]
    mappings: Callable[[Any, Any], list[WeightMapping]]
    unused: tuple[str, ...] = ()
    config: Callable[[Any], Any] | None = None
    describes: Callable[[Any], bool] = lambda config: True
    spellings: tuple[tuple[str, str], ...] = ()
    fixed: Callable[[Any], dict[str, torch.Tensor]] = lambda config: {}
    preprocessor: Preprocessor | None = None


def families_for(config: Any) -> list[Family]:
    """The families whose weights the config of an encoder, projector or language model takes."""
    if config.hf_families is None:
        return []
    module, _, name = config.hf_families.partition(":")
    families = getattr(importlib.import_module(module), name)
    return [family for family in families if family.describes(config)]


def family_of(model_type: str, config: Any, where: str) -> Family:
    """The family a folder's `model_type` belongs to; ValueError when `config` takes no such."""
    families = families_for(config)
    if not families:
        raise ValueError(f"{where}: no weights of Hugging Face fit a {type(config).__name__}")
    for family in families:
        if model_type in family.sections:
            return family
    known = ", ".join(name for family in families for name in family.sections)
    raise ValueError(f"{where}: model type {model_type!r} is none of {known}")


def family_for_export(config: Any) -> Family | None:
    """The family to write `config` as when it came from no folder; None where there is none."""
    return next(iter(families_for(config)), None)
