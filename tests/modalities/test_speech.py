"""Speech as codes of learned centroids: what comes back, at once or in pieces; what is refused."""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import save_file
from torchaudio.transforms import GriffinLim, InverseMelScale

from demos.digits.speech import Synthesiser
from examples.mimo.modalities.codebook import k_means, nearest
from examples.mimo.modalities.files import Blob
from examples.mimo.modalities.speech import VectorQuantisedMel
from tests.helpers.commands import ROOT

RATE = 16_000
PATCH = 768  # samples: 48 ms
OFFSETS = [*range(-700, -9, 10), *range(10, 701, 10)]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEXTS = [
    "eleven, twelve, thirteen, fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty",
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "How many people could see the old ship from the shore this morning?",
    "She sells sea shells, and he would rather judge a vision of azure joy.",
]
HELD_OUT = ["seven plus four is eleven", "The answer is six.", "nine and two and eight"]


@pytest.fixture(scope="module")
def speech():
    """A minute of one voice, and sentences that are not in it."""
    synthesiser = Synthesiser()
    sums = [f"{a} {word} {b}" for a in DIGITS for b in DIGITS[::3] for word in ("plus", "and")]
    texts = [f"The answer is {digit}." for digit in DIGITS[:6] + DIGITS[7:]] + sums[:60] + TEXTS
    learned = [synthesiser.say(text, "m3") for text in texts]
    return learned, [synthesiser.say(text, "m3") for text in HELD_OUT]


@pytest.fixture(scope="module")
def codec(speech, tmp_path_factory):
    codec = VectorQuantisedMel(folder=str(tmp_path_factory.mktemp("codec")))
    codec.learn(speech[0])
    return codec


@pytest.fixture
def small(tmp_path):
    return VectorQuantisedMel(num_codes=8, folder=str(tmp_path / "small"))


def distance_db(codec, sound, other):
    """Root mean square of the difference of log-mel power, each relative to its own level.

    What is 40 dB below the level is taken for silence."""
    (patches, level), (others, other_level) = codec.patches(sound), codec.patches(other)
    difference = np.maximum(patches - level, -4) - np.maximum(others - other_level, -4)
    return 10 * np.sqrt(np.square(difference).mean())


def level_db(sound):
    return 10 * np.log10(np.square(sound).mean())


