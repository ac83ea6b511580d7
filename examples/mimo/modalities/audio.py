"""Sound from files nobody has checked.

The ear: Whisper's audio encoder (arXiv:2212.04356) from Megatron-Core blocks.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import soundfile
import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.nn import functional
from torchaudio.functional import resample
from torchaudio.transforms import MelSpectrogram

from examples.mimo.modalities.base import Source, open_source
from examples.mimo.model.encoder import encoder_transformer_config
from examples.mimo.model.layers import block_submodules
from examples.mimo.planner.flops import Flops, encoder_layer_flops

# What fits is read, so a long file costs no memory; the rate and the samples of all channels a
# second are bounded to bound that, and the numbers of the filter that changes the rate: 44,100 to
# 16,000 Hz takes 441 times 160.
MAX_SAMPLE_RATE_HZ = 768_000
MAX_SAMPLES_A_SECOND = 2 * MAX_SAMPLE_RATE_HZ
MAX_KERNEL = 10_000_000
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".au")


def read_audio(
    source: Source, sample_rate_hz: int, max_seconds: float, truncate: bool = False
) -> np.ndarray:
    """(samples,) float32 mono at `sample_rate_hz`; channels averaged.

    Reads whatever libsndfile reads. Raises ValueError, one line, when the file is missing,
    empty, damaged, not sound, holds no samples or NaN, or lasts longer than `max_seconds`
    and `truncate` is off.
    """
    try:
        with open_source(source, "audio") as stream, soundfile.SoundFile(stream) as sound:
            _check_header(sound, source, sample_rate_hz, max_seconds, truncate)
            rate = sound.samplerate
            wanted = min(sound.frames, int(np.ceil(max_seconds * rate)))
            samples = sound.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
    except soundfile.SoundFileError as error:
        # The whole text names the open file as an object.
        reason = getattr(error, "error_string", error)
        raise ValueError(f"{source}: not sound that libsndfile can read ({reason})") from None
    if len(samples) < wanted:
        raise ValueError(
            f"{source}: damaged audio, {len(samples):,} of {wanted:,} samples can be read"
        )
    if not np.isfinite(samples).all():
        raise ValueError(f"{source}: the recording holds NaN or infinite samples")
    if rate != sample_rate_hz:
        samples = resample(torch.from_numpy(samples), rate, sample_rate_hz).numpy()
    return samples[: round(max_seconds * sample_rate_hz)]


def _check_header(
    sound: soundfile.SoundFile,
    source: Source,
    sample_rate_hz: int,
    max_seconds: float,
    truncate: bool,
) -> None:
    if sound.frames <= 0:
        raise ValueError(f"{source}: the recording has no samples")
    if sound.samplerate > MAX_SAMPLE_RATE_HZ:
        raise ValueError(f"{source}: {sound.samplerate:,} Hz is not a rate of sound recordings")
    if sound.samplerate * sound.channels > MAX_SAMPLES_A_SECOND:
        raise ValueError(
            f"{source}: {sound.channels} channels of {sound.samplerate:,} Hz; mix them down"
        )
    common = math.gcd(sound.samplerate, sample_rate_hz)
    if sound.samplerate // common * (sample_rate_hz // common) > MAX_KERNEL:
        raise ValueError(
            f"{source}: {sound.samplerate:,} Hz and {sample_rate_hz:,} Hz have no useful "
            "divisor in common; resample the file"
        )
    seconds = sound.frames / sound.samplerate
    if seconds > max_seconds and not truncate:
        raise ValueError(
            f"{source}: {seconds:.2f} seconds of sound, but {max_seconds:g} fit; cut the file, "
            "raise the encoder's max_windows, or set its overflow to truncate"
        )


def to_wav(samples: np.ndarray, sample_rate_hz: int) -> bytes:
    """The content of a WAV file of 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate_hz, format="WAV", subtype="PCM_16")
    return file.getvalue()


SAMPLE_RATE_HZ = 16_000
FFT_SAMPLES = 400


