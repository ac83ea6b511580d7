"""Training of a model that answers aloud: its codec in the checkpoint, resumed, and refused."""

import json
import re
import shutil

import pytest

from examples.mimo.checkpoint.description import open_checkpoint
from tests.helpers import outputs
from tests.helpers.commands import PP2, TP2, run_command, run_train

PROVIDER = ("--model-provider", outputs.SPEECH)
SCALE = "codecs/speech/scale.json"


@pytest.fixture(scope="module")
def aloud(data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aloud")
    outputs.write_data(folder)
    (folder / "tokenizer.model").write_bytes((data_folder / "tokenizer.model").read_bytes())
    return folder


def train(data, work, *more, processes=1):
    return run_train(
        *(*PROVIDER, "--dataset-provider", "conversations", "--data-path", str(data)),
        *("--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-3"),
        *("--train-iters", "6", "--save-interval", "3", "--save", str(work / "checkpoint")),
        *("--metrics-file", str(work / "metrics.jsonl"), *more),
        processes=processes,
    )


def losses(work):
    rows = map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
    return {row["iteration"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def trained(aloud, tmp_path_factory):
    work = tmp_path_factory.mktemp("trained")
    evaluated = ("--valid-split", "train", "--eval-iters", "1", "--eval-interval", "6")
    done = train(aloud, work, *evaluated)
    assert done.returncode == 0, done.stderr
    return work


def test_the_codec_travels_in_the_checkpoint(trained, aloud):
    folder = trained / "checkpoint"
    assert (folder / SCALE).read_bytes() == (aloud / SCALE).read_bytes()
    description = json.loads((folder / "mimo.json").read_text())
    assert description["config"]["modalities"]["speech"]["codec"]["base"] == 8
    assert list(description["codecs"]) == ["speech/scale.json"]
    checkpoint = open_checkpoint(folder, verify=True)
    codec = checkpoint.config.outputs["speech"].codec
    assert codec.folder == str(folder / "codecs/speech")
    assert codec.scale == 0.5


@pytest.mark.parametrize("layout", [(), TP2, PP2], ids=["alone", "TP 2", "PP 2"])
def test_a_run_goes_on_with_the_same_losses(trained, aloud, tmp_path, layout):
    shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").write_text("3")
    load = ("--load", str(tmp_path / "checkpoint"))
    done = train(aloud, tmp_path, *load, *layout, processes=2 if layout else 1)
    assert done.returncode == 0, done.stderr
    expected = {number: loss for number, loss in losses(trained).items() if number > 3}
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)


def test_trained_weights_keep_their_codec(trained, aloud, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(aloud, data)
    (data / SCALE).write_text('{"scale": 0.1}')
    start = ("--pretrained-checkpoint", str(trained / "checkpoint"), "--train-iters", "3")
    for fresh, scale in ((), 0.5), (("--fresh", "language"), 0.1):
        work = tmp_path / str(scale)
        done = train(data, work, *start, *fresh)
        assert done.returncode == 0, done.stderr
        assert json.loads((work / "checkpoint" / SCALE).read_text()) == {"scale": scale}


def lose(folder):
    shutil.rmtree(folder / "codecs")


def change(folder):
    (folder / SCALE).write_text('{"scale": 2.0}')


def forget(folder):
    """A codec that was never there, as after a run on mock data."""
    lose(folder)
    text = (folder / "mimo.json").read_text()
    description = json.loads(text)
    del description["codecs"], description["sha256"]
    (folder / "mimo.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        (lose, (), "codecs/speech/scale.json is missing"),
        (lose, ("--no-verify-integrity",), "scale.json: no such file, but speech need it; tests"),
        (change, (), "codecs/speech/scale.json is not what was saved"),
        (forget, (), "scale.json: no such file, but speech need it; tests write it"),
    ],
)
def test_a_checkpoint_without_its_codec_is_one_line(trained, tmp_path, damage, flags, message):
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained / "checkpoint", folder)
    damage(folder)
    done = run_command("avlm_inference.py", "--ckpt", str(folder), "--prompt", "What?", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_data_without_the_codec_are_one_line(aloud, tmp_path):
    shutil.copytree(aloud, tmp_path / "data")
    lose(tmp_path / "data")
    done = train(tmp_path / "data", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path}/data/{SCALE}: no such file, but speech need it; tests write" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "checkpoint").exists()


def test_a_model_without_outputs_refuses_the_data(aloud, tmp_path):
    done = train(aloud, tmp_path, "--model-provider", "tiny_avlm")
    assert done.returncode == 2
    assert "holds speech, but tiny_avlm takes images, audios; choose another model" in done.stderr


def test_a_table_without_the_codes_is_one_line(aloud, tmp_path):
    plain = tmp_path / "plain"
    done = run_train("--train-iters", "1", "--save", str(plain))
    assert done.returncode == 0, done.stderr
    done = train(aloud, tmp_path, "--pretrained-checkpoint", str(plain))
    assert done.returncode == 2
    assert "this checkpoint's vocabulary has no codes of speech; export it" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_dry_run_counts_the_rows_of_codes():
    """128 rows more, in the embedding and in the head."""
    counts = {}
    for name in ("tiny_avlm", outputs.SPEECH):
        done = run_command("train.py", "--model-provider", name, "--dry-run", "2", *TP2)
        assert done.returncode == 0, done.stderr
        (count,) = re.findall(r"^  language +yes +([\d,]+)", done.stdout, re.MULTILINE)
        head = re.search(r"head (-?\d+) %", done.stdout)
        counts[name] = int(count.replace(",", "")), int(head[1])
    (plain, plain_head), (aloud, head) = counts.values()
    assert aloud - plain == 2 * 128 * 128
    assert head >= plain_head
