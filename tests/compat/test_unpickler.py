"""A checkpoint from a stranger cannot run code, and every real one loads."""

import argparse
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.enums import ModelType
from torch.distributed.checkpoint import FileSystemReader

from examples.mimo.checkpoint.description import latest_weights
from examples.mimo.checkpoint.loading import CHECKPOINT_ERRORS, reason
from tests.helpers import payloads, ranks
from tests.helpers.commands import TP2, run_command, run_train

SHAPES = list(payloads.shapes("marker"))
REFUSED = (*CHECKPOINT_ERRORS, ValueError)
SHORT = ("--train-iters", "1", "--micro-batch-size", "1", "--save-interval", "1")


@pytest.fixture(scope="module")
def checkpoint(data_folder, tmp_path_factory):
    """A real checkpoint of one iteration, with a tokenizer."""
    folder = tmp_path_factory.mktemp("real") / "checkpoint"
    data = ("--dataset-provider", "spoken_questions", "--data-path", str(data_folder))
    done = run_train(*SHORT, *data, "--save", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def weights(checkpoint):
    return latest_weights(checkpoint)


def load_objects(folder):
    """Every object of a checkpoint, as Megatron loads those it knows."""
    metadata = FileSystemReader(folder).read_metadata()
    objects = {
        name: io.BytesIO()
        for name, item in metadata.state_dict_metadata.items()
        if type(item).__name__ == "BytesStorageMetadata"
    }
    reader = FileSystemReader(folder)
    torch.distributed.checkpoint.load(objects, storage_reader=reader, no_dist=True)
    return objects


def load_whole(folder):
    """What any command could load of a checkpoint."""
    return load_objects(folder), dist_checkpointing.load_common_state_dict(str(folder))


def test_a_payload_runs_without_the_restriction(weights, tmp_path):
    """The payloads are real: in a process with torch alone, each of them runs."""
    for shape in SHAPES:
        opcodes = payloads.shapes(tmp_path / f"{shape} ran".replace(" ", "-"))[shape]
        payloads.hide(weights, tmp_path / shape, ".metadata", opcodes)
    code = "import pickle, sys, torch; [pickle.load(open(f, 'rb')) for f in sys.argv[1:]]"
    files = [str(tmp_path / shape / ".metadata") for shape in SHAPES]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    for shape in SHAPES:
        assert (tmp_path / f"{shape} ran".replace(" ", "-")).exists(), shape


@pytest.mark.parametrize("place", payloads.PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_payload_is_refused_by_the_name_of_its_class(shape, place, weights, tmp_path):
    marker = tmp_path / "marker"
    payloads.hide(weights, tmp_path / "iter", place, payloads.shapes(marker)[shape])
    with pytest.raises(REFUSED) as refusal:
        load_whole(tmp_path / "iter")
    assert not marker.exists()
    message = reason(refusal.value)
    assert "could run code; nothing was loaded" in message
    name = {"build": "functools.partial", "getattr": "getattr", "reduce": "os.system"}.get(
        shape, ""
    )
    assert name in message


LAYOUTS = {
    "TP 2, distributed optimizer": (2, (*TP2, "--use-distributed-optimizer")),
    "asynchronous": (1, ("--async-save", "--ckpt-fully-parallel-save")),
    "non-colocated encoders": (3, ("--encoder-ranks", "images=0", "audios=1")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_object_of_our_checkpoints_loads(layout, tmp_path):
    processes, flags = LAYOUTS[layout]
    done = run_train(*SHORT, *flags, "--save", str(tmp_path), processes=processes)
    assert done.returncode == 0, done.stderr
    objects, common = load_whole(latest_weights(tmp_path))
    assert common["iteration"] == 1
    assert isinstance(common["args"], argparse.Namespace)
    assert sum("rng_state" in name for name in objects) == (1 if processes == 1 else processes)


@pytest.mark.parametrize("with_common_file", [False, True])
def test_checkpoints_of_plain_megatron_load(with_common_file, build_model, tmp_path):
    """Weights, FP8 scales, random states and arguments, as Megatron-LM saves them."""
    random_states = {
        "random_rng_state": (3, (1, 2, 3), None),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    scales = io.BytesIO(b"scales")
    state = {
        "weight": ShardedTensor.from_rank_offsets("decoder.weight", torch.arange(6.0)),
        "scales": ShardedObject("decoder._extra_state", scales, (1,), (0,)),
        "rng_state": ShardedObject("rng_state", [random_states], (1,), (0,)),
        "args": argparse.Namespace(model_type=ModelType.encoder_or_decoder, dtype=torch.bfloat16),
        "iteration": 7,
    }
    dist_checkpointing.save(state, str(tmp_path))
    if with_common_file:
        # As before Megatron-Core 0.17.
        torch.save({"args": state["args"], "iteration": 7}, tmp_path / "common.pt")
    objects, common = load_whole(tmp_path)
    assert common["args"].model_type == ModelType.encoder_or_decoder
    assert common["iteration"] == 7
    (loaded,) = (value for name, value in objects.items() if name.startswith("rng_state"))
    assert torch.equal(loaded[0][0]["torch_rng_state"], random_states["torch_rng_state"])
    (loaded,) = (value for name, value in objects.items() if "_extra_state" in name)
    assert loaded[0].getvalue() == b"scales"


def test_a_place_outside_the_checkpoint_is_refused(weights, tmp_path):
    for place in ("/dev/zero", "../secret", "..", ""):
        metadata = FileSystemReader(weights).read_metadata()
        next(iter(metadata.storage_data.values())).relative_path = place
        (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match=r"names the file .*, outside the checkpoint"):
            FileSystemReader(tmp_path).read_metadata()
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    with pytest.raises(ValueError, match=r"\.metadata holds dict, not Metadata"):
        FileSystemReader(tmp_path).read_metadata()


COMMANDS = {
    "avlm_inference.py": ("--ckpt", "{}", "--prompt", "Which digit is this?"),
    "serve.py": ("--ckpt", "{}", "--port", "{port}"),
    "evaluate.py": ("--ckpt", "{}", "--data", "{data}"),
    "train.py": (*SHORT, "--load", "{}"),
    "convert.py": ("to-hf", "--load", "{}", "--save", "{out}"),
}


def run_on(command, checkpoint, data_folder, output):
    """The command on a stranger's checkpoint, whose weights are in `release`."""
    names = {"data": data_folder, "out": output, "port": ranks.free_port()}
    flags = [flag.replace("{}", str(checkpoint)).format(**names) for flag in COMMANDS[command]]
    return run_command(command, *flags)


def strange_checkpoint(checkpoint, folder, place, shape, marker):
    folder.mkdir()
    for name in ("mimo.json", "latest_checkpointed_iteration.txt"):
        (folder / name).write_text((checkpoint / name).read_text())
    (folder / "tokenizer").symlink_to(checkpoint / "tokenizer")
    weights = latest_weights(checkpoint)
    payloads.hide(weights, folder / weights.name, place, payloads.shapes(marker)[shape])


def assert_refuses(command, place, shape, checkpoint, data_folder, tmp_path):
    strange, marker = tmp_path / f"{place}-{shape}", tmp_path / "marker"
    strange_checkpoint(checkpoint, strange, place, shape, marker)
    done = run_on(command, strange, data_folder, tmp_path / "out")
    assert not marker.exists()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "could run code; nothing was loaded" in done.stderr
    assert len(done.stderr.splitlines()[-1]) < 400


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_a_payload_in_one_line(command, checkpoint, data_folder, tmp_path):
    assert_refuses(command, ".metadata", "reduce", checkpoint, data_folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_commands_refuse_every_payload(shape, command, checkpoint, data_folder, tmp_path):
    for place in (".metadata", "common_state"):
        if command == "train.py" or place == ".metadata":
            assert_refuses(command, place, shape, checkpoint, data_folder, tmp_path)