def test_unheard_sentences_come_back_alike(codec, speech):
    for sound in speech[1]:
        codes = codec.encode(sound)
        assert len(codes) == -(-len(sound) // PATCH)
        assert len(set(codes)) > len(codes) / 2
        decoded = codec.decode(codes)
        assert decoded.dtype == np.float32
        assert len(decoded) == len(codes) * PATCH
        padded = np.pad(sound, (0, len(decoded) - len(sound)))
        assert distance_db(codec, padded, decoded) < 6
        assert abs(level_db(padded) - level_db(decoded)) < 2.5
        # Of other codes, and of the same in another order, all of this would be false.
        assert distance_db(codec, padded, codec.decode(codes[::-1])) > 12
        assert distance_db(codec, padded, codec.decode([(c + 1) % 512 for c in codes])) > 12


def test_sound_has_the_spectrum_of_its_centroids_better_than_of_torchaudio(codec, speech):
    """The same centroids through torchaudio's inverse of the mel scale and its Griffin-Lim."""
    inverse = InverseMelScale(513, 64, RATE, norm="slaney", mel_scale="slaney")
    griffin_lim = GriffinLim(1024, n_iter=32, hop_length=256, rand_init=False)
    book = codec.codebook()
    for sound in speech[1]:
        codes = codec.encode(sound)
        expected = book.centroids[codes]
        mel = torch.from_numpy(10 ** (expected + book.level)).float().view(-1, 64).T
        distances = []
        for decoded in (codec.decode(codes), griffin_lim(inverse(mel)).numpy()):
            patches, _ = codec.patches(np.resize(decoded, len(codes) * PATCH))
            difference = np.maximum(patches - book.level, -4) - np.maximum(expected, -4)
            distances.append(10 * np.sqrt(np.square(difference).mean()))
        assert distances[0] < 3.5
        assert distances[0] < 0.8 * distances[1]


def test_every_sound_is_coded_at_one_level(codec, speech):
    sound = speech[1][0]
    codes = codec.encode(sound)
    for factor in (0.05, 0.3, 3.0, 100.0):
        same = np.mean(np.equal(codec.encode(factor * sound), codes))
        assert same > 0.9, factor
    # What is 60 dB quieter is not brought up with its noise.
    quiet = codec.decode(codec.encode(0.001 * sound))
    assert level_db(quiet) < level_db(codec.decode(codes)) - 8


def test_silence_is_silence(codec, speech):
    silence = np.zeros(RATE, np.float32)
    codes = codec.encode(silence)
    assert codes == [0] * 21
    assert np.abs(codec.decode(codes)).max() < 0.005
    sound = np.concatenate([speech[1][0], silence, speech[1][1]])
    middle = len(speech[1][0]) + np.arange(2 * PATCH, RATE - 2 * PATCH)
    assert np.abs(codec.decode(codec.encode(sound))[middle]).max() < 0.005


@pytest.mark.parametrize(("samples", "codes"), [(0, 1), (1, 1), (768, 1), (769, 2)])
def test_a_sound_is_one_patch_at_least(codec, samples, codes):
    assert len(codec.encode(np.full(samples, 0.1, np.float32))) == codes


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 9, 10, 21])
def test_joined_pieces_are_the_whole(codec, count):
    codes = list(np.random.default_rng(count).integers(0, 512, count))
    pieces = list(codec.decode_pieces(iter(codes)))
    assert np.array_equal(np.concatenate(pieces), codec.decode(codes))
    assert max(map(len, pieces)) <= 5 * PATCH


def test_pieces_come_before_the_last_code(codec, speech):
    taken = []
    codes = codec.encode(np.concatenate(speech[1]))
    pieces = codec.decode_pieces(code for code in codes if not taken.append(code))
    assert len(next(pieces)) == 4 * PATCH
    assert len(taken) == 5
    assert len(next(pieces)) == 4 * PATCH
    assert len(taken) == 9


def test_there_are_no_clicks_where_pieces_meet(codec, speech):
    """A click is a bend from sample to sample that the sound around it has no more of."""
    codes = codec.encode(np.concatenate([*speech[1], *speech[0][:10]]))

    def roughness(sound):
        bends = np.abs(np.diff(sound, 2))
        joins = range(4 * PATCH, len(sound) - PATCH, 4 * PATCH)
        assert len(joins) > 50
        at = [bends[join - 3 : join + 2].max() for join in joins]
        around = [bends[join + d - 3 : join + d + 2].max() for join in joins for d in OFFSETS]
        return np.mean(at) / np.mean(around)

    apart = [codec.decode(codes[start : start + 4]) for start in range(0, len(codes), 4)]
    assert roughness(codec.decode(codes)) < 1.6
    assert roughness(np.concatenate(apart)) > 2.5


AGAIN = """
import hashlib, sys
import numpy as np
from examples.mimo.modalities.speech import VectorQuantisedMel
with np.load(sys.argv[1]) as file:
    sounds = [file[name] for name in file]
codec = VectorQuantisedMel(num_codes=64, folder=sys.argv[2])
codec.learn(sounds[:20])
codes = codec.encode(sounds[-1])
print(codes)
print(hashlib.sha256(codec.decode(codes).tobytes()).hexdigest())
"""


