import math

import numpy as np
import pytest
import torch
from PIL import Image

from examples.mimo.configs import get_model_config
from examples.mimo.modalities.audio import WhisperConfig, log_mel
from examples.mimo.modalities.base import sinusoids
from examples.mimo.modalities.image import VitConfig


@pytest.fixture(scope="module")
def whisper():
    return get_model_config("llava_avlm").modalities["audios"].encoder


@pytest.mark.parametrize(
    ("seconds", "tokens"), [(10, 500), (30, 1500), (0.01, 1), (0.02, 1), (0.0201, 2), (29.99, 1500)]
)
def test_whisper_counts_half_a_hop_up_to_the_window(whisper, seconds, tokens):
    samples = round(seconds * 16_000)
    inputs = whisper.preprocess(np.zeros(samples, np.float32))
    assert whisper.num_tokens(inputs) == tokens == min(1500, math.ceil(samples / 160 / 2))
    assert inputs["input_features"].shape == (1, 80, 3000)


def test_whisper_never_counts_more_than_the_window(whisper):
    inputs = whisper.preprocess(np.zeros(31 * 16_000, np.float32))
    assert whisper.num_tokens(inputs) == 1500


def test_log_mel_is_the_whisper_feature_extractors():
    from transformers import WhisperFeatureExtractor

    sound = np.random.default_rng(0).uniform(-1, 1, 30 * 16_000).astype(np.float32)
    sound[16_000 * 7 :] = 0
    extractor = WhisperFeatureExtractor(feature_size=80)
    expected = extractor(sound, sampling_rate=16_000, return_tensors="pt").input_features[0]
    features, silence = log_mel(torch.from_numpy(sound), 80, 160)
    assert (features - expected).abs().max() < 1e-4
    assert abs(silence - float(expected.min())) < 1e-4


@pytest.mark.parametrize("seconds", [0.01, 1.23, 29.98, 29.995, 30])
def test_the_silence_behind_a_sound_is_the_whisper_feature_extractors(whisper, seconds):
    from transformers import WhisperFeatureExtractor

    length = round(seconds * 16_000)
    sound = np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=80)
    expected = extractor(sound, sampling_rate=16_000, return_tensors="pt").input_features
    assert (whisper.preprocess(sound)["input_features"] - expected).abs().max() < 1e-4


def test_sinusoids_are_whispers():
    from transformers.models.whisper.modeling_whisper import sinusoids as hugging_face

    assert torch.equal(sinusoids(1500, 512), hugging_face(1500, 512))


def test_neighbouring_patches_side_by_side_make_a_token():
    vit = VitConfig(1, 1, 1, 1, image_size=24, patch_size=4, family="siglip", patches_per_token=4)
    numbers = torch.arange(2 * 36.0).reshape(2, 36, 1)
    tokens = vit.select(numbers)
    assert tokens.shape == (2 * vit.max_tokens, vit.output_size) == (18, 4)
    assert tokens[0].tolist() == [0, 1, 6, 7]
    assert tokens[1].tolist() == [2, 3, 8, 9]
    assert tokens[3].tolist() == [12, 13, 18, 19]
    assert tokens[9].tolist() == [36, 37, 42, 43]


@pytest.mark.parametrize("patches", [2, 16])
def test_a_token_is_a_square_of_patches(patches):
    with pytest.raises(ValueError, match="square of a number that divides the 6 patches"):
        VitConfig(1, 1, 1, 1, image_size=24, patch_size=4, patches_per_token=patches)


def test_clip_preprocessing_is_the_image_processors():
    from transformers import CLIPImageProcessorPil

    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size=size[0], crop_size=size[1])
    noise = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    clip = get_model_config("tiny_avlm").modalities["images"].encoder
    expected = processor(picture, return_tensors="pt").pixel_values[0]
    assert (clip.preprocess(picture)["pixel_values"][0] - expected).abs().max() < 1e-5


def test_augmentation_moves_a_picture_a_little():
    clip = get_model_config("tiny_avlm").modalities["images"].encoder
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (28, 28, 36, 36))
    moved = np.asarray(clip.augment(picture, np.random.default_rng(0)))[:, :, 0] / 255.0
    assert 0.5 * 64 < moved.sum() < 1.7 * 64
    rows, columns = np.nonzero(moved > 0.5)
    assert abs(rows.mean() - 31.5) < 8
    assert abs(columns.mean() - 31.5) < 8


def test_whisper_augmentation_stays_in_the_window(tiny):
    encoder = tiny.modalities["audios"].encoder
    sound = np.full(encoder.window_samples - 5, 0.1, np.float32)
    for seed in range(20):
        varied = encoder.augment(sound, np.random.default_rng(seed))
        assert len(sound) <= len(varied) <= encoder.window_samples


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 64}, "hold a patch of 64 pixels"),
        ({"feature_layer": -3}, "-2..-1"),
        ({"family": "resnet"}, "choose one of clip, siglip, dinov2"),
        ({"fit": "squeeze"}, "fit is 'squeeze'; choose one of crop, stretch, pad"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number from 1 to 131,072"),
    ],
)
def test_vit_configs_that_cannot_be(fields, message):
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "hidden_size": 8}
    with pytest.raises(ValueError, match=message):
        VitConfig(**{**sizes, "num_attention_heads": 2, "ffn_hidden_size": 8, **fields})


def test_a_class_token_is_no_patch():
    vit = VitConfig(1, 1, 1, 1, image_size=8, patch_size=4)
    hidden = torch.arange(2 * 5.0).reshape(2, 5, 1)
    assert vit.select(hidden).flatten().tolist() == [1, 2, 3, 4, 6, 7, 8, 9]


def test_frames_of_sound_side_by_side_make_a_token():
    whisper = WhisperConfig(
        1, 1, 1, 1, num_mel_bins=80, hop_samples=160, window_seconds=0.1, frames_per_token=2
    )
    hidden = torch.arange(1, 11.0).reshape(2, 5, 1)
    tokens = whisper.select(hidden, num_frames=torch.tensor([5, 1]))
    assert tokens.tolist() == [[1, 2], [3, 4], [5, 0], [6, 7]]


def test_whisper_windows_that_cannot_be():
    with pytest.raises(ValueError, match="multiple of two hops"):
        WhisperConfig(2, 8, 2, 8, num_mel_bins=80, hop_samples=160, window_seconds=0.015)
