"""Codes of a neural codec: a folder of transformers' Mimi, DAC or EnCodec, with pretrained weights.

Each frame of such a codec is one code of each of several codebooks. They follow one another, frame
by frame, and every codebook has a range of codes of its own. Sizes are part of the config, so that
a model is built without the folder, which must agree with them.

Of the folder, `config.json` and `model.safetensors` are read. The config is data: only sizes are
taken from it, the three classes are named here, and their code is that of transformers.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from examples.mimo.modalities.files import MAX_SAMPLE_RATE_HZ
from examples.mimo.modalities.speech import SoundCodec
from examples.mimo.modalities.values import bounds, shown

# What published configs have beside the fields of today's.
OLD_FIELDS = {"mimi": ("frame_rate", "rope_theta")}
# What codecs of mono sound, coded as a whole, have in common; the stereo EnCodec has none of the
# first five.
NEEDED: dict[str, Any] = {"audio_channels": 1, "normalize": False, "chunk_length_s": None}
NEEDED |= {"norm_type": "weight_norm", "use_causal_conv": True, "trim_right_ratio": 1.0}
# Layers take time to build before weights are looked for, and a ratio doubles their widths.
MAX_CONFIG_BYTES, MAX_NUMBER, MAX_LAYERS, MAX_ITEMS = 2**20, 2**20, 256, 12
# Decoded at once while codes come in.
PIECE_SECONDS = 0.24


@dataclass(frozen=True)
class HuggingFaceCodec(SoundCodec):
    """The first `num_codebooks` of a codec's codebooks, of `codebook_size` codes each.

    `sample_rate_hz` is that of items; sound is resampled where the codec works at another.
    """

    num_codebooks: int = field(metadata=bounds(1, 128), kw_only=True)
    codebook_size: int = field(metadata=bounds(2, 65_536), kw_only=True)

    files: ClassVar[tuple[str, ...]] = ("config.json", "model.safetensors")
    origin: ClassVar[str] = "copy it from the codec's folder of Hugging Face"

    @property
    def num_codes(self) -> int:
        """The codes of all codebooks."""
        return self.num_codebooks * self.codebook_size

    @property
    def unit(self) -> int:
        """The codes of a frame."""
        return self.num_codebooks

    def allowed(self, position: int) -> range:
        """The range of the codebook whose turn it is."""
        first = position % self.num_codebooks * self.codebook_size
        return range(first, first + self.codebook_size)

    def encode(self, raw: np.ndarray) -> list[int]:
        """The codes of each frame, codebook by codebook; silence fills up the last frame."""
        codec = self.load()
        samples = torch.from_numpy(np.asarray(raw, np.float32))[None, None]
        if not samples.numel():
            samples = torch.zeros(1, 1, 1)
        samples = resample(samples, self.sample_rate_hz, codec.sample_rate_hz)
        with torch.no_grad():
            codes = codec.encode(samples, self.num_codebooks)
        offsets = torch.arange(self.num_codebooks)[:, None] * self.codebook_size
        return (codes[0] + offsets).T.flatten().tolist()

    def decode(self, codes: Sequence[int]) -> np.ndarray:
        """(samples,) float32 at `sample_rate_hz`."""
        return self._decoder()(codes, True)

    def decode_pieces(self, codes: Iterable[int]) -> Iterator[np.ndarray]:
        """Pieces of a quarter of a second; joined, they are `decode`'s sound up to rounding."""
        size, decode = self.load().piece_frames * self.unit, self._decoder()
        piece: list[int] = []
        for code in itertools.chain(codes, [None]):
            # A piece waits for another code, so that the last one is known and not empty.
            if code is None or len(piece) == size:
                samples = decode(piece, code is None)
                if len(samples):
                    yield samples
                piece = []
            if code is not None:
                piece.append(code)

    def _decoder(self) -> Callable[[Sequence[int], bool], np.ndarray]:
        """A function of codes, and whether they are the last, that goes on where it ended."""
        codec = self.load()
        stages = codec.stages()
        if codec.sample_rate_hz != self.sample_rate_hz:
            stages.append(resampling(codec.sample_rate_hz, self.sample_rate_hz))

        def decode(codes: Sequence[int], is_last: bool) -> np.ndarray:
            self.check_codes(codes)
            frames = torch.tensor(codes).view(-1, self.num_codebooks).T % self.codebook_size
            with torch.no_grad():
                states = codec.latents(frames[None])
                for stage in stages:
                    states = stage(states, is_last)
            return states[0, 0].numpy()

        return decode

    def load(self) -> Codec:
        """The codec in `folder`, which agrees with this config; it stays in memory."""
        config, weights = (Path(self.folder, name) for name in self.files)
        for path in (config, weights):
            if not path.is_file():
                raise ValueError(f"{path}: no such file; {self.origin}")
        stats = [path.stat() for path in (config, weights)]
        changed = tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
        codec = _load(config, weights, changed)
        if codec.codebook_size != self.codebook_size:
            raise ValueError(
                f"{config}: codebooks of {codec.codebook_size} codes, but the model's config says "
                f"{self.codebook_size}; set its codebook_size"
            )
        if not codec.least_codebooks <= self.num_codebooks <= codec.most_codebooks:
            raise ValueError(
                f"{config}: {codec.least_codebooks} to {codec.most_codebooks} codebooks, but the "
                f"model's config says {self.num_codebooks}; set its num_codebooks"
            )
        return codec


