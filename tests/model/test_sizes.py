import functools
import importlib
import json
import re
import subprocess
import sys

import pytest

from examples.mimo.configs import MODEL_PROVIDERS
from tests.conftest import ROOT

# The heads of smollm2_avlm divide by neither two nor four.
SIZES = {name: (1,) if name == "smollm2_avlm" else (1, 2, 4) for name in MODEL_PROVIDERS}
CASES = [f"{name}:{tp}" for name, sizes in SIZES.items() for tp in sizes]


@functools.cache
def counts():
    command = [sys.executable, "-m", "tests.model.count_parameters", *CASES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def count(name, tp):
    return counts()[f"{name}:{tp}"]


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


@pytest.mark.parametrize("name", MODEL_PROVIDERS)
def test_a_config_says_what_it_holds(name):
    config = getattr(importlib.import_module(MODEL_PROVIDERS[name]), name)
    text = " ".join(config.__doc__.split())
    listed = re.search(r"Million parameters: (.*?)\. Before", text)[1]
    said = {part: float(size) for part, size in (line.split() for line in listed.split(", "))}
    counted = count(name, 1)["parts"]
    assert said == {part: round(size / 1e6, 1) for part, size in counted.items()}
    found = re.search(r"a rank of TP (\d) in (\w+) holds ([\d.]+) GiB", text)
    tp, dtype, gib = int(found[1]), found[2], float(found[3])
    # Weights; for what trains also fp32 gradients, Adam's moments, and in bf16 fp32 weights.
    weight, trained = {"bf16": (2, 16), "fp32": (4, 12)}[dtype]
    frozen = config().frozen
    here = count(name, tp)["parts"]
    size = sum(n * (weight + trained * (part not in frozen)) for part, n in here.items())
    assert gib == round(size / 2**30, 2)
    assert f"torchrun --nproc-per-node {2 if tp < 4 else 8} examples/mimo/train.py" in text
    assert f"--model-provider {name}" in text
