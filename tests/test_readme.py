"""The README's Python block runs as it stands, with files that exist."""

import re
import subprocess
import sys

import numpy as np
import soundfile
from PIL import Image

from tests.helpers import known_answers, outputs
from tests.helpers.commands import ROOT


def test_the_python_block_answers(data_folder, tmp_path, build_model):
    readme = (ROOT / "README.md").read_text()
    block = next(
        code
        for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        if "from examples.mimo import Mimo" in code
    )
    config = outputs.with_learned_voice(tmp_path)
    known_answers.write_checkpoint(config, data_folder, tmp_path / "checkpoint")
    Image.new("RGB", (28, 28), "gray").save(tmp_path / "digit.png")
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 16_000)
    soundfile.write(tmp_path / "question.flac", noise, 16_000)
    files = {"checkpoint": "checkpoint", "image": "digit.png", "audio": "question.flac"}
    for name, file in files.items():
        block, count = re.subn(
            rf'^{name} = ".*"$', f"{name} = {str(tmp_path / file)!r}", block, flags=re.MULTILINE
        )
        assert count == 1, name
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    text, samples = re.fullmatch(r"(.*) \((\d+),\)", second).groups()
    assert {first, text} <= {*known_answers.sentences(data_folder)}
    codec = config.outputs["speech"].codec
    lengths = [codec.patch_samples * len(codes) for codes in known_answers.spoken(config)]
    assert int(samples) in lengths
