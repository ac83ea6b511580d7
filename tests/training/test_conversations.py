"""Runs on folders of conversations that are not as they should be."""

import json

import pytest
from PIL import Image

from examples.mimo.data.tokenizer import copy_tokenizer
from tests.helpers.commands import run_train

ITERATIONS = 6
NUM_SAMPLES = 12
# In the order of the file; each is met once in an epoch, and so is what stands in for it.
BAD = {"bad-2": b"", "bad-7": b"no picture"}


@pytest.fixture
def folder(data_folder, tmp_path):
    """A training split alone: pictures and their colours, two of them damaged."""
    root = tmp_path / "data"
    root.mkdir()
    copy_tokenizer(data_folder / "tokenizer.model", root)
    with (root / "train.jsonl").open("w") as lines:
        for number in range(NUM_SAMPLES):
            key = f"bad-{number}" if f"bad-{number}" in BAD else f"good-{number}"
            Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(root / f"{key}.png")
            if key in BAD:
                (root / f"{key}.png").write_bytes(BAD[key])
            turns = [{"from": "human", "value": "<image>Red?"}, {"from": "gpt", "value": "seven"}]
            record = {"key": key, "images": [f"{key}.png"], "conversations": turns}
            lines.write(json.dumps(record) + "\n")
    return root


def train(folder, *flags):
    return run_train(
        *("--dataset-provider", "conversations", "--data-path", str(folder)),
        *("--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-4"),
        *("--train-iters", str(ITERATIONS), *flags),
    )


def test_bad_files_are_skipped_counted_and_named(folder, tmp_path):
    metrics, save = tmp_path / "metrics.jsonl", tmp_path / "save"
    done = train(folder, "--metrics-file", str(metrics), "--save", str(save))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    keys = [key for row in rows for key in row["keys"]]
    assert len(keys) == 4 * ITERATIONS
    assert all(key.startswith("good-") for key in keys)
    epochs = 4 * ITERATIONS // NUM_SAMPLES
    bad = [json.loads(line) for line in (save / "bad_samples.jsonl").read_text().splitlines()]
    assert rows[-1]["bad_samples"] == len(bad) >= epochs * len(BAD)
    assert {line["key"] for line in bad} == set(BAD)
    for line in bad:
        assert f"sample {line['key']}, {folder}/{line['key']}.png, images: " in line["reason"]
    assert f"{len(bad)} samples could not be read so far; the last: sample bad-" in done.stderr


def test_more_bad_samples_than_allowed_end_the_run(folder):
    done = train(folder, "--max-bad-samples", "1")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "--max-bad-samples 1" in last
    assert "sample bad-" in last


def test_evaluation_needs_the_validation_split(folder):
    done = train(folder, "--eval-iters", "1", "--eval-interval", "2")
    assert done.returncode == 2
    assert "heldout.jsonl: no such file" in done.stderr.splitlines()[-1]
    (folder / "heldout.jsonl").write_text((folder / "train.jsonl").read_text())
    done = train(folder, "--eval-iters", "1", "--eval-interval", "2")
    assert done.returncode == 0, done.stderr
    assert "held out after 2 iterations: lm loss" in done.stderr
