"""`prepare_data.py tokenizer`: placeholders at the model's ids, any text comes back, refusals."""

import dataclasses
import json

import pytest

from examples.mimo.checkpoint.description import DatasetModel
from examples.mimo.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from tests.helpers.commands import run_command

TEXTS = [f"What is {n} times {m}? It is {n * m}." for n in range(30) for m in range(9)]


def with_token_ids(config, **ids):
    inputs = {
        name: dataclasses.replace(config.modalities[name], token_id=ids[name])
        for name in config.inputs
    }
    return dataclasses.replace(config, modalities={**config.modalities, **inputs})


def trained(path, config, vocab_size=None):
    path.write_bytes(train_tokenizer(TEXTS, config, vocab_size))
    return SentencePieceTokenizer(path)


@pytest.mark.parametrize("ids", [(4, 5), (5, 4), (7, 310), (300, 6)])
def test_placeholders_have_the_ids_of_the_config(tiny, tmp_path, ids):
    config = with_token_ids(tiny, images=ids[0], audios=ids[1])
    tokenizer = trained(tmp_path / "t.model", config, 340)
    assert tokenizer.size == 340
    assert tokenizer.encode("<image>") == [ids[0]]
    assert tokenizer.encode("<audio>") == [ids[1]]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)
    # Words and bytes work wherever the placeholders stand, and merges shorten the text.
    for text in (TEXTS[7], "übermäßig 漢字\n\t  two  spaces", "a<image>b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(TEXTS[7])) < len(TEXTS[7]) / 2


def test_a_small_text_gives_fewer_tokens_than_the_model_holds(tiny, tmp_path):
    tokenizer = trained(tmp_path / "t.model", tiny)
    assert 266 < tokenizer.size <= tiny.language.vocab_size
    (tmp_path / "u.model").write_bytes(train_tokenizer(["ab ab"], tiny))
    assert SentencePieceTokenizer(tmp_path / "u.model").size < 280


@pytest.mark.parametrize(
    ("ids", "vocab_size", "message"),
    [
        ((3, 5), None, "<image> at token id 3; a tokenizer of 512 tokens can place it at 4 to 511"),
        ((4, 400), 300, "<audio> at token id 400; a tokenizer of 300 tokens"),
        ((4, 5), 513, "--vocab-size 513: tiny_avlm's vocabulary holds 512"),
        ((4, 5), 200, "--vocab-size 200: at least 262 are needed"),
        ((4, 5), 262, "no tokenizer of 262 tokens from this text: .*required_chars"),
    ],
)
def test_impossible_ids_and_sizes_are_refused(tiny, ids, vocab_size, message):
    config = with_token_ids(tiny, images=ids[0], audios=ids[1])
    with pytest.raises(ValueError, match=message) as error:
        train_tokenizer(TEXTS, config, vocab_size)
    assert "\n" not in str(error.value)


def test_too_little_text_for_a_high_id(tiny):
    config = with_token_ids(tiny, images=4, audios=500)
    with pytest.raises(ValueError, match=r"<audio> at token id 500, but the text gives only \d+"):
        train_tokenizer(["ab ab"], config)


def test_the_command_takes_manifests_and_text(tmp_path):
    turns = [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "m.jsonl").write_text(json.dumps({"key": "a", "conversations": turns}))
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    output = tmp_path / "data"
    flags = ("tokenizer", "--model-provider", "tiny_avlm", "--output", str(output))
    flags += ("--text", str(tmp_path / "m.jsonl"), str(tmp_path / "t.txt"))
    done = run_command("prepare_data.py", *flags)
    assert done.returncode == 0, done.stderr
    assert f"trained on {2 + len(TEXTS)} texts for tiny_avlm" in done.stderr
    tokenizer = SentencePieceTokenizer(output / "tokenizer.model")
    assert tokenizer.encode("<image>") == [4]
    assert tokenizer.decode(tokenizer.encode("A cat.")) == "A cat."
    assert DatasetModel.read(output) == DatasetModel("tiny_avlm")
    again = run_command("prepare_data.py", *flags)
    assert again.returncode == 2
    assert "tokenizer.model: exists; add --overwrite" in again.stderr
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text", "none.txt"), "--text none.txt: no such file"),
        (("--text", "README.md", "--vocab-size", "9"), "--vocab-size 9: at least 262"),
        (("--text", "README.md", "--model-provider", "nobody"), "nobody"),
    ],
)
def test_wrong_inputs_end_with_one_line(tmp_path, flags, message):
    model = () if "--model-provider" in flags else ("--model-provider", "tiny_avlm")
    output = ("--output", str(tmp_path / "out"))
    done = run_command("prepare_data.py", "tokenizer", *flags, *model, *output)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
