"""`--fresh`: a third modality is added to a trained model, whose other parts keep their weights."""

import argparse
from pathlib import Path

import pytest
import torch

from examples.mimo.checkpoint.description import TOKENIZER, TRACKER, open_checkpoint
from examples.mimo.data.tokenizer import SENTENCE_PIECE
from examples.mimo.hf.io import CheckpointReader
from examples.mimo.model.parts import part_names, part_prefix
from examples.mimo.training.inputs import tokenizer_path
from tests.helpers.commands import run_train

SHORT = ("--micro-batch-size", "1", "--global-batch-size", "2", "--eval-iters", "0")
SHORT += ("--eval-interval", "1")
# At this rate an iteration changes no weight.
STILL = ("--train-iters", "1", "--lr", "0", "--min-lr", "0")
FINETUNE = ("--load", "TRAINED", "--finetune")
WITH_DEPTH = ("--model-provider", "tests.helpers.models:with_depth")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of tiny_avlm after two iterations."""
    folder = tmp_path_factory.mktemp("fresh") / "trained"
    run = run_train(*SHORT, "--train-iters", "2", "--lr", "1e-3", "--save", str(folder))
    assert run.returncode == 0, run.stderr
    return folder


def tensors(folder, part):
    """Key -> tensor of a part in the checkpoint `folder`."""
    reader = CheckpointReader(open_checkpoint(folder).weights)
    keys = [key for key in reader.tensors if key.startswith(part_prefix(part))]
    assert keys, part
    return {key: reader.tensor(key) for key in keys}


def same(before, after):
    assert before.keys() == after.keys()
    return all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_third_modality_is_added_and_the_other_parts_keep_their_weights(trained, tmp_path, tp):
    start = ("--pretrained-checkpoint", str(trained), "--fresh", "depths")
    layout = ("--tensor-model-parallel-size", str(tp))
    save = ("--save", str(tmp_path / "more"), "--load", str(tmp_path / "more"))
    flags = (*SHORT, *WITH_DEPTH, *start, *layout, *save)
    run = run_train(*flags, *STILL, processes=tp)
    assert run.returncode == 0, run.stderr
    assert "fresh: depths.encoder starts with random weights\n" in run.stderr

    more = open_checkpoint(tmp_path / "more")
    old = part_names(open_checkpoint(trained).config)
    for part in old:
        assert same(tensors(trained, part), tensors(more.folder, part)), part
    added = [part for part in part_names(more.config) if part not in old]
    assert added == ["depths.encoder", "depths.projector"]
    depths = tensors(more.folder, "depths.encoder")
    assert any(tensor.std() > 0 for tensor in depths.values())

    # The same command goes on: now the checkpoint has the part, and it is loaded.
    longer = ("--train-iters", "2", "--override-opt_param-scheduler")
    run = run_train(*flags, *STILL[2:], *longer, processes=tp)
    assert run.returncode == 0, run.stderr
    assert "fresh:" not in run.stderr
    assert open_checkpoint(tmp_path / "more").weights.name == "iter_0000002"
    assert same(depths, tensors(tmp_path / "more", "depths.encoder"))


def test_a_part_that_the_checkpoint_has_starts_fresh_when_named(trained, tmp_path):
    flags = ("--load", str(trained), "--finetune", "--fresh", "images.projector")
    run = run_train(*SHORT, *STILL, *flags, "--save", str(tmp_path / "more"))
    assert run.returncode == 0, run.stderr
    assert f"fresh: images.projector starts with random weights, although {trained}" in run.stderr
    for part in part_names(open_checkpoint(trained).config):
        kept = same(tensors(trained, part), tensors(tmp_path / "more", part))
        assert kept == (part != "images.projector"), part


def test_weights_bring_their_tokenizer_along_unless_the_language_model_is_fresh(tmp_path):
    """A data folder made for another model has a tokenizer whose ids mean something else."""
    weights, data = tmp_path / "weights", tmp_path / "data"
    for file in (weights / TRACKER, weights / TOKENIZER / SENTENCE_PIECE, data / SENTENCE_PIECE):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    def path(fresh=(), **flags):
        given = {"tokenizer_model": None, "load": None, "pretrained_checkpoint": str(weights)}
        return tokenizer_path(
            argparse.Namespace(**{**given, "data_path": [str(data)], "fresh": fresh, **flags})
        )

    assert path() == path(fresh=("depths",)) == weights / TOKENIZER
    assert path(fresh=("language",)) == path(pretrained_checkpoint=None) == data
    assert path(tokenizer_model="mine") == Path("mine")
    (data / SENTENCE_PIECE).unlink()
    assert path(fresh=("language",)) == weights / TOKENIZER


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (*WITH_DEPTH, "--pretrained-checkpoint", "TRAINED"),
            "no depths.encoder and no depths.projector; add --fresh depths to start",
        ),
        (
            (*WITH_DEPTH, "--load", "TRAINED"),
            "no depths.encoder and no depths.projector; add --finetune --fresh depths",
        ),
        (
            (*WITH_DEPTH, "--pretrained-checkpoint", "TRAINED", "--fresh", "depths.encoder"),
            "this checkpoint has no depths.projector; add --fresh depths",
        ),
        (
            (*WITH_DEPTH, *FINETUNE, "--fresh", "depths", "--save", "TRAINED"),
            "this checkpoint has no depths.encoder and no depths.projector; name another folder",
        ),
        (("--pretrained-checkpoint", "TRAINED", "--fresh", "depths"), "--fresh depths: tiny_avlm"),
        (("--fresh", "images"), "--fresh images would do nothing here"),
        (("--load", "TRAINED", "--fresh", "images"), "--fresh images would do nothing here"),
    ],
)
def test_what_is_refused(trained, flags, message):
    flags = [str(trained) if flag == "TRAINED" else flag for flag in flags]
    run = run_train(*SHORT, *STILL, *flags)
    assert run.returncode == 2, run.stderr
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
