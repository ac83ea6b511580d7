"""A trained checkpoint, files to ask about, and the command in this process."""

import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from examples.mimo import avlm_inference
from tests.conftest import run_train
from tests.generation.served import Served


@pytest.fixture(scope="session")
def checkpoint(data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers") / "checkpoint"
    done = run_train(
        *("--tensor-model-parallel-size", "2", "--dataset-provider", "spoken_questions"),
        *("--data-path", str(data_folder), "--micro-batch-size", "8", "--global-batch-size", "8"),
        *("--lr", "2e-3", "--train-iters", "250", "--save", str(folder), "--save-interval", "250"),
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    Image.new("RGB", (40, 30), "white").save(folder / "white.png")
    (folder / "empty.png").touch()
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 16_000)
    soundfile.write(folder / "second.wav", noise, 16_000)
    soundfile.write(folder / "long.flac", np.tile(noise, 5), 16_000)
    return folder


@pytest.fixture
def ask(monkeypatch, build_model):
    """The command's main() in this process: a function of its flags."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(int(name == "WORLD_SIZE")))

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["avlm_inference.py", *flags])
        avlm_inference.main()

    return main


@pytest.fixture
def command(ask, checkpoint, capsys):
    def said(*flags):
        ask("--ckpt", str(checkpoint), *flags)
        return capsys.readouterr().out.rstrip("\n")

    return said


@pytest.fixture(scope="session")
def served(checkpoint):
    pytest.importorskip("starlette")
    server = Served(checkpoint)
    yield server
    said = server.end()
    assert said.count("\n") == 1, said
    assert "with an API key" in said
