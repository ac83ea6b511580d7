"""Simulated sensor readings: files, questions and a tokenizer that fit the model."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from demos.sensors.series import COUNTS, MOTIONS, draw_series, write_series
from examples.mimo.configs import MODEL_PROVIDERS
from examples.mimo.data.batch import read_records
from examples.mimo.data.tokenizer import load_tokenizer
from tests.helpers.commands import run_command


@pytest.fixture(scope="module")
def config(tiny):
    """A model of which only what the generator asks for is that of sensors."""
    sensors = dataclasses.replace(
        tiny.modalities["images"], singular="sensor", placeholder="<sensor>"
    )
    return dataclasses.replace(tiny, modalities={"sensors": sensors})


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    root = tmp_path_factory.mktemp("sensors")
    write_series(root, config, seed=0, samples=400)
    return root


def test_a_tenth_is_held_out_and_every_file_is_there(folder):
    train, heldout = (read_records(folder / f"{split}.jsonl") for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (360, 40)
    keys = [record["key"] for record in train + heldout]
    assert len(set(keys)) == 400
    for record in train + heldout:
        (file,) = record["sensors"]
        readings = np.load(folder / file, allow_pickle=False)
        assert readings.dtype == np.float32
        assert readings.shape[1] == 6
        assert 96 <= len(readings) <= 192
        assert np.isfinite(readings).all()
    assert {record["kind"] for record in heldout} == {motion.name for motion in MOTIONS}


def test_the_same_seed_writes_the_same_data(folder, config, tmp_path):
    write_series(tmp_path, config, seed=0, samples=400)
    for file in ("train.jsonl", "heldout.jsonl", "tokenizer.model", "sensors/train/00007.npy"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_answers_fit_the_motions(folder, config):
    answers = {motion.name: motion.was_done for motion in MOTIONS}
    counts = collections.Counter()
    for record in read_records(folder / "train.jsonl"):
        question, answer = (turn["value"] for turn in record["conversations"])
        assert question.startswith("<sensor>")
        counts[question] += 1
        if question.removeprefix("<sensor>") in ("What was done?", config.prompt):
            assert answer == answers[record["kind"]]
        elif question.endswith("Was it moved?"):
            assert answer == ("no" if record["kind"] == "rest" else "yes")
        else:
            assert record["kind"] in ("turn", "tap")
    assert len(counts) == 5
    # Nobody who ignores the readings gets far.
    assert max(counts.values()) < 0.75 * 360


def test_motions_differ_in_the_readings():
    generator = np.random.default_rng(1)
    motions = {motion.name: motion for motion in MOTIONS}
    for _ in range(20):
        rest, _ = draw_series(motions["rest"], generator)
        shake, _ = draw_series(motions["shake"], generator)
        turn, way = draw_series(motions["turn"], generator)
        tap, times = draw_series(motions["tap"], generator)
        spread = [readings[:, :3].std(axis=0).max() for readings in (rest, tap, shake)]
        assert spread == sorted(spread)
        # The integral of the rate about the vertical axis says which way.
        assert (turn[:, 5].sum() > 0) == (way == "to the left")
        assert np.linalg.norm(rest[:, :3].mean(axis=0)) == pytest.approx(1.0, abs=0.02)
        assert times in COUNTS
        starts = np.flatnonzero(tap[:, 2] - np.median(tap[:, 2]) > 1.0)
        assert 1 + (np.diff(starts) > 8).sum() == 1 + COUNTS.index(times)


def test_the_tokenizer_fits_the_model(folder, config):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.size <= config.language.vocab_size
    assert tokenizer.model.id_to_piece(config.modalities["sensors"].token_id) == "<sensor>"
    for record in read_records(folder / "heldout.jsonl"):
        answer = record["conversations"][1]["value"]
        assert tokenizer.decode(tokenizer.encode(answer)) == answer


def test_a_model_without_sensors_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"tiny_avlm takes images, audios, but .* of sensors"):
        write_series(tmp_path, tiny, seed=0, samples=4)


@pytest.mark.skipif("sensor_lm" not in MODEL_PROVIDERS, reason="no config takes sensor readings")
def test_the_command_and_shards_of_its_data(tmp_path):
    data, shards = tmp_path / "data", tmp_path / "shards"
    done = run_command("prepare_data.py", "sensor-series", "--output", str(data), "--samples", "60")
    assert done.returncode == 0, done.stderr
    assert json.loads((data / "about.json").read_text())["model_provider"] == "sensor_lm"
    pytest.importorskip("megatron.energon")
    manifest = ("--manifest", str(data / "train.jsonl"), "--output", str(shards))
    done = run_command("prepare_data.py", "webdataset", *manifest)
    assert done.returncode == 0, done.stderr
    assert "samples for sensor_lm in" in done.stderr
    page = tmp_path / "page.html"
    done = run_command("prepare_data.py", "show", str(shards), "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert "sensors   54" in done.stdout
    assert page.read_text().count("<section>") == 24
    # Whatever a browser can show of a series, or its size in words.
    assert page.read_text().count("<figcaption>sensors") == 24
