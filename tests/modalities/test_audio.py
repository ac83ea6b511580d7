import io
import re
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile

from examples.mimo.modalities.audio import AUDIO_SUFFIXES
from examples.mimo.modalities.files import BLOCK_SAMPLES, Blob, read_audio
from tests.helpers.videos import write_video

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


@pytest.mark.parametrize(
    ("factor", "subtype", "message"),
    [
        (1e18, "FLOAT", "up to 1e+18, but full scale is 1; divide them"),
        (3e38, "FLOAT", "up to 3e+38, but full scale is 1; divide them"),
        (32_768, "FLOAT", "up to 32,768, but full scale is 1; divide them"),
        (1e300, "DOUBLE", "NaN or infinite samples"),
    ],
)
def test_samples_far_beyond_full_scale(tmp_path, factor, subtype, message):
    """Their spectrum would overflow."""
    samples = np.where(np.arange(RATE) % 2, -1.0, 0.5) * factor
    with pytest.raises(ValueError, match=rf"a\.wav: .*{re.escape(message)}"):
        read(write(tmp_path / "a.wav", samples, subtype=subtype))


def test_samples_at_full_scale_are_read(tmp_path):
    samples = np.tile(np.array([32_767, -32_768], np.int16), RATE // 2)
    result = read(write(tmp_path / "a.wav", samples, subtype="PCM_16"))
    assert (result.min(), result.max()) == (-1.0, pytest.approx(32_767 / 32_768))
    loud = read(write(tmp_path / "b.wav", 8 * tone(0.5), subtype="FLOAT"))
    assert loud.max() == pytest.approx(4, abs=0.1)


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


SOUND = np.concatenate([0.2 * tone(1.0), np.random.default_rng(0).uniform(-0.5, 0.5, RATE)])


def encoded(kind, subtype=None, samples=SOUND, rate=RATE, endian=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype, endian=endian)
    return file.getvalue()


def changed(data, offset, value):
    return data[:offset] + value + data[offset + len(value) :]


def decoded(data, seconds=30.0, truncate=False):
    return read_audio(Blob("a", bytes(data)), RATE, seconds, truncate)


def with_size(data, chunk, size, form=">I", outer=False):
    """`size` as the length of `chunk`, and of the whole."""
    data = changed(data, data.rindex(chunk) + 4, struct.pack(form, size))
    return changed(data, 4, struct.pack(form, size)) if outer else data


def with_flac_total(data, total):
    bits = int.from_bytes(data[18:26]) >> 36 << 36 | total
    return changed(data, 18, bits.to_bytes(8))


def with_large_wav_size(data, size):
    return changed(data, data.index(b"ds64") + 16, struct.pack("<Q", size))


def with_other_lengths():
    """Format, and a file of it whose header says another length than there is."""
    for subtype in ("PCM_16", "FLOAT", "IMA_ADPCM"):
        for size in (0, 1_000, 2_000_000_000, 2**32 - 1):
            for outer in (False, True):
                data = with_size(encoded("WAV", subtype), b"data", size, "<I", outer)
                yield ("WAV", subtype), data
    yield ("WAV",), with_size(encoded("WAV", endian="BIG"), b"data", 0)
    for size in (0, 1_000, 2**64 - 1):
        yield ("RF64",), with_large_wav_size(encoded("RF64"), size)
    yield ("RF64",), b"BW64" + encoded("RF64")[4:]
    for size in (0, 8, 1_000, 2**32 - 1):
        yield ("AIFF",), with_size(encoded("AIFF"), b"SSND", size)
    for size in (0, 1_000, 2**32 - 1):
        yield ("AU",), changed(encoded("AU", endian="BIG"), 8, struct.pack(">I", size))
        yield ("AU",), changed(encoded("AU", endian="LITTLE"), 8, struct.pack("<I", size))
    for size in (0, -1, 1_000, 2**40):
        yield ("CAF",), with_size(encoded("CAF"), b"data", size, ">q")
        yield ("W64",), changed(encoded("W64"), 16, struct.pack("<q", size))
    for total in (0, 1_000, 10**6, 2**36 - 1):
        yield ("FLAC",), with_flac_total(encoded("FLAC"), total)


def test_the_length_is_what_can_be_decoded():
    number = 0
    for number, (kind, data) in enumerate(with_other_lengths()):
        whole = decoded(encoded(*kind))
        assert len(SOUND) <= len(whole) < len(SOUND) + 1_000
        assert np.array_equal(decoded(data), whole), (number, kind)
    assert number > 40


def test_chunks_behind_the_sound_are_no_sound():
    notes = b"LIST" + struct.pack("<I", 12) + b"INFOISFT" + bytes(4)
    wav = encoded("WAV")
    for tail in (notes, b"\0" * 300, b"x"):
        assert len(decoded(wav + tail)) == len(SOUND)
    for tail in (b"", notes):
        with pytest.raises(ValueError, match="no samples"):
            decoded(encoded("WAV", samples=SOUND[:0]) + tail)
    tagged = encoded("FLAC") + b"TAG" + bytes(125)
    assert len(decoded(tagged)) == len(SOUND)


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("WAV", None), ("AIFF", None)],
)
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_joined_recordings_follow_one_another(kind, subtype, rate):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, rate)
    first = encoded(kind, subtype, noise, rate)
    second = encoded(kind, subtype, noise[: rate // 2, None].repeat(2, 1), rate)
    tag = b"ID3\3\0\0" + bytes([0, 4, 0, 0]) + bytes(2**16) if kind == "MP3" else b""
    joined = decoded(tag + first + tag + second)
    apart = [decoded(first), decoded(second)]
    assert [len(part) for part in apart] == [RATE, RATE // 2]
    assert np.array_equal(joined, np.concatenate(apart))
    with pytest.raises(ValueError, match=r"more than 1.2 seconds of sound, but 1.2 fit"):
        decoded(first + second, 1.2)
    cut = decoded(first + second, 1.2, truncate=True)
    assert len(cut) == round(1.2 * RATE)
    # The filter of another rate reaches a little beyond its samples.
    assert np.allclose(cut[: round(1.19 * RATE)], joined[: round(1.19 * RATE)], atol=1e-5)


@pytest.mark.parametrize("rate", [44_100, 48_000, 32_000, 22_050, 16_000, 11_025, 8_000])
def test_an_mp3_is_as_long_as_its_frames(rate):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (2 * rate, 2))
    sound[:rate] *= 0.01  # the bit rate varies, so that a first frame says nothing of the length
    data = encoded("MP3", samples=sound, rate=rate)
    assert len(decoded(data, 2.0)) == 2 * RATE
    tag = max(data.find(b"Xing"), data.find(b"Info"))
    frames = int.from_bytes(data[tag + 8 : tag + 12])
    # Without its tag, the encoder's padding of some 2,400 samples is sound.
    for change in (
        changed(data, tag, b"none"),
        changed(data, tag + 7, b"\0"),
        *(changed(data, tag + 8, count.to_bytes(4)) for count in (0, 3, 2 * frames, 2**32 - 1)),
    ):
        length = len(decoded(change)) * rate / RATE
        assert 2 * rate <= length < 2 * rate + 3_000
        assert len(decoded(change, 0.5, truncate=True)) == RATE // 2


def test_damage_is_what_the_decoder_reports():
    """Or a format that counts its bytes; other files that end early hold what they hold."""
    for kind, subtype in (("FLAC", None), ("MP3", None)):
        data = encoded(kind, subtype)
        for broken in (data[: len(data) // 2], changed(data, len(data) // 2, bytes(3_000))):
            with pytest.raises(ValueError, match=r"^a: damaged audio.* [\d,]+ samples can be read"):
                decoded(broken)
            # The sound that is asked for is whole.
            assert len(decoded(broken, 0.25, truncate=True)) == RATE // 4
    # Of FLAC all that can be read is counted, not whole blocks alone.
    data = encoded("FLAC")
    with pytest.raises(ValueError, match="damaged audio") as error:
        decoded(data[: len(data) // 2])
    count = int(re.search(r"only ([\d,]+) samples", str(error.value))[1].replace(",", ""))
    assert count % BLOCK_SAMPLES > 0
    assert len(decoded(encoded("WAV")[:20_044])) == 10_000
    for kind in (
        ("WAV",),
        ("FLAC",),
        ("AIFF",),
        ("CAF",),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3",),
    ):
        data = encoded(*kind)
        for length in (4, 13, 40):
            with pytest.raises(ValueError, match=r"^a: (?!.*pipe)"):
                decoded(data[:length])


def test_memory_is_bounded_by_what_fits():
    lies = with_flac_total(encoded("FLAC"), 2**36 - 1)
    many = encoded("WAV", samples=SOUND[:1]) * 3_000
    decoded(lies)
    for data in (with_size(encoded("WAV"), b"data", 2**32 - 1, "<I"), lies, many):
        tracemalloc.start()
        assert len(decoded(data, 1.0, truncate=True)) <= RATE
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4_000_000


def in_container(kind, codec, seconds=2, layout="stereo"):
    av = pytest.importorskip("av")
    file, rate = io.BytesIO(), 48_000
    sound = np.stack([0.5 * np.sin(np.arange(rate * seconds) / 17), np.zeros(rate * seconds)])
    sound = sound.astype(np.float32)[: 2 if layout == "stereo" else 1]
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = layout
        for start in range(0, sound.shape[1], 960):
            part = np.ascontiguousarray(sound[:, start : start + 960])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


CONTAINERS = [
    *(("ipod", "aac"), ("mp4", "aac"), ("adts", "aac")),
    *(("webm", "libopus"), ("matroska", "flac"), ("mov", "pcm_s16le")),
]


@pytest.mark.parametrize(("kind", "codec"), CONTAINERS)
@pytest.mark.parametrize(("layout", "loudest"), [("mono", 0.5), ("stereo", 0.25)])
def test_what_phones_and_browsers_record(kind, codec, layout, loudest):
    data = in_container(kind, codec, layout=layout)
    read = decoded(data)
    assert read.dtype == np.float32
    assert abs(len(read) - 2 * RATE) < 0.03 * RATE  # bare AAC says nothing of its padding
    middle = read[RATE // 2 : -RATE // 2]
    assert np.abs(middle).max() == pytest.approx(loudest, rel=0.05)
    loudest_hz = np.abs(np.fft.rfft(middle)).argmax() * RATE / len(middle)
    assert loudest_hz == pytest.approx(48_000 / 17 / 2 / np.pi, abs=2)
    assert len(decoded(data, 0.5, truncate=True)) == RATE // 2
    with pytest.raises(ValueError, match=r"seconds of sound, but 0.5 fit"):
        decoded(data, 0.5)


def test_containers_are_refused_in_one_line(tmp_path, monkeypatch):
    data = in_container("ipod", "aac")
    silent = write_video(tmp_path / "a.mp4", frames=5, rate=5).read_bytes()
    for content, message in (
        (data[: len(data) // 2], "not sound that can be read"),
        (data[:20] + bytes(500), "not sound that can be read"),
        (silent, "no sound in this file"),
        (b"\0\0\0\x18ftyp" + b"#EXTM3U\n/etc/passwd\n", "not sound that can be read"),
    ):
        with pytest.raises(ValueError, match=rf"^a: {message}"):
            decoded(content)
    files = [in_container(*container) for container in CONTAINERS]
    monkeypatch.setitem(sys.modules, "av", None)
    for data in files:
        with pytest.raises(
            ValueError, match=r"^a: sound in MP4, WebM and AAC needs PyAV: pip inst"
        ):
            decoded(data)
    assert {".m4a", ".aac", ".webm", ".mp4"} < set(AUDIO_SUFFIXES)
