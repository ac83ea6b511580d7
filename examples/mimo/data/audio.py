"""Sound from files nobody has checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

# A window's worth is read, so a long file costs no memory; the rate is bounded to bound that.
MAX_SAMPLE_RATE_HZ = 768_000


def read_audio(
    path: Path, sample_rate_hz: int, window_seconds: float, truncate: bool = False
) -> np.ndarray:
    """(samples,) float32 mono at `sample_rate_hz`; channels averaged.

    Reads whatever libsndfile reads. Raises ValueError, one line, when the file is missing,
    empty, damaged, not sound, holds no samples or NaN, or lasts longer than `window_seconds`
    and `truncate` is off.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such audio file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the audio file is empty")
    try:
        with soundfile.SoundFile(path) as sound:
            _check_header(sound, path, window_seconds, truncate)
            rate = sound.samplerate
            wanted = min(sound.frames, int(np.ceil(window_seconds * rate)))
            samples = sound.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path}: not sound that libsndfile can read ({error})") from None
    if len(samples) < wanted:
        raise ValueError(
            f"{path}: damaged audio, {len(samples):,} of {wanted:,} samples can be read"
        )
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: the recording holds NaN or infinite samples")
    if rate != sample_rate_hz:
        samples = resample(torch.from_numpy(samples), rate, sample_rate_hz).numpy()
    return samples[: round(window_seconds * sample_rate_hz)]


def _check_header(
    sound: soundfile.SoundFile, path: Path, window_seconds: float, truncate: bool
) -> None:
    if sound.frames <= 0:
        raise ValueError(f"{path}: the recording has no samples")
    if sound.samplerate > MAX_SAMPLE_RATE_HZ:
        raise ValueError(f"{path}: {sound.samplerate:,} Hz is not a rate of sound recordings")
    seconds = sound.frames / sound.samplerate
    if seconds > window_seconds and not truncate:
        raise ValueError(
            f"{path}: {seconds:.2f} seconds of sound, but {window_seconds:g} fit; cut the file, "
            "or pass --audio-overflow truncate"
        )
