"""The ear: Whisper's audio encoder (arXiv:2212.04356) from Megatron-Core blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.nn import functional
from torchaudio.transforms import MelSpectrogram

from examples.mimo.data.audio import read_audio
from examples.mimo.models.encoder_config import encoder_transformer_config
from examples.mimo.models.flops import Flops, encoder_layer_flops
from examples.mimo.models.layer_specs import block_submodules

SAMPLE_RATE_HZ = 16_000
FFT_SAMPLES = 400


@dataclass(frozen=True)
class WhisperConfig:
    """A Whisper encoder over a window of `clip_seconds` of mono sound at 16 kHz.

    A mel frame every `hop_samples`; the second convolution halves them; `frames_per_token`
    neighbours then become one token. Sound shorter than the window is padded with silence, as
    Whisper was trained, and only the frames that hold sound become tokens.
    `overflow` says what to do with more sound than fits: `error` or `truncate`.
    `augment_noise` bounds the noise's amplitude and `augment_shift_seconds` the silence put
    before the sound in training.
    """

    num_mel_bins: int
    hop_samples: int
    clip_seconds: float
    num_layers: int
    width: int
    num_heads: int
    ffn_hidden_size: int
    frames_per_token: int = 1
    overflow: str = "error"
    augment_noise: float = 0.0
    augment_shift_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.window_samples % (2 * self.hop_samples):
            raise ValueError(
                f"clip_seconds {self.clip_seconds} is {self.window_samples} samples, which must "
                f"be a multiple of two hops ({2 * self.hop_samples})"
            )
        if self.overflow not in ("error", "truncate"):
            raise ValueError(f"overflow is {self.overflow!r}; choose 'error' or 'truncate'")

    @property
    def hidden_size(self) -> int:
        """The width of a token's features: its frames' side by side."""
        return self.width * self.frames_per_token

    @property
    def window_samples(self) -> int:
        """Samples in the window."""
        return round(self.clip_seconds * SAMPLE_RATE_HZ)

    @property
    def window_frames(self) -> int:
        """Encoder frames in the window, after the convolution that halves them."""
        return self.window_samples // self.hop_samples // 2

    @property
    def max_tokens(self) -> int:
        """The tokens of a full window."""
        return math.ceil(self.window_frames / self.frames_per_token)

    def read(self, path: Path) -> np.ndarray:
        """(samples,) float32 mono at 16 kHz, at most the window."""
        return read_audio(
            path,
            sample_rate_hz=SAMPLE_RATE_HZ,
            window_seconds=self.clip_seconds,
            truncate=self.overflow == "truncate",
        )

    def augment(self, raw: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Silence before, up to the window's end, and white noise over all of it."""
        free_seconds = (self.window_samples - len(raw)) / SAMPLE_RATE_HZ
        shift = generator.uniform(0, max(0.0, min(self.augment_shift_seconds, free_seconds)))
        silence = np.zeros(int(shift * SAMPLE_RATE_HZ), np.float32)
        sound = np.concatenate([silence, raw * np.float32(generator.uniform(0.5, 1.2))])
        noise = generator.standard_normal(len(sound), np.float32)
        return sound + np.float32(generator.uniform(0, self.augment_noise)) * noise

    def blank(self, raw: np.ndarray) -> np.ndarray:
        """Silence of the same length."""
        return np.zeros_like(raw)

    def preprocess(self, raw: np.ndarray) -> dict[str, torch.Tensor]:
        """`input_features` (M, F) of the whole window, and `num_frames` () that hold sound."""
        frames = min(self.window_frames, math.ceil(len(raw) / self.hop_samples / 2))
        window = np.zeros(self.window_samples, np.float32)
        window[: len(raw)] = raw[: self.window_samples]
        return {
            "input_features": log_mel(
                torch.from_numpy(window), self.num_mel_bins, self.hop_samples
            ),
            "num_frames": torch.tensor(frames),
        }

    def num_tokens(self, inputs: dict[str, torch.Tensor]) -> int:
        """ceil(samples / hop / 2) frames, `frames_per_token` of them a token."""
        return math.ceil(int(inputs["num_frames"]) / self.frames_per_token)

    def mock_inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise of the shape `preprocess` makes, of a random length."""
        size = (self.num_mel_bins, 2 * self.window_frames)
        frames = torch.randint(1, self.window_frames + 1, (), generator=generator)
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


def log_mel(sound: torch.Tensor, num_mel_bins: int, hop_samples: int) -> torch.Tensor:
    """(samples,) -> (M, samples / hop), as Whisper's feature extractor computes it.

    log10 of the mel power, at most 8 below the loudest, scaled by (x + 4) / 4.
    """
    mel = _mel_transform(num_mel_bins, hop_samples)(sound)[:, :-1]
    loud = mel.clamp(min=1e-10).log10()
    return (torch.maximum(loud, loud.max() - 8.0) + 4.0) / 4.0


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
        """(N, M, 2F), (N,) -> (tokens, width * frames_per_token); media order kept.

        Of each item's F frames the first `num_frames`, rounded up to whole tokens, are kept.
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