Stage = Callable[[torch.Tensor, bool], torch.Tensor]


class Codec(ABC):
    """A model of transformers, and how it decodes in stages while codes come in.

    A stage takes (1, channels, new inputs), and whether they are the last, and returns what is new
    of its outputs: those that no later input changes.
    """

    least_codebooks = 1
    most_codebooks: int

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.sample_rate_hz: int = self.config.sampling_rate
        self.codebook_size: int = self.config.codebook_size

    @property
    def piece_frames(self) -> int:
        """Frames that are decoded at once while codes come in."""
        reach, hop_samples = _reach(self.model.decoder)
        frames = round(PIECE_SECONDS * self.sample_rate_hz / hop_samples)
        # The first frames that padding mirrors must come together.
        return max(1, frames, reach if getattr(self.config, "pad_mode", "") == "reflect" else 0)

    @abstractmethod
    def encode(self, samples: torch.Tensor, num_codebooks: int) -> torch.Tensor:
        """(1, 1, samples) -> (1, codebooks, frames)."""

    @abstractmethod
    def latents(self, codes: torch.Tensor) -> torch.Tensor:
        """(1, codebooks, frames) -> (1, channels, frames): what the first stage takes."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """From latents to (1, 1, samples)."""


class Mimi(Codec):
    """Causal convolutions around a causal transformer, whose keys and values are kept."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.least_codebooks = self.config.num_semantic_quantizers
        self.most_codebooks = self.config.num_quantizers

    def encode(self, samples: torch.Tensor, num_codebooks: int) -> torch.Tensor:
        return self.model.encode(samples, num_quantizers=num_codebooks).audio_codes

    def latents(self, codes: torch.Tensor) -> torch.Tensor:
        return self.model.quantizer.decode(codes)

    def stages(self) -> list[Stage]:
        from transformers import DynamicCache

        decoder, cache = self.model.decoder, DynamicCache(config=self.config)
        # In older transformers the first two are the model's own, and its decoder is the third.
        owner = decoder if hasattr(decoder, "upsample") else self.model
        last = getattr(decoder, "decoder_seanet", decoder)

        def attend(states: torch.Tensor, is_last: bool) -> torch.Tensor:
            output = owner.decoder_transformer(states.transpose(1, 2), past_key_values=cache)
            return output.last_hidden_state.transpose(1, 2)

        return [convolutions(owner.upsample), attend, convolutions(last)]


