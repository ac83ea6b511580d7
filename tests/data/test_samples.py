"""Records become samples, or errors of one line that name the sample and the reason."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.mimo.configs import MODEL_PROVIDERS, get_model_config
from examples.mimo.data.batch import ConversationDataset, read_records
from examples.mimo.data.conversation import SampleEncoder
from examples.mimo.data.tokenizer import load_tokenizer
from examples.mimo.data.turns import FilesInside
from examples.mimo.modalities.files import Blob

ANSWER = {"from": "gpt", "value": "a"}


@pytest.fixture
def encoder(tiny, tokenizer):
    return SampleEncoder(tiny, tokenizer, 128)


@pytest.fixture
def folder(tmp_path):
    """A data folder with the picture a.png and no samples."""
    Image.new("RGB", (32, 32), (200, 0, 0)).save(tmp_path / "a.png")
    return tmp_path


def record(**fields):
    turns = [{"from": "human", "value": "<image>q"}, ANSWER]
    return {"key": "k", "images": ["a.png"], "conversations": turns, **fields}


def nameless(**fields):
    return {name: value for name, value in record(**fields).items() if name != "key"}


def write(folder, *records, split="train"):
    lines = [json.dumps(fields) + "\n" for fields in records]
    (folder / f"{split}.jsonl").write_text("".join(lines))


def test_a_data_folder_that_is_missing(tmp_path, encoder):
    with pytest.raises(ValueError, match="no such folder"):
        ConversationDataset(tmp_path / "none", "train", encoder)
    with pytest.raises(ValueError, match="no such file"):
        ConversationDataset(tmp_path, "train", encoder)


def test_a_data_folder_without_samples(tmp_path, encoder):
    write(tmp_path)
    with pytest.raises(ValueError, match="no samples"):
        ConversationDataset(tmp_path, "train", encoder)


@pytest.mark.parametrize("line", ["{", "[1]", "\xff"])
def test_a_line_that_is_no_sample_is_named(tmp_path, line):
    text = json.dumps({"key": 1}) + "\n" + line
    (tmp_path / "train.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"train.jsonl"):
        read_records(tmp_path / "train.jsonl")


def test_encode_takes_names_and_sources(folder, encoder):
    named = encoder.encode(record(), FilesInside(folder))
    blob = Blob("a part of a shard", (folder / "a.png").read_bytes())
    for item in (folder / "a.png", blob):
        sample = encoder.encode(record(images=[item]), None)
        assert sample.tokens == named.tokens
        assert sample.sources == {"images": [str(item)]}


def test_encode_takes_a_question_without_an_answer(folder, encoder):
    question = record(conversations=[{"role": "user", "content": "<image>q"}])
    sample = encoder.encode(question, FilesInside(folder))
    whole = encoder.encode(record(), FilesInside(folder))
    assert not any(sample.tokens.loss_mask)
    assert whole.tokens.ids[: len(sample.tokens.ids)] == sample.tokens.ids


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": ["../secret.png"]}, "sample k: .*lies outside"),
        ({"images": "a.png"}, "sample k: images must be a list of file names, not 'a.png'"),
        ({"images": [7]}, r"sample k: images must be a list of file names, not \[7\]"),
        ({"videos": ["a.mp4"]}, "sample k: holds videos, but tiny_avlm takes images"),
        ({"conversations": None}, "sample k: conversations must be a list of turns"),
        ({"conversations": [{"from": "dog", "value": "w"}]}, "sample k: a turn is from 'dog'"),
        ({"images": []}, "sample k: 1 <image> in the text, but 0 image files"),
        ({"conversations": [{"from": "user", "value": "<image>\ud800"}]}, "sample k: .*half"),
        ({"key": 7, "images": ["b.png"]}, r"sample 7, .*/b\.png, images: no such"),
    ],
)
def test_what_is_wrong_with_a_sample_is_named(folder, encoder, fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        encoder.encode(record(**fields), FilesInside(folder))


def test_a_record_without_a_key_is_called_as_the_caller_says(folder, encoder):
    with pytest.raises(ValueError, match=r"^the prompt: 1 <image>"):
        encoder.encode(nameless(images=[]), FilesInside(folder))
    with pytest.raises(ValueError, match=r"^line 3, .*/b\.png, images: no such"):
        encoder.encode(nameless(images=["b.png"]), FilesInside(folder), name="line 3")
    assert encoder.encode(nameless(), FilesInside(folder), name="line 3").key == "line 3"


def failing(tiny, method, error):
    """The tiny model with an image encoder whose `method` raises `error`."""
    modality = tiny.modalities["images"]

    def fail(self, *_):
        raise error

    kind = type("Failing", (type(modality.encoder),), {method: fail})
    fields = {f.name: getattr(modality.encoder, f.name) for f in dataclasses.fields(kind)}
    images = dataclasses.replace(modality, encoder=kind(**fields))
    return dataclasses.replace(tiny, modalities={**tiny.modalities, "images": images})


@pytest.mark.parametrize("method", ["read", "preprocess", "num_tokens", "augment"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no header"), "no header"),
        (TypeError("not a\n  number"), "TypeError: not a number"),
        (IndexError(4), "IndexError: 4"),
        (KeyError("rate"), "KeyError: 'rate'"),
        (OSError(5, "Input/output error"), "OSError: .*Input/output error"),
        (ZeroDivisionError(), "ZeroDivisionError:"),
    ],
)
def test_any_error_of_a_modality_names_sample_file_and_modality(
    folder, tiny, tokenizer, method, error, reason
):
    encoder = SampleEncoder(failing(tiny, method, error), tokenizer, 128, augment=True)
    with pytest.raises(ValueError, match=rf"^sample k, {folder}/a\.png, images: {reason}"):
        encoder.encode(record(), FilesInside(folder), np.random.default_rng(0))


def test_an_error_of_a_blanked_modality_is_named(folder, tiny, tokenizer):
    config = failing(tiny, "blank", AttributeError("shape"))
    encoder = SampleEncoder(config, tokenizer, 128, blank=["images"])
    with pytest.raises(ValueError, match=r"^sample k, .*a\.png, images: AttributeError: shape"):
        encoder.encode(record(), FilesInside(folder))


def test_a_sample_that_does_not_fit_names_both_numbers(data_folder, tiny, tokenizer):
    encoder = SampleEncoder(tiny, tokenizer, 20)
    first = read_records(data_folder / "heldout.jsonl")[0]
    message = r"30 tokens \(16 for images, 14 for audios\) do not fit a sequence of 20; .* --seq-"
    with pytest.raises(ValueError, match=message):
        encoder.encode(first, FilesInside(data_folder))


def test_no_more_items_are_read_than_fit(folder, tiny, tokenizer):
    encoder = SampleEncoder(tiny, tokenizer, 20)
    turns = [{"from": "human", "value": "<image><image><image>"}]
    late = record(images=["a.png", "a.png", "missing.png"], conversations=turns)
    with pytest.raises(ValueError, match=r"^sample k: 32 tokens \(32 for images\)"):
        encoder.encode(late, FilesInside(folder))


def test_bad_samples_are_skipped_and_named(folder, encoder):
    broken = record(key="broken", images=["none.png"])
    write(folder, record(key="first"), broken, nameless(images=[]), record(key="last"))
    dataset = ConversationDataset(folder, "train", encoder, 8, max_bad_samples=2)
    samples = [dataset[i] for i in range(8)]
    assert [sample.key for sample in samples] == ["first", "last", "last", "last"] * 2
    skipped = [[bad.key for bad in sample.skipped] for sample in samples[:4]]
    assert skipped == [[], ["broken", "train.jsonl, line 3"], ["train.jsonl, line 3"], []]
    assert samples[1].skipped[0].reason.endswith("none.png, images: no such image file")
    assert samples[1].skipped[1].reason.startswith("train.jsonl, line 3: 1 <image> in the text")


@pytest.mark.parametrize(("limit", "count"), [(0, 1), (1, 2), (2, 3), (99, 3)])
def test_too_many_bad_samples_in_a_row_end_the_reading(folder, encoder, limit, count):
    write(folder, *(record(key=key, images=["none.png"]) for key in "abc"))
    dataset = ConversationDataset(folder, "train", encoder, max_bad_samples=limit)
    message = rf"; with it {count} samples of .* in a row .*\(--max-bad-samples {limit}\)$"
    with pytest.raises(ValueError, match=f"^sample {'abc'[count - 1]}, .*{message}"):
        dataset[0]


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tiny, tokenizer):
    language = dataclasses.replace(tiny.language, vocab_size=256)
    small = dataclasses.replace(tiny, language=language)
    with pytest.raises(ValueError, match=r"the tokenizer has 512 tokens, but.*256"):
        SampleEncoder(small, tokenizer, 128)


def with_token_id(config, name, token_id):
    modality = dataclasses.replace(config.modalities[name], token_id=token_id)
    return dataclasses.replace(config, modalities={**config.modalities, name: modality})


def test_no_ordinary_word_of_the_tokenizer_is_a_placeholder(tiny, tokenizer):
    words = sorted({*tokenizer.encode("Is it seven, or nine?"), *tokenizer.encode("ñ x")})
    assert len(words) > 5
    for token_id in words:
        with pytest.raises(ValueError, match=f"token id {token_id} of <image> is the ordinary"):
            SampleEncoder(with_token_id(tiny, "images", token_id), tokenizer, 128)


def test_the_begin_and_end_tokens_are_no_placeholders(tiny, tokenizer):
    for token_id in (tokenizer.bos_id, tokenizer.eos_id):
        with pytest.raises(ValueError, match=rf"token id {token_id} of <image> is the token that"):
            SampleEncoder(with_token_id(tiny, "images", token_id), tokenizer, 128)


def test_an_id_that_no_text_gives_may_be_a_placeholder(tiny, tokenizer):
    language = dataclasses.replace(tiny.language, vocab_size=tokenizer.size + 8)
    larger = dataclasses.replace(tiny, language=language)
    text = {"conversations": [{"from": "human", "value": "Is it seven, or nine?"}]}
    ids = SampleEncoder(larger, tokenizer, 128).encode(text, Path).tokens.ids
    for token_id in (4, tokenizer.size, tokenizer.size + 7):
        encoder = SampleEncoder(with_token_id(larger, "images", token_id), tokenizer, 128)
        # What people write is not touched by the choice.
        assert encoder.encode(text, Path).tokens.ids == ids
        assert token_id not in ids


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """A Hugging Face tokenizer of bytes with special and other added tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|unused|>"]
    )
    model.train_from_iterator(["the cat and the dog and the bird"] * 3, trainer)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>")
    whole.add_tokens(["<image>", "dog"])
    folder = tmp_path_factory.mktemp("tokenizer")
    whole.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "ordinary"),
    [("<image>", False), ("<|unused|>", False), ("dog", True), (" the", True), ("\u00f1", True)],
)
def test_tokens_of_a_hugging_face_tokenizer(tiny, byte_tokenizer, text, ordinary):
    config = with_token_id(tiny, "audios", 511)
    config = with_token_id(config, "images", byte_tokenizer.encode(text)[0])
    if not ordinary:
        SampleEncoder(config, byte_tokenizer, 128)
        return
    with pytest.raises(ValueError, match="of <image> is the ordinary token"):
        SampleEncoder(config, byte_tokenizer, 128)


