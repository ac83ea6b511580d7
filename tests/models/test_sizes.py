import functools
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@functools.cache
def count(name, tp):
    script = ROOT / "tests/models/count_llava.py"
    done = subprocess.run(
        [sys.executable, str(script), name, str(tp)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["tiny_avlm", "llava_avlm", "qwen3_avlm"])
def test_every_linear_weight_is_halved_at_tp_2(name):
    whole, half = count(name, 1)["linear"], count(name, 2)["linear"]
    assert len(whole) >= 4 * 3 + 2 * 2
    assert {path: size // 2 for path, size in whole.items()} == half


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
    # Vicuna-7B with 32,064 rows in both tables; 23 layers of CLIP ViT-L/14 at 336 px.
    assert whole["language"] == 6_738_939_904
    assert whole["images.projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert whole["images.encoder"] == 23 * 12_596_224 + 588 * 1024 + 578 * 1024 + 2 * 1024
