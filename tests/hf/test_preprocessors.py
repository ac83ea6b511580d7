"""Inputs are those of transformers' processors, by the files that models come with, both ways."""

import dataclasses
import json

import numpy as np
import pytest
import transformers as hf

from benchmarks import processors
from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.cli.overrides import with_preprocessing
from examples.mimo.configs import get_model_config
from examples.mimo.hf.from_hf import from_hf
from examples.mimo.hf.io import Folder
from examples.mimo.hf.to_hf import to_hf
from tests.helpers.commands import run_command
from tests.hf.cases import CASES, SIDE

FILE = "preprocessor_config.json"
IMAGES, AUDIOS = "images.encoder", "audios.encoder"
SQUARE = {"height": SIDE, "width": SIDE}


@pytest.mark.parametrize("name", processors.IMAGE_CASES)
def test_pictures_are_transformers(name):
    differences = processors.image_differences(name)
    print(f"\n{name}: {differences}")
    assert len(differences) == len(processors.SHAPES)
    for of_bytes, of_floats in differences.values():
        assert of_bytes == 0
        assert of_floats <= processors.IMAGE_BOUND


@pytest.mark.parametrize("num_mel_bins", processors.NUM_MEL_BINS)
def test_features_are_transformers(num_mel_bins):
    differences = processors.audio_differences(num_mel_bins)
    print(f"\n{num_mel_bins} mel bins: {differences}")
    assert max(differences.values()) <= processors.AUDIO_BOUND


def test_shipped_models_preprocess_as_their_families():
    assert processors.shipped_that_differ() == []


def said(lines):
    return [line for line in lines if "says" in line]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, build_model):
    """Folders of the encoders without a preprocessor, by case."""
    root = tmp_path_factory.mktemp("theirs")
    for name in ("clip", "siglip", "dinov2", "whisper_80"):
        CASES[name].build().save_pretrained(root / name)
    return root


@pytest.fixture
def convert(theirs, tmp_path):
    """Convert an encoder's folder with a preprocessor file in it; the checkpoint and the lines."""

    def run(name, values, file=FILE, **how):
        case = CASES[name]
        (theirs / name / file).write_text(values if isinstance(values, str) else json.dumps(values))
        lines = []
        try:
            source = {case.part: Folder(theirs / name)}
            from_hf(case.config, source, tmp_path / "ours", lines.append, **how)
        finally:
            (theirs / name / file).unlink()
        return open_checkpoint(tmp_path / "ours"), said(lines)

    return run


def encoder_of(checkpoint, part):
    return checkpoint.config.modalities[part.split(".")[0]].encoder


STRETCHED = {
    "image_processor_type": "SiglipImageProcessorFast",
    "size": SQUARE,
    "resample": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.25, 0.5, 1],
    "do_convert_rgb": None,
    "processor_class": "SiglipProcessor",
}
SHORTEST = {
    "size": {"shortest_edge": 40},
    "crop_size": SQUARE,
    "do_rescale": False,
    "image_mean": 127.5,
    "image_std": 51,
}
OLD = {
    "feature_extractor_type": "CLIPFeatureExtractor",
    "size": 48,
    "crop_size": SIDE,
    "resample": 1,
}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("siglip", STRETCHED, ("stretch", None, "bilinear", (0.5, 0.4, 0.3), (0.25, 0.5, 1))),
        ("dinov2", SHORTEST, ("crop", 40, "bicubic", (0.5,) * 3, (0.2,) * 3)),
        (
            "clip",
            OLD,
            (
                *("crop", 48, "lanczos", (0.48145466, 0.4578275, 0.40821073)),
                (0.26862954, 0.26130258, 0.27577711),
            ),
        ),
        (
            "clip",
            {"size": {"height": 40, "width": 40}, "crop_size": [SIDE, SIDE], "do_normalize": False},
            ("stretch", 40, "bicubic", (0.0,) * 3, (1.0,) * 3),
        ),
    ],
)
def test_a_folder_says_how_its_pictures_are_made(convert, tmp_path, name, values, expected):
    checkpoint, lines = convert(name, values)
    vit = encoder_of(checkpoint, IMAGES)
    assert (vit.fit, vit.resize_side, vit.resample, vit.mean, vit.std) == expected
    assert len(lines) == 1
    assert f"{IMAGES}: as {FILE} says, " in lines[0]
    to_hf(checkpoint, tmp_path / "back", lambda text: None)
    back = tmp_path / "back" / IMAGES
    written = json.loads((back / FILE).read_text())
    assert {**written, **values} == written
    assert set(written) - set(values) <= {"image_processor_type"}
    # What comes back makes the same pictures in transformers.
    processor = hf.AutoImageProcessor.from_pretrained(back)
    for picture in list(processors.pictures().values())[1:3]:
        inputs = processor(picture, return_tensors="np")["pixel_values"]
        assert np.abs(vit.preprocess(picture)["pixel_values"].numpy() - inputs).max() < 2e-6
    if name != "clip":  # of that not all layers are built, and so exported
        folders = {IMAGES: Folder(back)}
        from_hf(CASES[name].config, folders, tmp_path / "again", lines.append)
        assert encoder_of(open_checkpoint(tmp_path / "again"), IMAGES) == vit


