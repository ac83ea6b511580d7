"""A modality that only this file knows: trained in parallel, asked, exported and evaluated."""

import dataclasses
import functools
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.configs.schema import MimoConfig, ModalityConfig
from examples.mimo.configs.sensor_lm import sensor_lm
from examples.mimo.hf.io import CheckpointReader
from examples.mimo.modalities.base import EncoderConfig, MLPProjectorConfig
from examples.mimo.modalities.files import open_source
from tests.helpers import known_answers, ranks
from tests.helpers.commands import PP2, ROOT, TP2, run_command, run_train
from tests.helpers.layouts import FIRST_LOSS_BOUND, TEN_LOSSES_BOUND

PROVIDER = ("--model-provider", "tests.test_new_modality:depth_lm")
PROMPT = "How far away is it?"


@dataclass(frozen=True)
class DepthConfig(EncoderConfig):
    """Distances in metres on a grid, in a .npy file; each square of the grid is a token."""

    max_side: int
    square: int
    suffixes = (".npy",)

    @property
    def max_tokens(self):
        return (self.max_side // self.square) ** 2

    @property
    def input_size(self):
        return self.square**2

    def read(self, source):
        with open_source(source, "depth") as stream:
            raw = np.load(stream, allow_pickle=False)
        if raw.ndim != 2 or not 0 < max(raw.shape) <= self.max_side:
            raise ValueError(
                f"{source}: shape {raw.shape}, but at most {self.max_side} squared fit"
            )
        return raw.astype(np.float32)

    def patches(self, raw):
        padded = np.pad(raw, [(0, -size % self.square) for size in raw.shape])
        height, width = (size // self.square for size in padded.shape)
        squares = padded.reshape(height, self.square, width, self.square).swapaxes(1, 2)
        return [squares.reshape(-1, self.input_size)]


def depth_lm() -> MimoConfig:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128}
    depths = ModalityConfig(
        singular="depth",
        placeholder="<depth>",
        token_id=4,
        encoder=DepthConfig(**sizes, max_side=32, square=8),
        projector=MLPProjectorConfig(ffn_hidden_size=128),
    )
    return dataclasses.replace(sensor_lm(), name="depth_lm", modalities={"depths": depths})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Maps of several sizes, a manifest that asks about most of them, and a tokenizer."""
    folder = tmp_path_factory.mktemp("depth")
    generator = np.random.default_rng(0)
    with (folder / "train.jsonl").open("w") as lines:
        for number in range(24):
            distance = int(generator.integers(1, 9))
            grid = generator.normal(distance, 0.1, generator.integers(5, 33, 2))
            np.save(folder / f"{number}.npy", grid)
            shown = bool(number % 4)
            turns = [
                {"from": "human", "value": "<depth>" * shown + PROMPT},
                {"from": "gpt", "value": f"{distance} metres"},
            ]
            depths = [f"{number}.npy"] * shown
            record = {"key": str(number), "conversations": turns, "depths": depths}
            lines.write(json.dumps(record) + "\n")
    texts = ("--text", str(folder / "train.jsonl"), str(ROOT / "LICENSE"))
    done = run_command("prepare_data.py", "tokenizer", *PROVIDER, *texts, "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    """A checkpoint that answers one of a few sentences."""
    folder = tmp_path_factory.mktemp("written")
    config = dataclasses.replace(depth_lm(), name=PROVIDER[1])
    known_answers.write_checkpoint(config, data, folder)
    return folder


@pytest.fixture(scope="module")
def train(data, written, tmp_path_factory):
    """A function from flags to the losses of ten iterations, and to the folder they saved."""

    @functools.cache
    def run(*flags):
        folder = tmp_path_factory.mktemp("run")
        done = run_train(
            *(*PROVIDER, "--dataset-provider", "conversations", "--data-path", str(data)),
            *("--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "10"),
            *("--lr", "1e-3", "--load", str(written), "--finetune", "--save", str(folder)),
            *("--metrics-file", str(folder / "metrics.jsonl"), "--max-bad-samples", "0", *flags),
            processes=2 if flags else 1,
        )
        assert done.returncode == 0, done.stderr
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows], folder

    return run


@pytest.mark.parametrize("flags", [TP2, PP2], ids=["TP 2", "PP 2"])
def test_it_trains_in_parallel_as_on_one_process(train, flags):
    losses, _ = train(*flags)
    expected, _ = train()
    assert len(set(expected)) == 10
    assert losses[0] == pytest.approx(expected[0], rel=FIRST_LOSS_BOUND)
    assert losses == pytest.approx(expected, rel=TEN_LOSSES_BOUND)


def test_it_is_asked_and_evaluated(train, data, tmp_path):
    _, checkpoint = train(*TP2)
    file = data / "3.npy"
    flags = ("--ckpt", str(checkpoint), "--depth-path", str(file), "--prompt", PROMPT)
    done = run_command("avlm_inference.py", *flags, "--max-new-tokens", "32", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["answer"]

    # What the model says, whatever that is, is right, and anything else is wrong.
    (tmp_path / "3.npy").write_bytes(file.read_bytes())
    records = [
        {
            "key": text,
            "depths": ["3.npy"],
            "conversations": [
                {"from": "human", "value": f"<depth>{PROMPT}"},
                {"from": "gpt", "value": text},
            ],
        }
        for text in (answer or "nothing", "something else")
    ]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = ("--ckpt", str(checkpoint), "--data", str(tmp_path), "--splits", "heldout")
    output = tmp_path / "eval.json"
    done = ranks.run("examples/mimo/evaluate.py", *flags, "--output", str(output))
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["example"]["answer"] == answer
    scores = report["scores"]
    assert scores["heldout"]["exact_match"] == (0.5 if answer else 0)
    assert scores["heldout, depth blanked"]["samples"] == 2


def test_it_is_exported_and_read_back(train, tmp_path):
    _, checkpoint = train(*PP2)
    folders = tmp_path / "folders"
    run = ("examples/mimo/convert.py", "to-hf", "--load", str(checkpoint), "--save", str(folders))
    done = ranks.run(*run)
    assert done.returncode == 0, done.stderr
    assert "depths.encoder: no Hugging Face family describes it" in done.stderr
    again = ("--folders", str(folders), "--save", str(tmp_path / "again"))
    done = ranks.run("examples/mimo/convert.py", "from-hf", *PROVIDER, *again)
    assert done.returncode == 0, done.stderr
    assert "random weights" not in done.stderr

    before, after = (
        CheckpointReader(open_checkpoint(folder).weights)
        for folder in (checkpoint, tmp_path / "again")
    )
    assert any("depths" in key for key in after.tensors)
    for key in after.tensors:
        assert torch.equal(before.tensor(key), after.tensor(key)), key
