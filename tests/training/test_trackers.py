"""TensorBoard and Weights & Biases get all that the progress table shows, both or one alone."""

import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import ranks
from tests.helpers.commands import run_train

TRACKED_TRAIN = "tests/helpers/tracked_train.py"
ITERATIONS = 3
SHOWN = {
    *("lm loss", "learning-rate", "grad-norm", "samples per second", "tokens per second"),
    *("padding", "data wait", "bad samples", "items/images", "items/audios"),
}
HELD_OUT = {"held out/lm loss", "held out/exact match"}
FLAGS = (
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", str(ITERATIONS)),
    *("--eval-iters", "1", "--eval-interval", "2", "--lr", "1e-4", "--log-interval", "1"),
)


@pytest.fixture
def wandb(tmp_path):
    """Flags for a wandb that writes to a file, and what reads the file."""

    def read():
        first, *lines = map(json.loads, (tmp_path / "log").read_text().splitlines())
        assert first == {"project": "p", "name": "n"}
        values = {}
        for line in lines:
            step = line.pop("step")
            for name, value in line.items():
                assert (name, step) not in values, "written twice"
                values[name, step] = value
        return values

    return (
        "--wandb-project",
        "p",
        "--wandb-exp-name",
        "n",
        "--wandb-save-dir",
        str(tmp_path),
    ), read


def check(values, stderr):
    """The values are there once for each step, and are those of the table."""
    steps = range(1, ITERATIONS + 1)
    assert {(name, step) for name in SHOWN for step in steps} <= values.keys()
    assert {(name, step) for name in HELD_OUT for step in (2, 3)} <= values.keys()
    rows = re.findall(rf"^ *(\d)/{ITERATIONS} +([\d.]+) +([\d.]+) ", stderr, re.MULTILINE)
    assert len(rows) == ITERATIONS
    for step, loss, grad_norm in rows:
        assert values["lm loss", int(step)] == pytest.approx(float(loss), abs=1e-4)
        assert values["grad-norm", int(step)] == pytest.approx(float(grad_norm), abs=1e-3)
    loss = re.findall(r"held out after 2 iterations: lm loss ([\d.]+)", stderr)
    assert values["held out/lm loss", 2] == pytest.approx(float(loss[0]), abs=1e-4)
    assert 0 <= values["padding", 1] < 1
    assert values["samples per second", 1] > 0


def test_wandb_alone_gets_everything(wandb, tmp_path):
    flags, read = wandb
    done = ranks.run(TRACKED_TRAIN, str(tmp_path / "log"), *FLAGS, *flags)
    assert done.returncode == 0, done.stderr
    check(read(), done.stderr)


def test_both_get_everything_where_the_last_rank_holds_an_encoder(wandb, tmp_path):
    """Both are opened on the last rank, which knows no loss there."""
    flags, read = wandb
    encoders = ("--encoder-ranks", "images=2", "audios=1")
    board = ("--tensorboard-dir", str(tmp_path / "board"))
    command = (TRACKED_TRAIN, str(tmp_path / "log"), *FLAGS, *flags, *board, *encoders)
    done = ranks.run(*command, processes=3)
    assert done.returncode == 0, done.stderr
    check(read(), done.stderr)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    scalars = {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    check(scalars, done.stderr)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--save", "s"), "needs --wandb-exp-name NAME"),
        (("--wandb-exp-name", "n"), "needs a folder: add --save or --wandb-save-dir"),
    ],
)
def test_an_incomplete_command_is_refused_before_anything_is_loaded(flags, message, tmp_path):
    done = run_train(*FLAGS, "--wandb-project", "p", *flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"error: --wandb-project p {message}")