def test_a_processor_config_holds_it_too_and_comes_first(convert, theirs):
    (theirs / "siglip" / FILE).write_text("{}")
    values = {"image_processor": {**STRETCHED, "resample": 0}, "processor_class": "SiglipProcessor"}
    checkpoint, _ = convert("siglip", values, "processor_config.json")
    assert encoder_of(checkpoint, IMAGES).resample == "nearest"
    assert checkpoint.sources[IMAGES]["preprocessor"] == values["image_processor"]
    (theirs / "siglip" / FILE).unlink()


def test_without_a_file_the_config_holds_and_what_is_set_outlasts_a_file(theirs, convert, tmp_path):
    lines = []
    from_hf(CASES["clip"].config, {IMAGES: Folder(theirs / "clip")}, tmp_path / "o", lines.append)
    ours = CASES["clip"].config.modalities["images"].encoder
    assert encoder_of(open_checkpoint(tmp_path / "o"), IMAGES) == ours
    assert said(lines) == []
    chosen = (f"{IMAGES}.fit", f"{IMAGES}.mean")
    vit = encoder_of(convert("clip", OLD, chosen=chosen)[0], IMAGES)
    assert (vit.fit, vit.resize_side, vit.mean) == ("crop", None, None)
    assert vit.resample == "lanczos"


CLIP_FILES = [
    ({"crop_size": 224}, "crop_size is 224, but tiny_avlm's images.encoder has image_size 30"),
    ({"size": 29}, "size is 29, but crop_size is 30, which must fit"),
    ({"size": 10**9}, "size is 1000000000, but"),
    ({"size": -30}, "size is -30, but"),
    ({"size": True}, "size is True, but"),
    ({"size": {"shortest_edge": [1] * 99}}, "size is {'shortest_edge': .*is needed"),
    ({"do_resize": False}, "do_resize is False, but True is needed"),
    ({"do_resize": 1}, "do_resize is 1, but True is needed"),
    ({"do_pad": True}, "do_pad is True, but False is needed"),
    ({"do_center_crop": "yes"}, "do_center_crop is 'yes', but True or False"),
    ({"resample": 6}, "resample is 6, but 0 or 1 or 2 or 3 or 4 or 5 is needed"),
    ({"resample": "bicubic"}, "resample is 'bicubic', but"),
    ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\], but 3 finite numbers"),
    ({"image_mean": [0, 0, float("nan")]}, "image_mean is .*finite numbers"),
    ({"image_std": [1, 1, 0]}, "std .*a number from 1e-06"),
    ({"image_std": "x" * 10**5}, "image_std is 'xxx.{0,200}finite numbers"),
    ({"rescale_factor": 0}, "rescale_factor is 0, but it must be above 0"),
    (
        {"feature_extractor_type": "FlavaFeatureExtractor"},
        "image_processor_type is 'FlavaImageProcessor', but CLIPImageProcessor or",
    ),
    ({"image_processor_type": ["CLIPImageProcessor"]}, "image_processor_type is .*but CLIP"),
]
SIGLIP_FILES = [
    ({"size": {"height": 31, "width": 31}}, "size is .*has image_size 30"),
    ({"size": {"height": 30, "width": 40}}, "size is .*equal height and width, is needed"),
    ({"size": {"longest_edge": 30}}, "a shortest_edge, or equal height and width"),
    ({"size": {"shortest_edge": 30}}, "do_center_crop is False, but pictures must become squares"),
]
WHISPER_FILES = [
    ({"chunk_length": 30}, "chunk_length is 30, but tiny_avlm's audios.encoder has 0.64"),
    ({"feature_size": 128}, "feature_size is 128, but .*has 80"),
    ({"sampling_rate": 8000}, "sampling_rate is 8000, but .*has 16000"),
    ({"dither": 0.1}, "dither is 0.1, but .*has 0.0"),
    ({"padding_side": "left"}, "padding_side is 'left', but .*has right"),
    ({"feature_extractor_type": "ClapFeatureExtractor"}, "feature_extractor_type is 'Clap"),
]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        *(("clip", {**OLD, **values}, message) for values, message in CLIP_FILES),
        *(("siglip", values, message) for values, message in SIGLIP_FILES),
        *(("whisper_80", {"chunk_length": 0.64, **v}, message) for v, message in WHISPER_FILES),
        ("clip", "[" * 100_000, "not JSON"),
        ("clip", "[1]", "not a JSON object"),
    ],
)
def test_what_cannot_be_done_is_refused(convert, tmp_path, name, values, message):
    with pytest.raises(ValueError, match=message) as refusal:
        convert(name, values)
    assert f"{name}/{FILE}: " in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600
    assert not (tmp_path / "ours").exists()