@dataclass(frozen=True)
class WhisperConfig:
    """A Whisper encoder over a window of `window_seconds` of mono sound at 16 kHz.

    A mel frame every `hop_samples`; the second convolution halves them; `frames_per_token`
    neighbours then become one token. Sound shorter than the window is padded with silence, as
    Whisper was trained, and only the frames that hold sound become tokens. Longer sound is cut
    into at most `max_windows` windows, whose tokens follow one another.
    `overflow` says what to do with more sound than fits them: `error` or `truncate`.
    `augment_noise` bounds the noise's amplitude and `augment_shift_seconds` the silence put
    before the sound in training.
    """

    num_mel_bins: int
    hop_samples: int
    window_seconds: float
    num_layers: int
    width: int
    num_heads: int
    ffn_hidden_size: int
    frames_per_token: int = 1
    max_windows: int = field(default=1, metadata={"shapes_weights": False})
    overflow: str = field(default="error", metadata={"shapes_weights": False})
    augment_noise: float = field(default=0.0, metadata={"shapes_weights": False})
    augment_shift_seconds: float = field(default=0.0, metadata={"shapes_weights": False})

    def __post_init__(self) -> None:
        if self.window_samples % (2 * self.hop_samples):
            raise ValueError(
                f"window_seconds {self.window_seconds} is {self.window_samples} samples, "
                f"which must be a multiple of two hops ({2 * self.hop_samples})"
            )
        if self.max_windows < 1:
            raise ValueError(f"max_windows {self.max_windows}: at least one")
        if self.overflow not in ("error", "truncate"):
            raise ValueError(f"overflow is {self.overflow!r}; choose 'error' or 'truncate'")

    @property
    def max_inputs(self) -> int:
        """Windows."""
        return self.max_windows

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Names that recordings have; their content decides."""
        return AUDIO_SUFFIXES

    @property
    def hidden_size(self) -> int:
        """The width of a token's features: its frames' side by side."""
        return self.width * self.frames_per_token

    @property
    def window_samples(self) -> int:
        """Samples in the window."""
        return round(self.window_seconds * SAMPLE_RATE_HZ)

    @property
    def max_samples(self) -> int:
        """Samples in all windows together."""
        return self.max_windows * self.window_samples

    @property
    def window_frames(self) -> int:
        """Encoder frames in the window, after the convolution that halves them."""
        return self.window_samples // self.hop_samples // 2

    @property
    def max_tokens(self) -> int:
        """The tokens of a full window."""
        return math.ceil(self.window_frames / self.frames_per_token)

    def read(self, source: Source) -> np.ndarray:
        """(samples,) float32 mono at 16 kHz, at most what fits."""
        return read_audio(
            source,
            sample_rate_hz=SAMPLE_RATE_HZ,
            max_seconds=self.window_seconds * self.max_windows,
            truncate=self.overflow == "truncate",
        )

    def augment(self, raw: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Silence before, as far as there is room, and white noise over all of it."""
        free_seconds = (self.max_samples - len(raw)) / SAMPLE_RATE_HZ
        shift = generator.uniform(0, max(0.0, min(self.augment_shift_seconds, free_seconds)))
        silence = np.zeros(int(shift * SAMPLE_RATE_HZ), np.float32)
        sound = np.concatenate([silence, raw * np.float32(generator.uniform(0.5, 1.2))])
        noise = generator.standard_normal(len(sound), np.float32)
        return sound + np.float32(generator.uniform(0, self.augment_noise)) * noise

    def describe(self, raw: np.ndarray) -> str:
        """Its length in whole seconds."""
        return f"{math.ceil(len(raw) / SAMPLE_RATE_HZ)} s"

    def preview(self, raw: np.ndarray) -> list[tuple[str, bytes]]:
        """A WAV of the sound at the rate that the encoder hears."""
        return [("audio/wav", to_wav(raw[: self.max_samples], SAMPLE_RATE_HZ))]

    def blank(self, raw: np.ndarray) -> np.ndarray:
        """Silence of the same length."""
        return np.zeros_like(raw)

    def preprocess(self, raw: np.ndarray) -> dict[str, torch.Tensor]:
        """`input_features` (W, M, F) of W whole windows, `num_frames` (W,) that hold sound."""
        sound = torch.from_numpy(raw[: self.max_samples].astype(np.float32, copy=False))
        windows = sound.split(self.window_samples)
        features = [self._features(window) for window in windows]
        frames = [math.ceil(len(window) / self.hop_samples / 2) for window in windows]
        return {"input_features": torch.stack(features), "num_frames": torch.tensor(frames)}

    def _features(self, sound: torch.Tensor) -> torch.Tensor:
        """(samples,) -> (M, 2F): a window; behind the sound it is silent."""
        frames = 2 * self.window_frames
        # The transform reaches half of its length beyond the sound; all later frames are alike.
        heard = min(frames, math.ceil((len(sound) + FFT_SAMPLES) / self.hop_samples))
        padded = functional.pad(sound, (0, heard * self.hop_samples - len(sound)))
        features, silence = log_mel(padded, self.num_mel_bins, self.hop_samples)
        return functional.pad(features, (0, frames - heard), value=silence)

    def num_tokens(self, inputs: dict[str, torch.Tensor]) -> int:
        """Of each window ceil(samples / hop / 2) frames, `frames_per_token` of them a token."""
        return sum(math.ceil(n / self.frames_per_token) for n in inputs["num_frames"].tolist())

    def mock_inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise of the shape `preprocess` makes of one window, of a random length."""
        size = (1, self.num_mel_bins, 2 * self.window_frames)
        frames = torch.randint(1, self.window_frames + 1, (1,), generator=generator)
        return {"input_features": torch.randn(size, generator=generator), "num_frames": frames}

    def flops(self) -> Flops:
        """One window through both convolutions and the layers; shorter sound costs the same."""
        frames, width = self.window_frames, self.width
        convolutions = 2 * frames * 3 * (2 * self.num_mel_bins * width + width**2)
        layer = encoder_layer_flops(frames, width, self.ffn_hidden_size)
        return Flops(convolutions) + layer * self.num_layers

    def spec(self, language: TransformerConfig, pg_collection: Any) -> ModuleSpec:
        """`WhisperEncoder` as a module spec."""
        return ModuleSpec(
            module=WhisperEncoder,
            params={"whisper": self, "language": language, "pg_collection": pg_collection},
        )


@lru_cache
def _mel_transform(num_mel_bins: int, hop_samples: int) -> MelSpectrogram:
    return MelSpectrogram(
        sample_rate=SAMPLE_RATE_HZ,
        n_fft=FFT_SAMPLES,
        hop_length=hop_samples,
        n_mels=num_mel_bins,
        f_max=SAMPLE_RATE_HZ / 2,
        norm="slaney",
        mel_scale="slaney",
    )


def log_mel(sound: torch.Tensor, num_mel_bins: int, hop_samples: int) -> tuple[torch.Tensor, float]:
    """(samples,) -> (M, samples / hop), as Whisper's feature extractor computes it, and silence's.

    log10 of the mel power, at most 8 below the loudest, scaled by (x + 4) / 4.
    """
    mel = _mel_transform(num_mel_bins, hop_samples)(sound)[:, :-1]
    loud = mel.clamp_(min=1e-10).log10_()
    floor = max(float(loud.max()) - 8.0, -10.0)
    return loud.clamp_(min=floor).add_(4.0).div_(4.0), (floor + 4.0) / 4.0


class WhisperEncoder(MegatronModule):
    """Two convolutions, fixed sinusoidal positions, transformer layers, a final norm."""

    def __init__(
        self, whisper: WhisperConfig, language: TransformerConfig, pg_collection: Any
    ) -> None:
        config = encoder_transformer_config(
            language,
            num_layers=whisper.num_layers,
            hidden_size=whisper.width,
            num_attention_heads=whisper.num_heads,
            ffn_hidden_size=whisper.ffn_hidden_size,
            activation_func=functional.gelu,
        )
        super().__init__(config=config)
        self.frames_per_token = whisper.frames_per_token
        width = whisper.width
        self.conv1 = torch.nn.Conv1d(whisper.num_mel_bins, width, kernel_size=3, padding=1)
        self.conv2 = torch.nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        positions = sinusoids(whisper.window_frames, width)
        self.register_buffer("positions", positions, persistent=False)
        self.decoder = TransformerBlock(
            config=config,
            spec=block_submodules(
                config.transformer_impl, AttnMaskType.no_mask, whisper.num_layers
            ),
            pre_process=True,
            post_process=True,
            pg_collection=pg_collection,
        )

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        """For the schedules; an encoder is always a whole stage."""
        self.decoder.set_input_tensor(input_tensor)

    def forward(self, input_features: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
        """(N, M, 2F), (N,) -> (tokens, width * frames_per_token); the windows' order kept.

        Of each window's F frames the first `num_frames`, rounded up to whole tokens, are kept.
        """
        features = input_features.to(self.conv1.weight.dtype)
        hidden = functional.gelu(self.conv1(features))
        hidden = functional.gelu(self.conv2(hidden)).transpose(1, 2)
        hidden = hidden + self.positions.to(hidden.dtype)
        hidden = self.decoder(hidden.transpose(0, 1).contiguous(), attention_mask=None)
        tokens = self._join_frames(hidden.transpose(0, 1))
        counts = torch.ceil(num_frames / self.frames_per_token)
        kept = torch.arange(tokens.shape[1], device=counts.device)[None, :] < counts[:, None]
        return tokens[kept]

    def _join_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """(N, F, H) -> (N, ceil(F / k), k * H), the last token filled up with zeros."""
        missing = -frames.shape[1] % self.frames_per_token
        frames = functional.pad(frames, (0, 0, 0, missing))
        return frames.unflatten(1, (-1, self.frames_per_token)).flatten(2)


def sinusoids(length: int, width: int) -> torch.Tensor:
    """(length, width): sines, then cosines, of wavelengths from 2 pi to 10,000 * 2 pi."""
    step = torch.log(torch.tensor(10_000.0)) / (width // 2 - 1)
    scaled = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(width // 2))[None, :]
    return torch.cat([scaled.sin(), scaled.cos()], dim=1)