def test_processes_and_numbers_of_threads_agree(speech, tmp_path):
    np.savez(tmp_path / "sounds.npz", *speech[0][:20], *speech[1])
    said, books = [], []
    for threads in ("1", "2"):
        folder = tmp_path / threads
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        done = subprocess.run(
            [sys.executable, "-c", AGAIN, str(tmp_path / "sounds.npz"), str(folder)],
            cwd=ROOT,
            env={**os.environ, **dict.fromkeys(names, threads)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        books.append(hashlib.sha256((folder / "centroids.safetensors").read_bytes()).digest())
    assert said[0] == said[1]
    assert books[0] == books[1]


def test_no_random_number_of_others_is_drawn(codec, speech, small):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    small.learn(speech[0][:3])
    codec.decode(codec.encode(speech[1][0]))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_seeds_differ_and_a_codebook_learned_again_is_read(small, speech):
    small.learn(speech[0][:5])
    first = small.codebook().centroids
    small.learn(speech[0][:5], seed=1)
    assert not np.array_equal(small.codebook().centroids, first)
    assert sorted(os.listdir(small.folder)) == ["centroids.safetensors"]


def test_k_means_finds_the_centres_of_clusters():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(20, 6)) * 10
    labels = generator.integers(0, 20, 3000)
    vectors = (centres[labels] + generator.normal(size=(3000, 6)) * 0.1).astype(np.float32)
    centroids = k_means(vectors, 20)
    places = nearest(centres, centroids)
    assert sorted(places) == list(range(20))
    assert np.abs(centroids[places] - centres).max() < 0.05
    assert np.array_equal(nearest(vectors, centroids), places[labels])


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".au"])
def test_what_is_saved_is_read(codec, speech, tmp_path, suffix):
    path = tmp_path / f"answer{suffix}"
    codec.save(speech[1][0], path)
    read = codec.read(path)
    assert abs(len(read) - len(speech[1][0])) <= 1
    assert distance_db(codec, speech[1][0], read) < (12 if suffix in (".mp3", ".opus") else 4)
    if suffix not in (".ogg", ".opus"):  # libsndfile gives each a random number
        assert codec.encode_bytes(speech[1][0], suffix[1:]) == path.read_bytes()
    assert codec.mime_type(suffix[1:]).startswith("audio/")


def test_loud_samples_are_clipped(codec, tmp_path):
    codec.save(np.array([3.0, -3.0, 0.5], np.float32), tmp_path / "a.wav")
    samples, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == RATE
    assert np.allclose(samples, [1, -1, 0.5], atol=1e-3)


