import numpy as np
import pytest
import soundfile

from examples.mimo.modalities.files import read_audio

RATE = 16_000


def write(path, samples, rate=RATE, **how):
    soundfile.write(path, samples, rate, **how)
    return path


def tone(seconds, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


def read(path, window_seconds=2.0, truncate=False):
    return read_audio(path, RATE, window_seconds, truncate)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_any_rate_becomes_sixteen_kilohertz(tmp_path, rate):
    samples = read(write(tmp_path / "a.wav", tone(1.0, rate), rate))
    assert abs(len(samples) - RATE) <= 1
    loudest = np.abs(np.fft.rfft(samples)).argmax() * RATE / len(samples)
    assert abs(loudest - 440) < 2


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT", "DOUBLE"])
def test_integer_and_float_samples_agree(tmp_path, subtype):
    samples = read(write(tmp_path / "a.wav", tone(0.5), subtype=subtype))
    assert np.abs(samples - tone(0.5)).max() < 0.01
    assert samples.dtype == np.float32


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([tone(0.5), np.zeros(RATE // 2)], axis=1)
    samples = read(write(tmp_path / "a.flac", stereo))
    assert np.abs(samples - tone(0.5) / 2).max() < 1e-3


def test_missing_empty_and_not_sound(tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("hello")
    for name, message in (("none", "no such"), ("empty", "is empty"), ("text", "not sound")):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / f"{name}.wav")


def test_no_samples(tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        read(write(tmp_path / "a.wav", np.zeros(0)))


def test_truncated_file(tmp_path):
    path = write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, RATE))
    path.write_bytes(path.read_bytes()[:8000])
    with pytest.raises(ValueError, match=r"a\.flac: (damaged|not sound)"):
        read(path)


def test_nan_samples(tmp_path):
    samples = tone(0.5).astype(np.float32)
    samples[7] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        read(write(tmp_path / "a.wav", samples, subtype="FLOAT"))


def test_longer_than_the_window_says_how_much_fits(tmp_path):
    path = write(tmp_path / "a.wav", tone(3.0))
    with pytest.raises(ValueError, match=r"3.00 seconds of sound, but 2 fit"):
        read(path)
    assert len(read(path, truncate=True)) == 2 * RATE


def test_many_channels_at_a_high_rate_are_refused(tmp_path):
    silence = np.zeros((100, 255), dtype=np.float32)
    file = write(tmp_path / "a.ogg", silence, 48_000, format="OGG", subtype="VORBIS")
    with pytest.raises(ValueError, match="255 channels of 48,000 Hz; mix them down"):
        read(file)
    with pytest.raises(ValueError, match="9 channels of 192,000 Hz"):
        read(write(tmp_path / "b.wav", silence[:, :9], 192_000))
    assert len(read(write(tmp_path / "c.wav", np.zeros((19_200, 8)), 192_000))) == 1_600


@pytest.mark.parametrize("rate", [44_101, 767_999])
def test_a_rate_without_a_common_divisor_is_refused(tmp_path, rate):
    """The filter between the two rates would take gigabytes."""
    with pytest.raises(ValueError, match="no useful divisor in common"):
        read(write(tmp_path / "a.wav", tone(0.1, rate), rate))
