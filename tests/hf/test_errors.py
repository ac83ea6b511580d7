"""Folders that cannot be converted end with one line before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.mimo.hf.from_hf import from_hf
from examples.mimo.hf.io import Folder
from tests.helpers.commands import run_command
from tests.hf.cases import CASES

CASE = CASES["llama"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "llama"
    CASE.build().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    shutil.copytree(good, tmp_path / "llama")
    return tmp_path / "llama"


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def missing_tensor(folder):
    change_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def wrong_shape(folder):
    change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(63)}))


def foreign_tensor(folder):
    change_tensors(folder, lambda t: t.update({"model.layers.0.experts.w": torch.ones(3)}))


def unknown_family(folder):
    change_config(folder, model_type="mamba")


def another_width(folder):
    change_config(folder, intermediate_size=256)


def another_activation(folder):
    change_config(folder, hidden_act="gelu")


def too_many_words(folder):
    change_config(folder, vocab_size=400)


def half_a_file(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def half_a_download(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    index = json.dumps({"weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def index_that_leads_outside(folder):
    index = json.dumps({"weight_map": {"model.norm.weight": "../../secret.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(index)


def pickles_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def deep_config(folder):
    (folder / "config.json").write_text("[" * 200_000)


def deep_object(folder):
    change_config(folder, extra=json.loads('{"a":' * 100 + "1" + "}" * 100))


def long_config(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "x": 2**26 * "x"}))


def config_of_bytes(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe")


def many_empty_tensors(folder):
    whole = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    tensors = json.loads(whole[8:end]) | {f"empty.{number}": empty for number in range(300_000)}
    head = json.dumps(tensors).encode()
    file = len(head).to_bytes(8, "little") + head + whole[end:]
    (folder / "model.safetensors").write_bytes(file)


def many_files(folder):
    index = json.dumps({"weight_map": {f"a.{i}": f"{i}.safetensors" for i in range(20_000)}})
    (folder / "model.safetensors.index.json").write_text(index)


def end_that_is_no_token(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 128]}')


def no_folder(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_tensor, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (wrong_shape, r"model.norm.weight has shape \(63,\), but \(64,\) is needed"),
        (foreign_tensor, "model.layers.0.experts.w has no place in a llama"),
        (unknown_family, "model type 'mamba' is none of llama, llava, mistral"),
        (another_width, "ffn_hidden_size is 256, but tiny_avlm's language has 128"),
        (another_activation, "hidden_act is 'gelu', but llama is built with 'silu'"),
        (too_many_words, "vocab_size is 400, but tiny_avlm's language has 128"),
        (half_a_file, "damaged or half downloaded"),
        (half_a_download, "1 files of the index are missing, such as model-00002"),
        (index_that_leads_outside, "lies outside the folder"),
        (pickles_only, "holds pickled .bin weights, which are not read"),
        (no_weights, "no model.safetensors in this folder"),
        (no_config, "config.json is missing"),
        (broken_config, "config.json: not JSON"),
        (deep_config, "config.json: not JSON"),
        (deep_object, "config.json: JSON of more than 64 levels"),
        (long_config, r"config.json: 67,\d{3},\d{3} bytes of JSON, more than 67,108,864"),
        (config_of_bytes, "config.json: not JSON"),
        (many_empty_tensors, "model.safetensors: 300,039 tensors, more than 200,000"),
        (many_files, "index.json: 20,000 tensors in 20,000 files, more than 200,000 in 10,000"),
        (
            end_that_is_no_token,
            r"generation_config.json: eos_token_id 128 is no token of these",
        ),
        (no_folder, "no such folder"),
    ],
)
def test_a_folder_that_is_wrong(folder, tmp_path, build_model, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        from_hf(CASE.config, {"language": Folder(folder)}, tmp_path / "o", lambda text: None)
    assert not (tmp_path / "o").exists()


def test_a_folder_with_something_in_it_is_not_overwritten(good, tmp_path, build_model):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        from_hf(CASE.config, {"language": Folder(good)}, tmp_path, lambda text: None)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("from-hf", "--model-provider", "tiny_avlm", "--save", "x"), "nothing to convert"),
        (
            ("from-hf", "--model-provider", "tiny_avlm", "--save", "x", "--image", "y"),
            "did you mean --images?",
        ),
        (
            ("from-hf", "--model-provider", "tiny_avlm", "--save", "x", "--images", "tests"),
            "tests: not a Hugging Face folder",
        ),
        (("to-hf", "--load", "tests", "--save", "x"), "mimo.json is missing"),
    ],
)
def test_the_command_ends_with_one_line(flags, message):
    done = run_command("convert.py", *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