def test_a_byte_that_no_utf8_text_holds_is_free_and_the_refusal_names_one(tiny, tokenizer):
    """The demo's tokenizer leaves no id unused, but 13 byte tokens can never occur."""
    byte = tokenizer.model.piece_to_id("<0xFF>")
    SampleEncoder(with_token_id(tiny, "images", byte), tokenizer, 128)
    accent = tokenizer.model.piece_to_id("<0xC3>")
    with pytest.raises(ValueError, match="choose an unused id, such as") as refusal:
        SampleEncoder(with_token_id(tiny, "images", accent), tokenizer, 128)
    named = int(re.search("such as ([0-9]+)", str(refusal.value))[1])
    SampleEncoder(with_token_id(tiny, "images", named), tokenizer, 128)


@pytest.mark.parametrize("name", MODEL_PROVIDERS)
def test_placeholders_of_shipped_models_fit_a_tokenizer_that_ends_before_them(
    name, tokenizer, byte_tokenizer
):
    """Those of tiny_avlm are tokens of its own tokenizer, the others come after the words."""
    config = get_model_config(name)
    inputs = {name: config.modalities[name] for name in config.inputs}
    config = dataclasses.replace(config, modalities=inputs)  # a codec would need its file
    ids = [modality.token_id for modality in config.inputs.values()]
    fitting = tokenizer if max(ids) < tokenizer.size else byte_tokenizer
    text = {"conversations": [{"from": "human", "value": "The cat and the dog."}]}
    tokens = SampleEncoder(config, fitting, 1024).encode(text, Path).tokens.ids
    assert not {*ids} & {*tokens}
