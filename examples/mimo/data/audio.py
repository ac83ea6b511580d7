"""Sound from files nobody has checked."""

from __future__ import annotations

import io
import math

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from examples.mimo.data.sources import Source, open_source

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
            "raise the encoder's max_windows, or pass --audio-overflow truncate"
        )


def to_wav(samples: np.ndarray, sample_rate_hz: int) -> bytes:
    """The content of a WAV file of 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate_hz, format="WAV", subtype="PCM_16")
    return file.getvalue()
