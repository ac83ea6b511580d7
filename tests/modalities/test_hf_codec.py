"""Mimi, DAC and EnCodec as transformers has them: codes, sound, pieces of it; what is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchaudio.functional import resample
from transformers import DacFeatureExtractor

from examples.mimo.modalities.hf_codec import HuggingFaceCodec
from tests.helpers import neural_codecs
from tests.helpers.commands import ROOT
from tests.helpers.neural_codecs import KINDS, RATE, SIZE


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Kind -> (its folder, what transformers reads from it)."""
    codecs = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        model = neural_codecs.write(kind, folder)
        codecs[kind] = folder, type(model).from_pretrained(folder).eval()
    return codecs


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def codec_in(folder, num_codebooks=4, **changes):
    sizes = {"codebook_size": SIZE, "sample_rate_hz": RATE} | changes
    return HuggingFaceCodec(folder=str(folder), num_codebooks=num_codebooks, **sizes)


def noise(samples):
    return np.random.default_rng(samples).normal(0, 0.3, samples).astype(np.float32)


def flattened(codes):
    return (codes + torch.arange(len(codes))[:, None] * SIZE).T.flatten().tolist()


@pytest.mark.parametrize("num_codebooks", [2, 4])
@pytest.mark.parametrize("samples", [960, 1003, 37])
def test_codes_and_samples_are_those_of_transformers(written, kind, num_codebooks, samples):
    folder, model = written[kind]
    codec = codec_in(folder, num_codebooks)
    codes = neural_codecs.encode(kind, model, noise(samples), num_codebooks)
    assert codec.encode(noise(samples)) == flattened(codes)
    assert codes.shape[0] == num_codebooks
    assert samples < 100 or len(set(flattened(codes))) > 12  # random weights use some of the codes
    sound = codec.decode(flattened(codes))
    expected = neural_codecs.decode(kind, model, codes)
    assert sound.dtype == np.float32
    assert expected.std() > 0.01
    assert np.abs(sound - expected).max() < 1e-5


def random_codes(num_codebooks, frames):
    generator = np.random.default_rng(frames)
    return flattened(torch.from_numpy(generator.integers(0, SIZE, (num_codebooks, frames))))


@pytest.mark.parametrize("rate", [RATE, 1_000, 3_000])
@pytest.mark.parametrize("frames", [1, 5, 12, 13, 60])
def test_joined_pieces_are_the_whole(written, kind, frames, rate):
    codec = codec_in(written[kind][0], sample_rate_hz=rate)
    codes = random_codes(4, frames)
    whole = codec.decode(codes)
    joined = np.concatenate(list(codec.decode_pieces(iter(codes))))
    assert len(joined) == len(whole)
    assert np.abs(joined - whole).max() < 1e-5


# In frames: 0.24 s, or for DAC twice the 19 frames that it looks ahead.
FIRST = {"mimi": 12, "encodec": 14, "dac": 38}


def test_pieces_come_before_the_last_code(written, kind):
    codec = codec_in(written[kind][0])
    taken = []
    codes = random_codes(4, 200)
    pieces = codec.decode_pieces(code for code in codes if not taken.append(code))
    next(pieces)
    assert len(taken) == FIRST[kind] * 4 + 1
    assert len(list(pieces)) >= 5


def test_a_piece_costs_the_same_however_much_came_before(written, kind, monkeypatch):
    """What a stage keeps of the past has a limit."""
    codec = codec_in(written[kind][0])
    sizes = []
    conv1d = torch.nn.Conv1d.forward

    def watched(self, states):
        sizes.append(states.shape[-1])
        return conv1d(self, states)

    monkeypatch.setattr(torch.nn.Conv1d, "forward", watched)
    list(codec.decode_pieces(random_codes(4, 120)))
    largest = max(sizes)
    sizes.clear()
    list(codec.decode_pieces(random_codes(4, 600)))
    assert max(sizes) <= largest + 1


def test_codebooks_take_turns(written):
    codec = codec_in(written["mimi"][0], 3)
    assert (codec.num_codes, codec.unit) == (3 * SIZE, 3)
    ranges = [codec.allowed(position) for position in range(6)]
    assert ranges == [range(0, 64), range(64, 128), range(128, 192)] * 2
    for codes, message in (
        ([], "0 codes, but an output is whole units of 3"),
        ([0, 64], "2 codes, but an output is whole units of 3"),
        ([0, 64, 192], "code 192 at position 2, but 128 to 191 may stand there"),
        ([0, 3, 130], "code 3 at position 1, but 64 to 127 may stand there"),
    ):
        assert error_of(codec.decode, codes) == message
    assert error_of(list, codec.decode_pieces([0, 64, 128, 1])).startswith("4 codes, but")


