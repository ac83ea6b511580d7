"""Defaults of the base classes, the sensor example, and a projector of one's own."""

import dataclasses
import io
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from examples.mimo.configs import get_model_config
from examples.mimo.hf.weights import family_for_export, family_of
from examples.mimo.modalities.base import EncoderConfig, first_tokens, sinusoids
from examples.mimo.modalities.files import Blob
from examples.mimo.modalities.image import VitConfig
from tests.helpers.commands import ROOT, run_train
from tests.helpers.linear_projector import linear_sensor_lm

SIZES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 16}


@dataclass(frozen=True)
class Letters(EncoderConfig):
    """An item is the bytes of a file, each a patch of one feature; a line is an encoder input."""

    suffixes = (".letters",)
    max_tokens = 4
    input_size = 1
    max_inputs = 2

    def read(self, source):
        return source.data

    def patches(self, raw):
        return [np.array(list(line))[:, None] for line in raw.split(b"\n")]


@pytest.fixture
def letters():
    return Letters(**SIZES)


@pytest.fixture
def sensor():
    return get_model_config("sensor_lm").modalities["sensors"].encoder


def test_patches_are_padded_and_counted(letters):
    inputs = letters.preprocess(b"ab\nc")
    assert inputs["patches"].dtype == torch.float32
    assert inputs["patches"].squeeze(2).tolist() == [[97, 98, 0, 0], [99, 0, 0, 0]]
    assert inputs["num_patches"].tolist() == [2, 1]
    assert letters.num_tokens(inputs) == 3


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"abcde", r"shape \(5, 1\), but \(1 to 4, 1\) is needed"),
        (b"a\n", r"shape \(0, 1\)"),
        (b"a\nb\nc", "3 encoder inputs, but 1 to 2 fit an item"),
    ],
)
def test_inputs_that_do_not_fit_are_named_before_they_meet_others(letters, raw, message):
    with pytest.raises(ValueError, match=message):
        letters.preprocess(raw)


def test_patches_of_another_width_are_named(letters, monkeypatch):
    monkeypatch.setattr(Letters, "patches", lambda self, raw: [np.zeros((2, 3))])
    with pytest.raises(ValueError, match=r"shape \(2, 3\), but \(1 to 4, 1\) is needed"):
        letters.preprocess(b"")


def test_mock_inputs_have_the_shapes_of_real_ones(letters):
    mock, real = letters.mock_inputs(torch.Generator().manual_seed(0)), letters.preprocess(b"ab")
    assert {k: (v.shape, v.dtype) for k, v in mock.items()} == {
        k: (v.shape, v.dtype) for k, v in real.items()
    }
    assert 1 <= letters.num_tokens(mock) <= 4


def test_an_item_that_is_an_array_is_described_and_blanked(sensor):
    raw = np.ones((3, 6), np.float32)
    assert sensor.describe(raw) == "3 x 6"
    assert not sensor.blank(raw).any()
    assert sensor.blank(raw).shape == (3, 6)
    assert sensor.preview(raw) == []
    assert sensor.augment(raw, np.random.default_rng(0)) is raw


def test_the_default_stem_embeds_patches_and_adds_positions(letters):
    stem = letters.stem()
    inputs = letters.preprocess(b"ab\nc")
    hidden = stem(**inputs)
    assert hidden.shape == (2, letters.sequence_length, 8)
    embedded = hidden - sinusoids(4, 8)
    assert torch.allclose(embedded[0, 1], stem.linear(torch.tensor([98.0])), atol=1e-4)
    assert set(dict(stem.named_parameters())) == {"linear.weight", "linear.bias"}
    # Nothing of the positions is in a checkpoint: they are computed.
    assert set(stem.state_dict()) == {"linear.weight", "linear.bias"}
    assert letters.select(hidden, **inputs).shape == (3, 8)
    assert letters.stem_flops == 2 * stem.linear.weight.numel() * 4