class Encodec(Codec):
    """Causal convolutions around an LSTM, whose state is kept."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.counts = {
            bandwidth: min(
                self.config.num_quantizers,
                model.quantizer.get_num_quantizers_for_bandwidth(bandwidth),
            )
            for bandwidth in self.config.target_bandwidths
        }
        self.most_codebooks = max(self.counts.values())

    def encode(self, samples: torch.Tensor, num_codebooks: int) -> torch.Tensor:
        # The fewest codebooks that are enough; a codebook does not depend on those after it.
        bandwidth = min(b for b, count in self.counts.items() if count >= num_codebooks)
        return self.model.encode(samples, bandwidth=bandwidth).audio_codes[0][:, :num_codebooks]

    def latents(self, codes: torch.Tensor) -> torch.Tensor:
        return self.model.quantizer.decode(codes.transpose(0, 1))

    def stages(self) -> list[Stage]:
        first, recurrent, *rest = self.model.decoder.layers
        memory = None

        def remember(states: torch.Tensor, is_last: bool) -> torch.Tensor:
            nonlocal memory
            inputs = states.permute(2, 0, 1)
            outputs, memory = recurrent.lstm(inputs, memory)
            return (outputs + inputs).permute(1, 2, 0)

        return [convolutions(first), remember, convolutions(nn.Sequential(*rest))]


class Dac(Codec):
    """Convolutions that look as far ahead as back."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.most_codebooks = self.config.n_codebooks

    def encode(self, samples: torch.Tensor, num_codebooks: int) -> torch.Tensor:
        # As transformers' feature extractor does; the convolutions would leave a rest out.
        samples = functional.pad(samples, (0, -samples.shape[-1] % self.config.hop_length))
        return self.model.encode(samples, n_quantizers=num_codebooks).audio_codes

    def latents(self, codes: torch.Tensor) -> torch.Tensor:
        return self.model.quantizer.from_codes(codes)[0]

    @property
    def piece_frames(self) -> int:
        """As many as are decoded again for what they border on."""
        return max(super().piece_frames, 2 * _reach(self.model.decoder, sides=2)[0])

    def stages(self) -> list[Stage]:
        return [convolutions(self.model.decoder, looks_ahead=True)]


