"""Speech as codes: patches of log-mel frames, each the nearest of a few hundred learned centroids.

A centroid is the sound of a patch, 48 ms by default: 21 codes a second. `learn` finds centroids by
k-means in seconds. The way back is Griffin-Lim (Griffin and Lim, 1984), from piece to piece: the
phases of a piece go on from the samples before it, so that joined pieces have no seams, and a sound
that is streamed is, bit for bit, the sound that is decoded at once.

All arithmetic is in double precision, and no random number is drawn while coding: the same sound
gives the same codes, and the same codes the same sound, with any number of threads.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import soundfile
import torch
from torch.nn import functional

from examples.mimo.modalities.audio import AUDIO_SUFFIXES
from examples.mimo.modalities.base import CodecConfig, free_field
from examples.mimo.modalities.codebook import Codebook, k_means, nearest, read_codebook, sample
from examples.mimo.modalities.files import MAX_SAMPLE_RATE_HZ, Source, read_audio
from examples.mimo.modalities.values import bounds

# Format and subtype of libsndfile.
WRITABLE = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".aiff": ("AIFF", "PCM_16"),
    ".au": ("AU", "PCM_16"),
}

# log10 of power. In a patch, what is 60 dB below the speech is silence. Speech that is more than
# 40 dB below what the centroids were learned from stays quieter, and nothing is learned from sounds
# below about -100 dB of full scale.
FLOOR, MAX_GAIN, SILENCE = -6.0, 4.0, -8.0
SMALLEST = 1e-20
# Of phase recovery: steps for each piece, and frames decoded at once, looked at before them and
# after them. A window is four hops long, so it reaches two frames to either side.
STEPS, MOMENTUM = 32, 0.99
PIECE_FRAMES, PAST_FRAMES, FUTURE_FRAMES = 12, 6, 3
# Centroids are learned from 16 patches each, and from so many where they are few.
MIN_PATCHES = 16_384


@dataclass(frozen=True)
class SoundCodec(CodecConfig):
    """What codecs of sound share: files. An item is (samples,) float32 mono at `sample_rate_hz`.

    A modality that has an encoder too gives the codec what the encoder reads, at its sample rate.
    """

    sample_rate_hz: int = field(default=16_000, metadata=bounds(1_000, MAX_SAMPLE_RATE_HZ))
    max_seconds: float = free_field(30.0, bounds=(0.01, 3600))

    suffixes: ClassVar[tuple[str, ...]] = AUDIO_SUFFIXES

    def read(self, source: Source) -> np.ndarray:
        """(samples,) float32 mono at `sample_rate_hz`, at most `max_seconds` of it."""
        return read_audio(
            source,
            self.sample_rate_hz,
            self.max_seconds,
            cut="cut the file, or raise the codec's max_seconds",
        )

    def save(self, raw: np.ndarray, path: Path) -> None:
        """Write WAV, FLAC, OGG, Opus, MP3, AIFF or AU, as the name says; 16 bits where PCM."""
        try:
            data = self.encode_bytes(raw, path.suffix.removeprefix("."))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        try:
            path.write_bytes(data)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from None

    def encode_bytes(self, raw: np.ndarray, format: str) -> bytes:
        """A file of a format such as wav; what is louder than full scale is clipped."""
        kind, subtype = WRITABLE.get(f".{format.lower()}", ("", ""))
        if kind not in soundfile.available_formats():
            known = ", ".join(suffix[1:] for suffix in WRITABLE)
            raise ValueError(f"sound cannot be written as {format!r}; choose one of {known}")
        file, samples = io.BytesIO(), np.clip(raw, -1, 1)
        try:
            soundfile.write(file, samples, self.sample_rate_hz, format=kind, subtype=subtype)
        except soundfile.SoundFileError as error:
            reason = getattr(error, "error_string", str(error))
            raise ValueError(
                f"libsndfile writes no {format} at {self.sample_rate_hz:,} Hz ({reason})"
            ) from None
        return file.getvalue()


@dataclass(frozen=True)
class VectorQuantisedMel(SoundCodec):
    """`frames_per_patch` frames of `num_mel_bins` are a patch, and the nearest centroid its code.

    A frame every `hop_samples`, of four hops. Every sound is brought to one level, that of the
    sounds which the centroids were learned from, and is decoded at that level.
    """

    num_codes: int = field(default=512, metadata=bounds(2, 65_536))
    num_mel_bins: int = field(default=64, metadata=bounds(1, 512))
    hop_samples: int = field(default=256, metadata=bounds(16, 8_192))
    frames_per_patch: int = field(default=3, metadata=bounds(1, 64))

    files: ClassVar[tuple[str, ...]] = ("centroids.safetensors",)
    origin: ClassVar[str] = "VectorQuantisedMel.learn makes it from sounds"

    @property
    def patch_samples(self) -> int:
        """The samples of a patch."""
        return self.frames_per_patch * self.hop_samples

    @property
    def patch_size(self) -> int:
        """The numbers in a patch, and in a centroid."""
        return self.frames_per_patch * self.num_mel_bins

    # Sound to codes.

    def encode(self, raw: np.ndarray) -> list[int]:
        """A code for each patch; silence fills up the last one, and a sound of no samples."""
        codebook = self.codebook()
        patches, level = self.patches(raw)
        level = max(level, codebook.level - MAX_GAIN)
        return nearest(np.maximum(patches - level, FLOOR), codebook.centroids).tolist()

    def patches(self, raw: np.ndarray) -> tuple[np.ndarray, float]:
        """(samples,) -> (P, patch_size) log10 of mel power, and that of the sound's loud frames.

        Loud are the frames less than 20 dB below the loudest: how long pauses are does not count.
        """
        if not np.isfinite(raw).all():
            raise ValueError("the sound holds NaN or infinite samples")
        samples = torch.from_numpy(np.asarray(raw, np.float64))
        missing = max(self.patch_samples - len(samples), -len(samples) % self.patch_samples)
        spectrum = self._spectrum(functional.pad(samples, (0, missing)))
        power = self._filters() @ spectrum.abs().square()
        frames = power.T.numpy()[: (len(samples) + missing) // self.hop_samples]
        loudness = frames.mean(axis=1)
        level = loudness[loudness >= loudness.max() / 100].mean()
        patches = np.log10(np.maximum(frames, SMALLEST)).reshape(-1, self.patch_size)
        return patches, math.log10(max(level, SMALLEST))

    def _filters(self) -> torch.Tensor:
        return _mel_filters(self.sample_rate_hz, self.num_mel_bins, self.hop_samples)

    def _spectrum(self, samples: torch.Tensor) -> torch.Tensor:
        """(samples,) -> (2 * hop + 1, samples / hop + 1), complex; silence lies around."""
        size = 4 * self.hop_samples
        return torch.stft(
            samples,
            size,
            self.hop_samples,
            window=torch.hann_window(size, dtype=torch.float64),
            pad_mode="constant",
            return_complex=True,
        )

    # Codes to sound.

    def decode(self, codes: Sequence[int]) -> np.ndarray:
        """(patches * patch_samples,) float32."""
        self.check_codes(codes)
        return np.concatenate(list(self.decode_pieces(codes)))

    def decode_pieces(self, codes: Iterable[int]) -> Iterator[np.ndarray]:
        """Pieces of twelve frames, three frames late; joined, they are what `decode` returns."""
        codebook = self.codebook()
        piece, past, future = (
            math.ceil(frames / self.frames_per_patch)
            for frames in (PIECE_FRAMES, PAST_FRAMES, FUTURE_FRAMES)
        )
        # The codes from `past` patches before the next piece on, and the sound of those decoded.
        window: list[int] = []
        samples = torch.zeros(0, dtype=torch.float64)
        for code in itertools.chain(codes, [None]):
            if code is not None:
                self.check_codes([code])
                window.append(code)
            decoded = len(samples) // self.patch_samples
            end = len(window) - (0 if code is None else future)
            if end - decoded < (1 if code is None else piece):
                continue
            log_power = codebook.centroids[window] + codebook.level
            sound = self._griffin_lim(self._magnitudes(log_power), samples)
            sound = sound[: end * self.patch_samples]
            yield sound[len(samples) :].numpy().astype(np.float32)
            window = window[max(0, end - past) :]
            samples = sound[max(0, end - past) * self.patch_samples :]

    def _magnitudes(self, log_power: np.ndarray) -> torch.Tensor:
        """(P, patch_size) log10 of mel power -> (2 * hop + 1, F), of a spectrum with those mels.

        Of the many there are, one without negative power, by the updates of Lee and Seung (2001).
        """
        filters = self._filters()
        mel = torch.from_numpy(10.0 ** log_power.reshape(-1, self.num_mel_bins)).T
        weights = filters.sum(dim=0)[:, None].clamp(min=1e-12)
        power = filters.T @ (mel / filters.sum(dim=1)[:, None]) / weights
        for _ in range(STEPS):
            power *= filters.T @ (mel / (filters @ power).clamp(min=1e-30)) / weights
        return power.sqrt()

    def _griffin_lim(self, magnitudes: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        """(2 * hop + 1, F) -> (F * hop,) samples, the first of which are `past`.

        Fast Griffin-Lim (Perraudin and others, 2013), as torchaudio's, with known samples put back
        in each step. Where nothing is known, it begins with phases of zero.
        """
        size, length = 4 * self.hop_samples, magnitudes.shape[1] * self.hop_samples
        window = torch.hann_window(size, dtype=torch.float64)
        samples = functional.pad(past, (0, length - len(past)))
        previous = torch.zeros(())
        for step in range(STEPS + 1):
            spectrum = self._spectrum(samples)[:, : magnitudes.shape[1]]
            direction = spectrum - MOMENTUM / (1 + MOMENTUM) * previous
            sizes = direction.abs()
            phases = torch.where(sizes > 1e-12, direction / sizes.clamp(min=1e-12), 1.0)
            samples = torch.istft(
                magnitudes * phases, size, self.hop_samples, window=window, length=length
            )
            samples[: len(past)] = past
            previous = spectrum if step else previous
        return samples

    # The codebook: centroids of log10 mel power over the level, and the level of what is decoded.

    def codebook(self) -> Codebook:
        """What `learn` wrote into `folder`."""
        return read_codebook(Path(self.folder, self.files[0]), (self.num_codes, self.patch_size))

    def learn(self, sounds: Iterable[np.ndarray], seed: int = 0) -> None:
        """Write the codebook of `sounds` into `folder`: k-means on a sample of their patches.

        Code 0 is silence, whether or not there is any in `sounds`.
        """
        levels: list[float] = []

        def normalised() -> Iterator[np.ndarray]:
            for sound in sounds:
                patches, level = self.patches(sound)
                if level > SILENCE:
                    levels.append(level)
                    yield np.maximum(patches - level, FLOOR).astype(np.float32)

        patches = sample(normalised(), max(MIN_PATCHES, 16 * self.num_codes), seed)
        silence = np.full((1, self.patch_size), FLOOR)
        centroids = np.concatenate([silence, k_means(patches, self.num_codes - 1, seed)])
        codebook = Codebook(centroids, float(np.median(levels)))
        codebook.write(Path(self.folder, self.files[0]))


@lru_cache
def _mel_filters(sample_rate_hz: int, num_mel_bins: int, hop_samples: int) -> torch.Tensor:
    """(M, 2 * hop + 1) float64: how much of each frequency's power a mel bin holds."""
    from torchaudio.functional import melscale_fbanks

    bins, top = 2 * hop_samples + 1, sample_rate_hz / 2
    filters = melscale_fbanks(bins, 0.0, top, num_mel_bins, sample_rate_hz, "slaney", "slaney")
    if not filters.any(dim=0).all():
        raise ValueError(
            f"num_mel_bins {num_mel_bins} are more than a frame of {4 * hop_samples} samples tells "
            "apart; take fewer, or more hop_samples"
        )
    return filters.T.double()
