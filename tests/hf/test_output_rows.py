"""Rows of codes come back equal, and an original without them gets some."""

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.checkpoint.loading import load_weights
from examples.mimo.configs import with_codec_folder
from examples.mimo.hf.from_hf import from_hf
from examples.mimo.hf.io import Folder
from examples.mimo.training.inputs import MockDataset
from tests.helpers import outputs
from tests.helpers.commands import run_command, run_train
from tests.hf.test_round_trip import assert_same, model_tensors

PROVIDER = ("--model-provider", outputs.SPEECH)
TABLES = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


@pytest.fixture(scope="module")
def trained(data_folder, tmp_path_factory):
    """A model that answers aloud after two iterations, with its codec."""
    folder = tmp_path_factory.mktemp("trained")
    outputs.write_data(folder)
    (folder / "tokenizer.model").write_bytes((data_folder / "tokenizer.model").read_bytes())
    data = ("--dataset-provider", "conversations", "--data-path", str(folder))
    sizes = ("--train-iters", "2", "--lr", "1e-2")
    run = run_train(*PROVIDER, *data, *sizes, "--save", str(folder / "checkpoint"))
    assert run.returncode == 0, run.stderr
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folders = tmp_path_factory.mktemp("exported") / "folders"
    run = run_command("convert.py", "to-hf", "--load", str(trained), "--save", str(folders))
    assert run.returncode == 0, run.stderr
    return folders


def test_all_rows_come_back_bit_equal(trained, exported, tmp_path):
    flags = ("--folders", str(exported), "--save", str(tmp_path / "again"))
    run = run_command("convert.py", "from-hf", *PROVIDER, *flags)
    assert run.returncode == 0, run.stderr
    assert "random weights" not in run.stderr
    before = model_tensors(trained)
    assert [before[table].shape[0] for table in TABLES] == [640, 640]
    assert_same(before, model_tensors(tmp_path / "again"))
    again = open_checkpoint(tmp_path / "again", verify=True).config.outputs["speech"].codec
    assert again.scale == 0.5


def test_transformers_says_the_same_codes(trained, exported, build_model):
    """Its config names the ids, and its logits are ours, those of codes included."""
    described = json.loads((exported / "language/config.json").read_text())
    assert described["vocab_size"] == 640
    assert described["mimo_outputs"] == {"speech": [512, 513, 514, 16]}
    theirs = hf.AutoModelForCausalLM.from_pretrained(exported / "language").eval()
    checkpoint = open_checkpoint(trained)
    ours = build_model(checkpoint.config).eval()
    load_weights(ours, checkpoint)
    samples = (MockDataset(checkpoint.config, 64, 20, seed=2)[number] for number in range(20))
    sample = next(sample for sample in samples if sample.outputs and not sample.media)
    ids = torch.tensor([sample.tokens.ids])
    assert ids.max() > 512
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours(ids)
    assert logits.shape == (*ids.shape, 640)
    assert (logits - expected).abs().max() < 1e-5


def test_an_original_without_codes_gets_rows_for_them(exported, tmp_path, build_model):
    """They start as the mean of its own, which keep their places."""
    plain = shutil.copytree(exported / "language", tmp_path / "plain")
    model = hf.AutoModelForCausalLM.from_pretrained(plain)
    model.resize_token_embeddings(500)
    del model.config.mimo_outputs
    model.save_pretrained(plain)
    table = load_file(plain / "model.safetensors")["model.embed_tokens.weight"]
    from_hf(
        outputs.with_speech(), {"language": Folder(plain)}, tmp_path / "ours", lambda text: None
    )
    rows = model_tensors(tmp_path / "ours")[TABLES[0]]
    assert torch.equal(rows[:500], table)
    assert torch.allclose(rows[500:], table.mean(0).expand(140, -1))


def change(folders, **values):
    file = folders / "language/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mimo_outputs": {}}, "vocab_size is 640, but .*:with_speech's language has 512 for text"),
        (
            {"mimo_outputs": {"speech": [512, 513, 514, 99]}},
            r"mimo_outputs is {'speech': \[512, 513, 514, 99\]}, but .* has {'speech': \[512, 513",
        ),
        ({"mimo_outputs": "speech"}, "mimo_outputs is speech, but"),
    ],
)
def test_other_ids_are_one_line(exported, tmp_path, build_model, values, message):
    folders = shutil.copytree(exported, tmp_path / "folders")
    change(folders, **values)
    language = {"language": Folder(folders / "language")}
    with pytest.raises(ValueError, match=message) as error:
        from_hf(outputs.with_speech(), language, tmp_path / "ours", lambda text: None)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folders"]


def test_a_model_without_outputs_refuses_the_rows(exported, tmp_path, tiny, build_model):
    language = {"language": Folder(exported / "language")}
    with pytest.raises(ValueError, match=r"mimo_outputs is .*, but tiny_avlm has none"):
        from_hf(tiny, language, tmp_path / "ours", lambda text: None)


def test_codecs_come_from_a_folder(exported, tmp_path):
    outputs.write_codec(tmp_path / "data")
    flags = ("from-hf", *PROVIDER, "--language-model", str(exported / "language"))
    flags += ("--save", str(tmp_path / "ours"), "--codecs")
    wrong = run_command("convert.py", *flags, str(exported / "language"))
    assert wrong.returncode == 2
    assert "scale.json: no such file, but speech need it; tests write it" in wrong.stderr
    run = run_command("convert.py", *flags, str(tmp_path / "data"))
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "ours/codecs/speech/scale.json").is_file()
    config = open_checkpoint(tmp_path / "ours").config
    assert config == with_codec_folder(outputs.with_speech(), tmp_path)
