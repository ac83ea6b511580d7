"""A checkpoint whose answers are known, files to ask about, and the command in this process."""

import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from examples.mimo import Mimo, avlm_inference
from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.configs import get_model_config, with_codec_folder
from tests.helpers import known_answers, outputs
from tests.helpers.commands import run_train
from tests.helpers.served import InProcess, Served


@pytest.fixture(scope="session")
def checkpoint(data_folder, tiny, build_model, tmp_path_factory):
    """Known answers, saved by `train.py` at TP 2 after an iteration that changes nothing."""
    folder = tmp_path_factory.mktemp("answers")
    known_answers.write_checkpoint(tiny, data_folder, folder / "written")
    done = run_train(
        *("--tensor-model-parallel-size", "2", "--dataset-provider", "spoken_questions"),
        *("--data-path", str(data_folder), "--load", str(folder / "written"), "--finetune"),
        *("--train-iters", "1", "--lr", "0", "--save", str(folder / "saved")),
        *("--save-interval", "1"),
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    return folder / "saved"


@pytest.fixture(scope="session")
def aloud(data_folder, tmp_path_factory, build_model):
    """Known answers with an output behind the text, as they were written."""
    folder = tmp_path_factory.mktemp("aloud")
    outputs.write_codec(folder)
    config = with_codec_folder(get_model_config(outputs.SPEECH), folder)
    known_answers.write_checkpoint(config, data_folder, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="session")
def sentences(data_folder):
    """All that the model of `checkpoint` ever answers when it is greedy."""
    return known_answers.sentences(data_folder)


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
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)

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


@pytest.fixture(scope="module")
def speaking(aloud, build_model):
    """A server in this process of a model that answers aloud."""
    pytest.importorskip("starlette")
    server = InProcess(Mimo(open_checkpoint(aloud)))
    yield server
    server.end()