def test_as_many_codebooks_as_the_config_says(written, kind):
    """Also where EnCodec has no bandwidth for so many; fewer are the first of more."""
    sound = noise(500)
    most = np.reshape(codec_in(written[kind][0], 4).encode(sound), (-1, 4))
    for count in (1, 3):
        fewer = np.reshape(codec_in(written[kind][0], count).encode(sound), (-1, count))
        assert np.array_equal(fewer, most[:, :count])


@pytest.mark.parametrize("rate", [1_000, 1_600])
def test_sound_of_another_rate_is_resampled(written, kind, rate):
    folder, model = written[kind]
    codec = codec_in(folder, sample_rate_hz=rate)
    sound = noise(1000)
    resampled = resample(torch.from_numpy(sound), rate, RATE).numpy()
    codes = neural_codecs.encode(kind, model, resampled, 4)
    assert codec.encode(sound) == flattened(codes)
    expected = resample(torch.from_numpy(neural_codecs.decode(kind, model, codes)), RATE, rate)
    assert np.abs(codec.decode(flattened(codes)) - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("samples", [0, 1])
def test_a_sound_is_one_frame_at_least(written, kind, samples):
    codec = codec_in(written[kind][0])
    codes = codec.encode(np.zeros(samples, np.float32))
    assert len(codes) == 4
    assert len(codec.decode(codes)) > 0


def test_dac_is_padded_as_its_feature_extractor_does(written):
    sound = noise(1003)
    extractor = DacFeatureExtractor(sampling_rate=RATE, hop_length=40)
    padded = extractor(raw_audio=sound, sampling_rate=RATE, return_tensors="pt").input_values
    with torch.no_grad():
        codes = written["dac"][1].encode(torch.from_numpy(np.array(padded))).audio_codes[0]
    assert codec_in(written["dac"][0]).encode(sound) == flattened(codes)


def test_folders_as_they_were_published(written, tmp_path):
    """Names of weight norms, and fields of a config, that transformers has given up."""
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        for name in HuggingFaceCodec.files:
            (tmp_path / kind / name).write_bytes((written[kind][0] / name).read_bytes())
    spoil(tmp_path / "encodec", rename_weight_norms)
    config = change_config(tmp_path / "mimi", rope_theta=10_000.0, frame_rate=50.0)
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in fields.items() if k != "rope_parameters"}))
    for kind in ("encodec", "mimi"):
        codes = random_codes(4, 30)
        sound = codec_in(tmp_path / kind).decode(codes)
        assert np.array_equal(sound, codec_in(written[kind][0]).decode(codes))
    change_config(tmp_path / "mimi", rope_theta=100.0)
    assert not np.allclose(codec_in(tmp_path / "mimi").decode(codes), sound)


def rename_weight_norms(tensors):
    for name in list(tensors):
        new = name.replace("parametrizations.weight.original0", "weight_g")
        new = new.replace("parametrizations.weight.original1", "weight_v")
        tensors[new] = tensors.pop(name)
    assert any("weight_g" in name for name in tensors)


def test_files_are_written_as_by_any_codec_of_sound(written, tmp_path):
    codec = codec_in(written["mimi"][0], sample_rate_hz=8_000)
    codec.save(np.concatenate([noise(8_000)] * 2), tmp_path / "a.flac")
    assert len(codec.read(tmp_path / "a.flac")) == 16_000


# Wrong folders.


def error_of(call, *arguments):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        call(*arguments)
    return str(error.value)


@pytest.fixture
def copied(written, kind, tmp_path):
    """A folder that a test may spoil."""
    for name in HuggingFaceCodec.files:
        (tmp_path / name).write_bytes((written[kind][0] / name).read_bytes())
    return tmp_path


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def load_error(folder, **changes):
    return error_of(codec_in(folder, **changes).decode, [0, 64, 128, 192])


def test_a_folder_that_lacks_a_file(copied):
    for name in HuggingFaceCodec.files:
        content = (copied / name).read_bytes()
        (copied / name).unlink()
        assert load_error(copied).startswith(f"{copied / name}: no such file; copy it from")
        (copied / name).write_bytes(content)
    assert codec_in(copied).decode([0, 64, 128, 192]).shape


