"""The demo's page of answers, and how it is told from other checkpoints."""

import json
import re
import sys

import numpy as np
import pytest

from demos.digits import page
from demos.digits.questions import spoken_answers
from examples.mimo.configs import get_model_config
from tests.helpers import known_answers, outputs


@pytest.fixture(scope="module")
def spoken_data(data_folder, tmp_path_factory):
    """Two questions to be answered aloud, and a checkpoint of the demo's model."""
    root = tmp_path_factory.mktemp("page")
    record = json.loads((data_folder / "heldout.jsonl").read_text().splitlines()[0])
    for kind in ("images", "audios"):
        (root / record[kind][0]).parent.mkdir(parents=True)
        (root / record[kind][0]).write_bytes((data_folder / record[kind][0]).read_bytes())
    turns = [{"from": "human", "value": "<image><audio>Answer aloud."}]
    turns += [{"from": "gpt", "value": "<&><speech>"}]
    record |= {"conversations": turns, "speech": [spoken_answers()[0].file]}
    (root / "heldout_aloud.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    config = outputs.with_learned_voice(root)
    known_answers.write_checkpoint(config, data_folder, root / "checkpoint")
    return root


def test_the_page_shows_each_code_under_its_sound(spoken_data, monkeypatch, build_model, tmp_path):
    flags = ["--ckpt", str(spoken_data / "checkpoint"), "--data", str(spoken_data)]
    output = tmp_path / "answers.html"
    monkeypatch.setattr(sys, "argv", ["page", *flags, "--output", str(output), "--samples", "2"])
    page.main()
    text = output.read_text()
    assert text.count('<tr><td><img src="data:image/png;base64,') == 2
    assert text.count("data:audio/flac;base64,") == 2
    assert text.count("data:audio/wav;base64,") == 2
    assert "(right is: &lt;&amp;&gt;)" in text
    codes = [int(code) for code in re.findall(r"<text [^>]*>(\d+)</text>", text)]
    (said,) = re.findall(r"waveform with (\d+) codes", text)[:1]
    config = get_model_config("tiny_avlm_speech")
    assert codes[: int(said)] in known_answers.spoken(config)
    assert codes[: int(said)] * 2 == codes


def test_a_model_without_speech_is_refused(data_folder, monkeypatch, tmp_path, tiny, build_model):
    known_answers.write_checkpoint(tiny, data_folder, tmp_path / "silent")
    flags = [
        "--ckpt",
        str(tmp_path / "silent"),
        "--data",
        "none",
        "--output",
        str(tmp_path / "a.html"),
    ]
    monkeypatch.setattr(sys, "argv", ["page", *flags])
    with pytest.raises(ValueError, match=r"tiny_avlm has no output of speech$"):
        page.main()


def test_a_bar_is_as_high_as_the_loudest_sample_under_it():
    samples = np.zeros(2 * page.POINTS_OF_A_CODE, np.float32)
    samples[3], samples[-1] = 0.5, -1.0
    svg = page.waveform(samples, [7, 9])
    bars = re.search(r'class="sound" d="([^"]*)"', svg)[1]
    heights = [float(top) for top in re.findall(r"M[\d.]+ ([\d.]+)V", bars)]
    assert len(heights) == 2 * page.POINTS_OF_A_CODE
    assert heights[-1] == 0
    assert heights[3] == page.HALF_HEIGHT / 2
    assert heights[4] == page.HALF_HEIGHT
    assert svg.count("</text>") == 2