@dataclass
class Window:
    """A stage for a module whose outputs depend on `past` inputs before them and `future` after.

    `num_in` inputs make `num_out` outputs; parts of the sequence begin at multiples of `num_in`.
    """

    module: Callable[[torch.Tensor], torch.Tensor]
    past: int
    future: int
    num_in: int
    num_out: int
    inputs: torch.Tensor | None = None
    done: int = 0  # of the inputs kept, those whose outputs have been returned

    def __call__(self, new: torch.Tensor, is_last: bool) -> torch.Tensor:
        inputs = new if self.inputs is None else torch.cat([self.inputs, new], dim=-1)
        size, step = inputs.shape[-1], self.num_in
        end = size if is_last else max(self.done, (size - self.future) // step * step)
        first = max(0, (end - self.past) // step * step)
        self.inputs = inputs[..., first:]
        begin, self.done = self.done, end - first
        if end == begin:
            return inputs[:, :1, :0]  # of one channel, as what waits for inputs to come is sound
        stop = None if is_last else end // step * self.num_out
        return self.module(inputs)[..., begin // step * self.num_out : stop]


def convolutions(stack: nn.Module, looks_ahead: bool = False) -> Window:
    """A stage of convolutions, which are causal unless they look as far ahead as back."""
    past, num_out = _reach(stack, sides=2 if looks_ahead else 1)
    return Window(stack, past, past if looks_ahead else 0, 1, num_out)


def _reach(stack: nn.Module, sides: int = 1) -> tuple[int, int]:
    """How many inputs an output looks back from its own at most, and outputs for an input."""
    reach, rate = 0.0, 1
    for layer in stack.modules():
        if isinstance(layer, nn.ConvTranspose1d):
            reach += (math.ceil(layer.kernel_size[0] / layer.stride[0]) - 1) / rate
            rate *= layer.stride[0]
        elif isinstance(layer, nn.Conv1d):
            reach += (layer.kernel_size[0] - 1) * layer.dilation[0] / rate / sides
    return math.ceil(reach) + 1, rate


def resample(samples: torch.Tensor, rate: int, target_hz: int) -> torch.Tensor:
    """(..., samples) at another rate; itself where the rates are equal."""
    from torchaudio.functional import resample

    return resample(samples, rate, target_hz)


def resampling(rate: int, target_hz: int) -> Window:
    """A stage that resamples."""
    common = math.gcd(rate, target_hz)
    num_in, num_out = rate // common, target_hz // common
    # Of torchaudio's filter: six zero crossings to either side, a little below the lower rate.
    reach = math.ceil(6 * num_in / (0.99 * min(num_in, num_out))) + num_in
    return Window(lambda x: resample(x, rate, target_hz), reach, reach, num_in, num_out)


CODECS: dict[str, type[Codec]] = {"mimi": Mimi, "dac": Dac, "encodec": Encodec}


@lru_cache(maxsize=4)
def _load(config_path: Path, weights_path: Path, changed: tuple[tuple[int, ...], ...]) -> Codec:
    """Checks sizes before anything is built; `changed` tells new files from those read before."""
    import transformers

    config = _read_config(config_path)
    codec_class = CODECS[config.model_type]
    model_class = getattr(transformers, f"{codec_class.__name__}Model")
    with _one_line_errors(config_path, f"no {config.model_type}"), torch.device("meta"):
        needed = sum(tensor.numel() for tensor in model_class(config).state_dict().values())
    state = _read_weights(weights_path, needed)
    with _one_line_errors(weights_path, f"not the weights of {config_path}"), _quiet():
        # From tensors and a config, so that nothing else in the folder is looked at.
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    lacking = sorted([*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])])
    if lacking:
        raise ValueError(
            f"{weights_path}: {len(lacking)} weights are missing or of another shape, "
            f"{lacking[0]} among them"
        )
    return codec_class(model.eval())


def _read_config(path: Path) -> Any:
    import transformers

    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, but a config is small")
    with _one_line_errors(path, "not JSON"):
        raw = json.loads(path.read_bytes())
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in CODECS:
        raise ValueError(f"{path}: model_type is {shown(kind)}; choose one of {', '.join(CODECS)}")
    config_class = getattr(transformers, f"{CODECS[kind].__name__}Config")
    # What shapes the model, and no name of code, of a quantiser, or of a file.
    general = inspect.signature(transformers.PreTrainedConfig).parameters
    known = {*inspect.signature(config_class).parameters, *OLD_FIELDS.get(kind, ())} - {*general}
    fields = {name: value for name, value in raw.items() if name in known}
    for name, value in fields.items():
        _check_size(path, name, value)
    with _one_line_errors(path, f"no config of {kind}"):
        config = config_class(**fields)
    if not 1_000 <= config.sampling_rate <= MAX_SAMPLE_RATE_HZ:
        raise ValueError(f"{path}: sampling_rate is {config.sampling_rate:,} Hz, not that of sound")
    with _one_line_errors(path, f"no config of {kind}"):
        count = config.n_codebooks if kind == "dac" else config.num_quantizers
    _check_size(path, "codebooks", count)
    for name, value in NEEDED.items():
        if getattr(config, name, value) != value:
            raise ValueError(
                f"{path}: {name} is {shown(getattr(config, name))}, but only {shown(value)} can be "
                "used: mono, causal or with a limited view, and without chunks of their own"
            )
    return config


def _check_size(path: Path, name: str, value: Any) -> None:
    """ValueError for a number, or a list, that no codec has."""
    items = value if isinstance(value, list) else [value]
    is_count = any(word in name for word in ("layers", "quantizers", "codebooks"))
    most = MAX_LAYERS if is_count else MAX_NUMBER
    numbers = [item for item in items if isinstance(item, int | float)]
    if len(items) > MAX_ITEMS or not all(0 <= number <= most for number in numbers):
        raise ValueError(f"{path}: {name} is {shown(value)}, which is no size of a codec")


def _read_weights(path: Path, needed: int) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, at least `needed` numbers of which none is NaN."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as file:
            sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
        if sum(sizes) < needed:
            raise ValueError(
                f"{path}: {sum(sizes):,} numbers, but a model of {path.parent / 'config.json'} has "
                f"{needed:,}"
            )
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {shown(name)} holds NaN or infinite values")
    return state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and its table of missing weights, which an error names."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _one_line_errors(path: Path, what: str) -> Iterator[None]:
    """Turns the errors of transformers, of many types and lines, into one that names a file."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path}: {what} ({reason})") from None