def test_whisper_comes_back(convert, theirs, tmp_path):
    extractor = {"feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 0.64}
    checkpoint, lines = convert("whisper_80", {**extractor, "processor_class": "WhisperProcessor"})
    assert lines == []
    to_hf(checkpoint, tmp_path / "back", lambda text: None)
    written = json.loads((tmp_path / "back" / AUDIOS / FILE).read_text())
    assert written == {**extractor, "processor_class": "WhisperProcessor"}


def test_a_model_from_no_folder_is_described(theirs, tmp_path):
    """Also what has changed since the import."""
    base = CASES["clip"].config
    audios = get_model_config("llava_avlm").modalities["audios"].encoder
    audios = dataclasses.replace(audios, num_layers=1, hidden_size=64, num_attention_heads=4)
    images = base.modalities["images"].encoder
    images = dataclasses.replace(
        images, fit="stretch", resample="bilinear", mean=(0.1, 0.2, 0.3), std=(1, 2, 3)
    )
    encoders = {"images": images, "audios": audios}
    config = dataclasses.replace(
        base,
        modalities={
            name: dataclasses.replace(modality, encoder=encoders[name])
            for name, modality in base.modalities.items()
        },
    )
    from_hf(config, {}, tmp_path / "ours", lambda text: None)
    to_hf(open_checkpoint(tmp_path / "ours"), tmp_path / "back", lambda text: None)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "back" / IMAGES)
    assert type(processor).__name__.startswith("CLIPImageProcessor")
    for picture in processors.pictures().values():
        inputs = processor(picture, return_tensors="np")["pixel_values"]
        assert np.abs(images.preprocess(picture)["pixel_values"].numpy() - inputs).max() < 2e-6
    extractor = hf.WhisperFeatureExtractor.from_pretrained(tmp_path / "back" / AUDIOS)
    assert (extractor.feature_size, extractor.chunk_length, extractor.hop_length) == (80, 30, 160)
    sound = processors.recordings()["16,001 samples"]
    inputs = extractor(sound, sampling_rate=16_000, return_tensors="np")["input_features"]
    ours = audios.preprocess(sound)["input_features"].numpy()
    assert np.abs(ours - inputs).max() <= processors.AUDIO_BOUND


def test_what_has_changed_since_an_import_is_written(convert, tmp_path):
    checkpoint, _ = convert("siglip", STRETCHED)
    vit = dataclasses.replace(encoder_of(checkpoint, IMAGES), fit="crop", resize_side=44)
    images = dataclasses.replace(checkpoint.config.modalities["images"], encoder=vit)
    modalities = {**checkpoint.config.modalities, "images": images}
    config = dataclasses.replace(checkpoint.config, modalities=modalities)
    to_hf(dataclasses.replace(checkpoint, config=config), tmp_path / "b", lambda text: None)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "b" / IMAGES)
    for picture in list(processors.pictures().values())[:3]:
        inputs = processor(picture, return_tensors="np")["pixel_values"]
        assert np.abs(vit.preprocess(picture)["pixel_values"].numpy() - inputs).max() < 2e-6


def test_training_goes_on_with_it(convert):
    """A run takes its config from the registry, and its weights from what was converted."""
    checkpoint, _ = convert("siglip", STRETCHED)
    config = CASES["siglip"].config
    trained = with_preprocessing(config, checkpoint, [])
    assert trained.modalities["images"].encoder == encoder_of(checkpoint, IMAGES)
    set_by_user = with_preprocessing(config, checkpoint, [f"{IMAGES}.resample=lanczos"])
    vit = set_by_user.modalities["images"].encoder
    assert (vit.fit, vit.resample, vit.mean) == ("stretch", "bicubic", (0.5, 0.4, 0.3))
    other = CASES["clip"].config
    assert with_preprocessing(other, checkpoint, []) == other


def test_the_command_says_what_it_read(theirs, tmp_path):
    """tests.helpers.models has no model of these sizes, so the refusal shows that it was read."""
    (theirs / "clip" / FILE).write_text(json.dumps({**OLD, "crop_size": 31}))
    flags = ("--model-provider", "tiny_avlm", "--images", str(theirs / "clip"))
    run = run_command("convert.py", "from-hf", *flags, "--save", str(tmp_path / "o"))
    (theirs / "clip" / FILE).unlink()
    assert run.returncode == 2, run.stderr
    assert (
        f"{FILE}: crop_size is 31, but tiny_avlm's images.encoder has image_size 32" in run.stderr
    )
    assert run.stderr.count("\n") == 1
