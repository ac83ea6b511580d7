"""Speech from text with the eSpeak NG library, which the `espeakng-loader` package carries."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch
from torchaudio.functional import resample

# From eSpeak NG's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2
RATE_PARAMETER, PITCH_PARAMETER = 1, 3
CHARACTERS_UTF8 = 1
SILENCE_AMPLITUDE = 0.01
BREATH_SEED = 0

_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Synthesiser:
    """Says text as samples at `sample_rate_hz`; one per process, for the library has one state.

    The same calls in the same order give the same samples in every process. One call alone does
    not: breath and flutter go on from where the last call left them.
    """

    def __init__(self, sample_rate_hz: int = 16_000) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise ValueError(
                "speech needs the espeakng-loader package: pip install 'mimo-examples[demo]'"
            ) from None
        self.sample_rate_hz = sample_rate_hz
        self.data = Path(espeakng_loader.get_data_path())
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._own_rate_hz = self._library.espeak_Initialize(
            AUDIO_OUTPUT_SYNCHRONOUS, 0, str(self.data).encode(), 0
        )
        if self._own_rate_hz <= 0:
            raise ValueError(f"eSpeak NG does not start with the data in {self.data}")
        # The library draws breath noise from a generator that it seeds with the time of day.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(BREATH_SEED))
        self._chunks: list[np.ndarray] = []
        # The library keeps a bare pointer to the callback, so it must outlive every call.
        self._callback = _CALLBACK(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)

    def variants(self) -> list[str]:
        """The names of the voice variants: timbres of man, woman, child, robot and others."""
        return sorted(file.name for file in (self.data / "voices" / "!v").iterdir())

    def say(
        self,
        text: str,
        variant: str,
        accent: str = "en",
        words_per_minute: int = 175,
        pitch: int = 50,
    ) -> np.ndarray:
        """(samples,) float32 within -1..1, without silence around; `pitch` is 0 to 99."""
        voice = f"{accent}+{variant}"
        # The library takes an unknown variant for none at all.
        known = (self.data / "voices" / "!v" / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {voice}")
        self._library.espeak_SetParameter(RATE_PARAMETER, words_per_minute, 0)
        self._library.espeak_SetParameter(PITCH_PARAMETER, pitch, 0)
        self._chunks = []
        words = text.encode() + b"\0"
        self._library.espeak_Synth(words, len(words), 0, 1, 0, CHARACTERS_UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate([np.zeros(0, np.float32), *self._chunks]) / np.float32(32768)
        sound = torch.from_numpy(_trim(samples))
        return resample(sound, self._own_rate_hz, self.sample_rate_hz).numpy()

    def _collect(self, samples: ctypes._Pointer, count: int, events: int | None) -> int:
        if samples and count > 0:
            chunk = np.ctypeslib.as_array(samples, shape=(count,))
            self._chunks.append(chunk.astype(np.float32))
        return 0


def _trim(samples: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(samples) > SILENCE_AMPLITUDE)
    if not len(loud):
        raise ValueError("eSpeak NG said nothing")
    return samples[loud[0] : loud[-1] + 1]