def test_only_the_tokens_that_count_leave(letters):
    tokens = torch.arange(6.0).reshape(2, 3, 1)
    assert first_tokens(tokens, torch.tensor([1, 2])).flatten().tolist() == [0, 3, 4]


@pytest.mark.parametrize("width", [2, 7])
def test_a_width_without_sinusoids_is_refused(width):
    with pytest.raises(ValueError, match=f"hidden_size {width}: .* even"):
        sinusoids(4, width)


def test_what_a_modality_must_say():
    @dataclass(frozen=True)
    class Silent(EncoderConfig):
        pass

    with pytest.raises(TypeError, match=r"max_tokens.*read.*suffixes"):
        Silent(**SIZES)

    @dataclass(frozen=True)
    class Short(EncoderConfig):
        suffixes = ()
        max_tokens = 1

        def read(self, source):
            return source

    with pytest.raises(ValueError, match="Short needs patches, or an own preprocess"):
        Short(**SIZES).preprocess(None)
    with pytest.raises(ValueError, match="Short needs input_size, or an own stem"):
        Short(**SIZES).stem()


@pytest.mark.parametrize("field", list(SIZES))
def test_sizes_are_positive(field):
    with pytest.raises(ValueError, match=f"{field} is 0; it must be a whole number from 1 to "):
        Letters(**{**SIZES, field: 0})


def test_fields_say_whether_they_shape_weights():
    free = {
        field.name
        for modality in get_model_config("llava_avlm").modalities.values()
        for field in dataclasses.fields(modality.encoder)
        if not field.metadata.get("shapes_weights", True)
    }
    assert free == {
        *("fit", "max_tiles", "augment_shift", "augment_degrees", "augment_scale"),
        *("resize_side", "resample", "mean", "std", "background"),
        *("max_windows", "overflow", "augment_noise", "augment_shift_seconds"),
    }
    choices = {f.name: f.metadata.get("choices") for f in dataclasses.fields(VitConfig)}
    assert choices["family"] == ("clip", "siglip", "dinov2")
    assert choices["fit"] == ("crop", "stretch", "pad")


def test_the_shared_encoder_drops_padding_and_trains(build_model, letters):
    config = get_model_config("sensor_lm")
    modality = dataclasses.replace(config.modalities["sensors"], encoder=letters)
    model = build_model(dataclasses.replace(config, modalities={"letters": modality}))
    encoder = model.modality_submodules["letters"].encoders["encoder"]
    inputs = letters.preprocess(b"abc\nd")
    output = encoder(**inputs)
    assert output.shape == (4, 8)
    # Each input is encoded by itself.
    alone = encoder(**letters.preprocess(b"d"))
    assert torch.allclose(output[3:], alone, atol=1e-5)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def npy(array, **how):
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


