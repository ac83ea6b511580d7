import functools
import json

import pytest

from examples.mimo.configs import MODEL_PROVIDERS, get_model_config
from tests.helpers import ranks

# Parameters of a part in millions, from the papers and model cards where there are any.
MILLIONS = {
    "tiny_avlm": {"images.encoder": 0.4, "audios.encoder": 0.5, "language": 0.9},
    "llava_vlm": {"images.encoder": 290.9, "images.projector": 21.0, "language": 6738.9},
    "video_llava_vlm": {"videos.encoder": 290.9, "videos.projector": 33.6, "language": 6738.9},
    "llava_avlm": {"audios.encoder": 19.8, "audios.projector": 18.9},
    "qwen3_avlm": {"images.encoder": 413.0, "audios.encoder": 635.1, "language": 8190.7},
    "smollm2_avlm": {"images.encoder": 21.6, "audios.encoder": 7.6, "language": 134.5},
    "scale_1b_avlm": {"images.encoder": 290.9, "images.projector": 12.6, "language": 852.8},
}


def splits_over(config, tp):
    """Whether all heads of a config are divisible by a tensor-parallel size."""
    heads = [modality.encoder.num_attention_heads for modality in config.inputs.values()]
    heads += [config.language.num_attention_heads, config.language.num_query_groups]
    return not any(number % tp for number in heads)


SIZES = {
    name: [tp for tp in (1, 2) if splits_over(get_model_config(name), tp)]
    for name in MODEL_PROVIDERS
}


@functools.cache
def counts():
    cases = [f"{name}:{tp}" for name, sizes in SIZES.items() for tp in sizes]
    done = ranks.run("tests/model/count_parameters.py", *cases, processes=0, kind="commands")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def count(name, tp):
    return counts()[f"{name}:{tp}"]


@pytest.mark.parametrize("name", [name for name, sizes in SIZES.items() if 2 in sizes])
def test_every_linear_weight_is_halved_at_tp_2(name):
    whole, half = count(name, 1)["linear"], count(name, 2)["linear"]
    modalities = get_model_config(name).modalities
    # At least two layers of the language model and one of each encoder, and the projectors.
    assert len(whole) >= 4 * (2 + len(modalities)) + 2 * len(modalities)
    sharded = {path: size for path, size in whole.items() if "stem" not in path}
    assert {path: size // 2 for path, size in sharded.items()} == {p: half[p] for p in sharded}


def test_each_part_of_llava_is_within_five_percent_of_half_at_tp_2():
    whole, half = count("llava_avlm", 1)["parts"], count("llava_avlm", 2)["parts"]
    for part, size in whole.items():
        assert size / 2 <= half[part] <= size / 2 * 1.05, part


def test_qwen3_is_as_large_as_it_should_be():
    whole = count("qwen3_avlm", 1)["parts"]
    # Qwen3-8B as released, SigLIP so400m without its pooling head, Whisper large-v3's encoder.
    assert whole["language"] == 8_190_735_360
    assert 400e6 < whole["images.encoder"] < 430e6
    assert 630e6 < whole["audios.encoder"] < 640e6


def test_llava_is_as_large_as_it_should_be():
    whole = count("llava_avlm", 1)["parts"]
    # Vicuna-7B with 32,064 entries in both tables; 23 layers of CLIP ViT-L/14 at 336 px.
    assert whole["language"] == 6_738_939_904
    assert whole["images.projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert whole["images.encoder"] == 23 * 12_596_224 + 588 * 1024 + 578 * 1024 + 2 * 1024


def test_a_sensor_encoder_is_as_large_as_it_should_be():
    layer = 4 * 128 * 128 + 4 * 128 + 2 * 128 * 512 + 512 + 128 + 4 * 128
    encoder = count("sensor_lm", 1)["parts"]["sensors.encoder"]
    assert encoder == (16 * 6 * 128 + 128) + 2 * layer + 2 * 128


@pytest.mark.parametrize("name", MILLIONS)
def test_parts_are_as_large_as_ever(name):
    parts = count(name, 1)["parts"]
    assert {part: round(parts[part] / 1e6, 1) for part in MILLIONS[name]} == MILLIONS[name]


@pytest.mark.parametrize("name", MODEL_PROVIDERS)
def test_every_config_builds_all_its_parts(name):
    config = get_model_config(name)
    parts = count(name, 1)["parts"]
    expected = {f"{m}.{side}" for m in config.inputs for side in ("encoder", "projector")}
    assert set(parts) == {*expected, "language"}
    assert set(config.frozen) <= set(parts)
    assert all(size > 0 for size in parts.values())