def test_the_page_s_example_runs(speech, tmp_path):
    page = (ROOT / "docs/outputs.md").read_text()
    block = next(code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "learn" in code)
    (tmp_path / "speech").mkdir()
    for number, sound in enumerate(speech[0]):
        name = "hello" if number == 0 else f"{number}"
        soundfile.write(tmp_path / f"speech/{name}.flac", sound, RATE)
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert soundfile.info(tmp_path / "hello-again.wav").frames == -(-len(speech[0][0]) // 768) * 768


def error_of(call, *arguments):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        call(*arguments)
    return str(error.value)


def test_sound_that_cannot_be_written(codec, speech, tmp_path):
    sound = speech[1][0]
    for name in ("answer.m4a", "answer.txt", "answer"):
        message = error_of(codec.save, sound, tmp_path / name)
        assert message.startswith(f"{tmp_path / name}: sound cannot be written as ")
        assert message.endswith("choose one of wav, flac, ogg, opus, mp3, aiff, au")
        assert not (tmp_path / name).exists()
    missing = tmp_path / "no folder" / "answer.wav"
    assert error_of(codec.save, sound, missing).startswith(f"{missing}: cannot be written (No such")
    assert "Is a directory" in error_of(codec.save, sound, make_folder(tmp_path / "folder.wav"))
    odd = dataclasses.replace(codec, sample_rate_hz=11_111)
    assert "libsndfile writes no mp3 at 11,111 Hz" in error_of(odd.encode_bytes, sound, "mp3")


def make_folder(path):
    path.mkdir()
    return path


def test_codes_that_are_none(codec):
    assert error_of(codec.decode, []) == "0 codes, but an output is whole units of 1"
    for codes in ([512], [3, -1], [1.5], ["1"]):
        assert "but 0 to 511 may stand there" in error_of(codec.decode, codes)
    assert "code 999" in error_of(list, codec.decode_pieces([1, 2, 999]))


def test_sound_that_is_none(codec, tmp_path):
    assert "NaN" in error_of(codec.encode, np.array([0.0, np.nan], np.float32))
    assert "no such audio file" in error_of(codec.read, tmp_path / "none.wav")
    assert "not sound" in error_of(codec.read, Blob("note.wav", b"This is text."))
    soundfile.write(tmp_path / "long.wav", np.zeros(31 * RATE), RATE)
    advice = "cut the file, or raise the codec's max_seconds"
    message = error_of(codec.read, tmp_path / "long.wav")
    assert message.endswith(f"31.00 seconds of sound, but 30 fit; {advice}")


def test_too_little_to_learn_from(small, speech):
    assert "nothing to learn" in error_of(small.learn, [])
    assert "nothing to learn" in error_of(small.learn, [np.zeros(RATE, np.float32)])
    short = speech[0][0][: 4 * PATCH]
    assert "4 different patches are too few for 7 centroids" in error_of(small.learn, [short])
    tone = np.sin(np.arange(PATCH * 40) * 2 * np.pi / 16).astype(np.float32)
    assert "different patches are too few for 511" in error_of(
        dataclasses.replace(small, num_codes=512).learn, [tone]
    )
    assert not os.path.exists(small.folder)


def test_bins_that_a_frame_cannot_tell_apart(tmp_path):
    crowded = VectorQuantisedMel(num_mel_bins=512, folder=str(tmp_path))
    assert "num_mel_bins 512 are more" in error_of(crowded.patches, np.zeros(RATE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centroids": np.zeros((8, 191), np.float32)}, "'centroids' F32 8 x 191"),
        ({"centroids": np.zeros((7, 192), np.float32)}, "'centroids' F32 7 x 192"),
        ({"centroids": np.zeros((8, 192), np.float16)}, "'centroids' F16 8 x 192"),
        ({"centroids": np.zeros((8, 192), np.int32)}, "'centroids' I32 8 x 192"),
        ({"centroids": np.full((8, 192), np.nan, np.float32)}, "NaN"),
        ({"centroids": np.full((8, 192), 1e9, np.float32)}, "values beyond 20"),
        ({"level": np.full(1, np.inf, np.float32)}, "values beyond 20"),
        ({"level": np.zeros(2, np.float32)}, "'level' F32 2"),
        ({"more\nlines": np.zeros(2, np.float32)}, r"'more\nlines' F32 2"),
        ({"centroids": np.zeros((1000, 192), np.float32)}, "bytes, but 8 centroids of 192 values"),
    ],
)
def test_codebooks_of_another_shape_or_value_are_refused(small, change, message):
    tensors = {"centroids": np.zeros((8, 192), np.float32), "level": np.zeros(1, np.float32)}
    os.mkdir(small.folder)
    path = os.path.join(small.folder, "centroids.safetensors")
    save_file(tensors, path)
    assert small.codebook().centroids.shape == (8, 192)
    save_file(tensors | change, path)
    for call, argument in ((small.decode, [0]), (small.encode, np.zeros(PATCH))):
        error = error_of(call, argument)
        assert error.startswith(f"{path}: ")
        assert message in error


def test_codebooks_that_are_missing_or_damaged_are_refused(small):
    path = os.path.join(small.folder, "centroids.safetensors")
    assert error_of(small.decode, [0]) == f"{path}: no such codebook; learn one first"
    os.mkdir(small.folder)
    for content in (b"", b"text", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"):
        with open(path, "wb") as file:
            file.write(content)
        assert error_of(small.decode, [0]).startswith(f"{path}: not a safetensors file (")