def header(text):
    """A .npy file of 1.0 whose header is `text`, with no data behind it."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_a_sensor_series_becomes_patches(sensor, tmp_path):
    series = np.arange(20 * 6, dtype=np.float64).reshape(20, 6)
    np.save(tmp_path / "a.npy", series)
    raw = sensor.read(tmp_path / "a.npy")
    assert raw.dtype == np.float32
    assert np.array_equal(raw, series)
    inputs = sensor.preprocess(raw)
    assert inputs["patches"].shape == (1, 12, 96)
    assert sensor.num_tokens(inputs) == 2
    assert inputs["patches"][0, 1, :24].tolist() == list(range(96, 120))
    assert not inputs["patches"][0, 1, 24:].any()


def test_column_order_and_integers_are_read(sensor):
    series = np.arange(4 * 6).reshape(4, 6)
    assert np.array_equal(sensor.read(Blob("a", npy(np.asfortranarray(series)))), series)


TERABYTES = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 6)}\n"
BEFORE_NAN = np.zeros((4, 6))
BEFORE_NAN[2, 1] = np.nan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the sensor file is empty"),
        (b"hello", "not an array that numpy.save wrote"),
        (npy(np.array([{"a": 1}] * 6).reshape(1, 6), allow_pickle=True), "object of shape"),
        (npy(BEFORE_NAN), "NaN or infinite"),
        (npy(np.full((4, 6), 1e300)), "NaN or infinite"),
        (npy(np.zeros((4, 5))), r"float64 of shape \(4, 5\), but numbers of shape \(steps, 6\)"),
        (npy(np.zeros(6)), r"shape \(6,\)"),
        (npy(np.zeros((4, 6), complex)), "complex128 of shape"),
        (npy(np.zeros((4, 6), "U10000")), "<U10000 of shape"),
        (npy(np.zeros((0, 6))), "0 steps, but 1 to 192 fit"),
        (npy(np.zeros((193, 6))), "193 steps, but 1 to 192 fit"),
        (npy(np.zeros((4, 6)))[:-8], "damaged array"),
        (header(TERABYTES), "1,000,000,000,000 steps"),
        (header("(" * 9_000), "not an array"),
        (header("{" + " " * 60_000 + "}"), "not an array"),
        (header(TERABYTES.replace("1000000000000", "-1")), "-1 steps"),
    ],
)
def test_a_file_that_is_no_series_is_refused_in_one_line(sensor, content, message):
    with pytest.raises(ValueError, match=message) as error:
        sensor.read(Blob("a.npy", content))
    assert str(error.value).startswith("a.npy: ")
    assert "\n" not in str(error.value)


def test_a_promise_of_terabytes_takes_no_memory(sensor, tmp_path):
    (tmp_path / "a.npy").write_bytes(header(TERABYTES))
    with pytest.raises(ValueError, match="steps, but 1 to 192 fit"):
        sensor.read(tmp_path / "a.npy")


def test_the_sensor_example_stays_an_example():
    import ast
    import inspect

    from examples.mimo.modalities import sensor

    source = inspect.getsource(sensor)
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                docstrings |= set(range(first.lineno, first.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    assert sum(1 for number, line in lines if line.strip() and number not in docstrings) <= 40


def losses(metrics):
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]


@pytest.mark.parametrize(
    "flags",
    [
        ("--tensor-model-parallel-size", "2"),
        ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    ],
)
def test_a_projector_of_ones_own_is_one_file_and_right_at_tp_2(flags, tmp_path):
    provider = ("--model-provider", "tests.helpers.linear_projector:linear_sensor_lm")
    common = (*provider, "--dataset-provider", "mock", "--train-iters", "3")
    for name, layout in (("one", ()), ("two", flags)):
        metrics = ("--metrics-file", str(tmp_path / name))
        done = run_train(*common, *metrics, *layout, processes=2 if layout else 1)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


def test_weights_without_a_hugging_face_family():
    config = linear_sensor_lm()
    encoder, projector = (
        getattr(config.modalities["sensors"], s) for s in ("encoder", "projector")
    )
    assert family_for_export(encoder) is None
    assert family_for_export(projector) is None
    assert family_for_export(config.language).name == "llama"
    with pytest.raises(ValueError, match="folder: no weights of Hugging Face fit a SensorConfig"):
        family_of("clip", encoder, "folder")
    video = get_model_config("video_llava_vlm").modalities["videos"].encoder
    assert family_for_export(video).name == "clip_vision_model"


def test_a_family_of_ones_own_is_named_by_the_config(monkeypatch):
    monkeypatch.setattr(Letters, "hf_families", "examples.mimo.hf.families:WHISPER")
    assert family_for_export(Letters(**SIZES)).name == "whisper"


IMPORTS = """
import sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import examples.mimo.configs.pretrained, examples.mimo.configs.sensor_lm
print(time.perf_counter() - start)
print([n for n in sys.modules if n.startswith(("megatron", "torchaudio", "transformers"))])
print([n for n in set(sys.modules) - before if n.startswith("torch.distributed")])
"""


def test_a_config_imports_no_megatron():
    best = None
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds, megatron, distributed = done.stdout.splitlines()
        assert (megatron, distributed) == ("[]", "[]")
        best = min(float(seconds), best or float(seconds))
        if best < 1:
            break
        time.sleep(1)
    assert best < 1