def test_sizes_that_the_folder_does_not_have(written, kind):
    folder = written[kind][0]
    message = load_error(folder, codebook_size=32)
    assert message.startswith(f"{folder / 'config.json'}: codebooks of 64 codes, but the model's")
    with pytest.raises(ValueError, match="1 to 4 codebooks, but the model's config says 5"):
        codec_in(folder, 5).encode(noise(100))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; choose one of mimi, dac, encodec"),
        ({"model_type": ["mimi"]}, "model_type is ['mimi']; choose one of"),
        ({"codebook_size": 2**40}, "which is no size of a codec"),
        ({"codebook_size": "64"}, "no config of"),
        ({"codebook_size": 63}, "config.json"),
        ({"sampling_rate": 0}, "sampling_rate is 0"),
        ({"sampling_rate": -5}, "sampling_rate is -5"),
        ({"codebook_dim": 17}, "model.safetensors"),
        ({"upsampling_ratios": [2] * 40, "downsampling_ratios": [2] * 40}, "no size of a codec"),
        ({"num_quantizers": 10**6, "n_codebooks": 10**6}, "no size of a codec"),
        ({"num_lstm_layers": 10**6, "num_hidden_layers": 10**6}, "no size of a codec"),
        ({"target_bandwidths": [1.0, 10.0**6]}, "codebooks is "),
        ({"upsampling_ratios": [], "downsampling_ratios": []}, "config.json"),
        ({"upsampling_ratios": [0, 0], "downsampling_ratios": [0, 0]}, "config.json"),
    ],
)
def test_configs_that_cannot_be(copied, kind, changes, message):
    known = json.loads((copied / "config.json").read_text())
    changes = {name: value for name, value in changes.items() if name in known}
    if changes:
        change_config(copied, **changes)
        assert message in load_error(copied)


def test_a_config_that_is_no_json_object(copied):
    for content in ("", "[]", "3", "{", "[" * 100_000, " " * 2**21):
        (copied / "config.json").write_text(content)
        assert load_error(copied).startswith(f"{copied / 'config.json'}: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"audio_channels": 2},
        {"normalize": True},
        {"chunk_length_s": 1.0, "overlap": 0.01},
        {"norm_type": "time_group_norm"},
        {"use_causal_conv": False},
    ],
)
def test_the_stereo_encodec_is_refused(tmp_path, changes):
    neural_codecs.write("encodec", tmp_path, **changes)
    name = next(iter(changes))
    message = load_error(tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: {name} is {changes[name]!r}, but only")


RUNS = """
import sys
from examples.mimo.modalities.hf_codec import HuggingFaceCodec
codec = HuggingFaceCodec(folder=sys.argv[1], num_codebooks=4, codebook_size=64)
print(len(codec.decode([0, 64, 128, 192])))
"""


def test_no_code_and_no_other_file_of_the_folder_is_read(copied, kind):
    """Neither code, nor kernels of a hub, quantisers and adapters, which transformers may load."""
    change_config(
        copied,
        auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
        quantization_config={"quant_method": "nonsense"},
        attn_implementation="nobody/nothing",
        _attn_implementation="nobody/nothing",
        dtype="float16",
        architectures=["EvilModel"],
    )
    (copied / "evil.py").write_text("raise SystemExit('ran')")
    (copied / "adapter_config.json").write_text("{")
    (copied / "pytorch_model.bin").write_bytes(b"no pickle")
    (copied / "generation_config.json").write_text("{")
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(copied)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    assert done.stderr == ""


def spoil(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


def test_weights_that_lack_a_tensor(copied):
    path = spoil(copied, lambda tensors: tensors.pop(sorted(tensors)[0]))
    assert load_error(copied).startswith(f"{path}: ")
    assert "numbers, but a model of" in load_error(copied)


def test_weights_of_another_name(copied):
    def rename(tensors):
        tensors["decoder.renamed"] = tensors.pop(sorted(tensors)[0])

    path = spoil(copied, rename)
    message = load_error(copied)
    assert message.startswith(f"{path}: 1 weights are missing or of another shape")


def test_weights_that_are_not_finite(copied):
    def change(tensors):
        next(iter(tensors.values())).flatten()[0] = float("nan")

    path = spoil(copied, change)
    assert load_error(copied).startswith(f"{path}: ")
    assert load_error(copied).endswith("holds NaN or infinite values")


def test_weights_that_are_damaged(copied):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], b"\xff" * 64):
        path.write_bytes(content)
        assert load_error(copied).startswith(f"{path}: not a safetensors file")


def test_a_folder_that_changes_is_read_again(written, copied, kind):
    codec = codec_in(copied)
    before = codec.decode([0, 64, 128, 192])
    spoil(copied, lambda tensors: [tensor.mul_(0.5) for tensor in tensors.values()])
    assert not np.allclose(codec.decode([0, 64, 128, 192]), before)
    assert dataclasses.replace(codec, folder=str(written[kind][0])).decode(
        [0, 64, 128, 192]
    ) == pytest.approx(before, abs=1e-6)
