"""Audio modality: log-mel features, and Whisper's encoder (arXiv:2212.04356)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional

from examples.mimo.modalities.base import EncoderConfig, first_tokens, free_field, sinusoids
from examples.mimo.modalities.files import Source, read_audio, to_wav
from examples.mimo.modalities.values import bounds

AUDIO_SUFFIXES: tuple[str, ...] = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".au")
AUDIO_SUFFIXES += (".m4a", ".aac", ".webm", ".mp4")  # with PyAV
SAMPLE_RATE_HZ = 16_000  # what Whisper was trained on
FFT_SAMPLES = 400  # 25 ms


@dataclass(frozen=True)
class WhisperConfig(EncoderConfig):
    """A Whisper encoder over a window of `window_seconds` of mono sound at 16 kHz.

    A mel frame every `hop_samples`; the second convolution halves them; `frames_per_token`
    neighbours then become one token. Sound shorter than the window is padded with silence, as
    Whisper was trained, and only the frames that hold sound become tokens. Longer sound is cut
    into at most `max_windows` windows, whose tokens follow one another.
    `overflow` says what to do with more sound than fits them: `error` or `truncate`.
    `augment_noise` bounds the noise's amplitude and `augment_shift_seconds` the silence put
    before the sound in training.
    """

    num_mel_bins: int = field(metadata=bounds(1, 512))
    hop_samples: int = field(metadata=bounds(1, SAMPLE_RATE_HZ))
    window_seconds: float = field(metadata=bounds(0.01, 600))
    frames_per_token: int = 1
    max_windows: int = free_field(1, bounds=(1, 10_000))
    overflow: str = free_field("error", choices=("error", "truncate"))
    augment_noise: float = free_field(0.0, bounds=(0, 1))
    augment_shift_seconds: float = free_field(0.0, bounds=(0, 600))

    suffixes: ClassVar[tuple[str, ...]] = AUDIO_SUFFIXES
    hf_families: ClassVar[str | None] = "examples.mimo.hf.families:WHISPER"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_samples % (2 * self.hop_samples):
            raise ValueError(
                f"window_seconds {self.window_seconds} is {self.window_samples} samples, "
                f"which must be a multiple of two hops ({2 * self.hop_samples})"
            )

    @property
    def window_samples(self) -> int:
        """The number of samples in a window."""
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

    @property
    def max_inputs(self) -> int:
        """The most windows of a recording."""
        return self.max_windows

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
        """The length in whole seconds."""
        return f"{math.ceil(len(raw) / SAMPLE_RATE_HZ)} s"

    def preview(self, raw: np.ndarray) -> list[tuple[str, bytes]]:
        """A WAV at the sample rate of the encoder."""
        return [("audio/wav", to_wav(raw[: self.max_samples], SAMPLE_RATE_HZ))]

    def preprocess(self, raw: np.ndarray) -> dict[str, torch.Tensor]:
        """`input_features` (N, M, 2F) of N windows, `num_frames` (N,) that hold sound."""
        sound = torch.from_numpy(raw[: self.max_samples].astype(np.float32, copy=False))
        windows = sound.split(self.window_samples)
        features = [self._features(window) for window in windows]
        frames = [math.ceil(len(window) / self.hop_samples / 2) for window in windows]
        return {"input_features": torch.stack(features), "num_frames": torch.tensor(frames)}

    def _features(self, sound: torch.Tensor) -> torch.Tensor:
        """(samples,) -> (M, 2F): a window; behind the sound it is silent."""
        frames = 2 * self.window_frames
        # The transform reaches half of its length beyond the sound; all later frames are alike.
        computed = min(frames, math.ceil((len(sound) + FFT_SAMPLES) / self.hop_samples))
        padded = functional.pad(sound, (0, computed * self.hop_samples - len(sound)))
        features, silence = log_mel(padded, self.num_mel_bins, self.hop_samples)
        return functional.pad(features, (0, frames - computed), value=silence)

    def num_tokens(self, inputs: dict[str, torch.Tensor]) -> int:
        """Of each window ceil(samples / hop / 2) frames, `frames_per_token` of them a token."""
        return sum(math.ceil(n / self.frames_per_token) for n in inputs["num_frames"].tolist())

    def mock_inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise of the shape `preprocess` makes of one window, of a random length."""
        size = (1, self.num_mel_bins, 2 * self.window_frames)
        frames = torch.randint(1, self.window_frames + 1, (1,), generator=generator)
        return {"input_features": torch.randn(size, generator=generator), "num_frames": frames}

    @property
    def output_size(self) -> int:
        """The features of a token's frames, side by side."""
        return self.hidden_size * self.frames_per_token

    @property
    def sequence_length(self) -> int:
        """The frames of a window, however short the sound in it."""
        return self.window_frames

    @property
    def stem_flops(self) -> int:
        """Both convolutions over one window; the first makes twice as many frames."""
        width = self.hidden_size
        return 2 * self.window_frames * 3 * (2 * self.num_mel_bins * width + width**2)

    def stem(self) -> torch.nn.Module:
        """Convolutions and sinusoids."""
        return MelEmbedding(self)

    def select(self, hidden: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """(N, F, H) -> (tokens, k * H): k frames side by side, the last token filled with zeros.

        Of each window the first `num_frames`, rounded up to whole tokens, are kept.
        """
        missing = -hidden.shape[1] % self.frames_per_token
        frames = functional.pad(hidden, (0, 0, 0, missing))
        tokens = frames.unflatten(1, (-1, self.frames_per_token)).flatten(2)
        return first_tokens(tokens, -(-inputs["num_frames"] // self.frames_per_token))


class MelEmbedding(torch.nn.Module):
    """Two convolutions over mel frames, the second of which halves them, and sinusoids."""

    positions: torch.Tensor

    def __init__(self, whisper: WhisperConfig) -> None:
        super().__init__()
        bins, width = whisper.num_mel_bins, whisper.hidden_size
        self.conv1 = torch.nn.Conv1d(bins, width, kernel_size=3, padding=1)
        self.conv2 = torch.nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        positions = sinusoids(whisper.window_frames, width)
        self.register_buffer("positions", positions, persistent=False)  # computed, not stored

    def forward(self, input_features: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
        """(N, M, 2F) -> (N, F, H); silence behind the sound is embedded too."""
        hidden = functional.gelu(self.conv1(input_features))
        hidden = functional.gelu(self.conv2(hidden)).transpose(1, 2)
        return hidden + self.positions.to(hidden.dtype)


@lru_cache
def _mel_transform(num_mel_bins: int, hop_samples: int) -> Callable[[torch.Tensor], torch.Tensor]:
    from torchaudio.transforms import MelSpectrogram

    return MelSpectrogram(
        sample_rate=SAMPLE_RATE_HZ,
        n_fft=FFT_SAMPLES,
        hop_length=hop_samples,
        n_mels=num_mel_bins,
        f_max=SAMPLE_RATE_HZ / 2,
        norm="slaney",  # the filters that Whisper was trained with
        mel_scale="slaney",
    )


def log_mel(sound: torch.Tensor, num_mel_bins: int, hop_samples: int) -> tuple[torch.Tensor, float]:
    """(samples,) -> (M, samples / hop) as of Whisper's feature extractor, and the value of silence.

    log10 of the mel power, at most 8 below the loudest, scaled by (x + 4) / 4.
    """
    mel = _mel_transform(num_mel_bins, hop_samples)(sound)[:, :-1]  # Whisper drops the last frame
    loud = mel.clamp_(min=1e-10).log10_()
    floor = max(float(loud.max()) - 8.0, -10.0)
    return loud.clamp_(min=floor).add_(4.0).div_(4.0), (floor + 4.0) / 4.0
