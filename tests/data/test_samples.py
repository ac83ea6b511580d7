import dataclasses
import json

import pytest

from examples.mimo.data.conversation import FilesInside, SampleReader
from examples.mimo.data.datasets import ConversationDataset, read_records


@pytest.fixture
def reader(tiny, tokenizer):
    return SampleReader(tiny, tokenizer, 128)


def record(**fields):
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    return {"key": "k", "images": ["a.png"], "conversations": turns, **fields}


def test_a_data_folder_that_is_none(tmp_path, reader):
    with pytest.raises(ValueError, match="no such folder"):
        ConversationDataset(tmp_path / "none", "train", reader)
    with pytest.raises(ValueError, match="no such file"):
        ConversationDataset(tmp_path, "train", reader)


def test_a_data_folder_without_samples(tmp_path, reader):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="no samples"):
        ConversationDataset(tmp_path, "train", reader)


@pytest.mark.parametrize("line", ["{", "[1]", "\xff"])
def test_a_line_that_is_no_sample_is_named(tmp_path, line):
    text = json.dumps({"key": 1}) + "\n" + line
    (tmp_path / "train.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"train.jsonl"):
        read_records(tmp_path / "train.jsonl")


def test_files_outside_the_folder_are_refused(tmp_path, reader):
    with pytest.raises(ValueError, match=r"sample k.*lies outside"):
        reader.read(record(images=["../secret.png"]), FilesInside(tmp_path))


def test_media_the_model_does_not_take_are_refused(tmp_path, reader):
    with pytest.raises(ValueError, match="sample k: holds videos, but tiny_avlm takes images"):
        reader.read(record(videos=["a.mp4"]), FilesInside(tmp_path))


def test_a_row_that_does_not_fit_names_both_numbers(data_folder, tiny, tokenizer):
    reader = SampleReader(tiny, tokenizer, 20)
    found = read_records(data_folder / "heldout.jsonl")[0]
    with pytest.raises(ValueError, match=r"\d+ tokens \(16 for images, .*--seq-length 20"):
        reader.read(found, FilesInside(data_folder))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tiny, tokenizer):
    language = dataclasses.replace(tiny.language, vocab_size=256)
    small = dataclasses.replace(tiny, language=language)
    with pytest.raises(ValueError, match=r"the tokenizer has 512 tokens, but.*256"):
        SampleReader(small, tokenizer, 128)
