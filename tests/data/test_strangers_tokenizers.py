"""Tokenizers that strangers wrote: refused in one line that names the file, in bounded memory."""

import base64
import io
import json

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from examples.mimo.data.tokenizer import load_tokenizer
from tests.helpers import tokenizers


def described(change):
    def damage(folder):
        file = folder / "tokenizer.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return damage


def pattern(expression):
    step = {"type": "Split", "pattern": {"Regex": expression}}
    step |= {"behavior": "Isolated", "invert": False}
    return described(lambda values: values.update(pre_tokenizer=step))


def replacing(content, times, kind="normalizers", **old):
    step = {"type": "Replace", "pattern": old, "content": content}
    return {"type": "Sequence", kind: [step] * times}


def normalizer(step):
    return described(lambda values: values.update(normalizer=step))


def charsmap(*forms):
    """SentencePiece's rules: the length of a trie, the trie, and the forms that it points to."""
    return (1024).to_bytes(4, "little") + bytes(1024) + b"\0".join(forms) + b"\0"


def vocabulary(token_id):
    return described(lambda values: values["model"]["vocab"].update(a=token_id))


def no_end(folder):
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    del values["eos_token"]
    file.write_text(json.dumps(values))


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


UNREADABLE = "no tokenizer that can be read"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pattern("(("), UNREADABLE),
        (pattern("(a+)+$"), "that can be read .*retry-limit"),
        (pattern("(x+x+)+y"), "that can be read .*retry-limit"),
        (pattern("( | )+#"), "that can be read .*retry-limit"),
        (vocabulary(-5), UNREADABLE),
        (vocabulary(4_000_000_000), "token ids up to 4,000,000,000, more than 16,777,216"),
        (described(lambda values: values["added_tokens"][0].update(id=-1)), UNREADABLE),
        (described(lambda values: values.update(model=[])), UNREADABLE),
        (no_end, "no end-of-text token, so no answer would end"),
        (normalizer(replacing(20 * "a", 6, String="a")), "64,000,000 times as long"),
        (normalizer(replacing(200 * "a", 1, Regex="a*")), "201 times as long"),
        (normalizer({"type": "Prepend", "prepend": 1_000 * "a"}), "1,001 times as long"),
        (
            described(
                lambda values: values.update(decoder=replacing(20 * "a", 6, "decoders", String="a"))
            ),
            "64,000,000 times as long",
        ),
        (
            normalizer(
                {
                    "type": "Precompiled",
                    "precompiled_charsmap": base64.b64encode(
                        charsmap(b"b", 64_000 * b"a")
                    ).decode(),
                }
            ),
            "1,000 times as long",
        ),
        (normalizer({"type": "Precompiled", "precompiled_charsmap": "%"}), UNREADABLE),
        (text("tokenizer.json", "[" * 200_000), "tokenizer.json: not JSON"),
        (text("tokenizer.json", "{"), "tokenizer.json: not JSON"),
        (text("tokenizer.json", "[]"), "tokenizer.json: not a JSON object"),
        (text("tokenizer_config.json", "[" * 200_000), UNREADABLE),
        (text("tokenizer_config.json", "{"), UNREADABLE),
    ],
)
def test_a_hugging_face_tokenizer_that_is_wrong(tmp_path, capfd, damage, message):
    folder = tokenizers.byte_level(tmp_path, tokenizers.SMOLLM2)
    assert load_tokenizer(folder).encode("it is")
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)
    # Nor does a library write a traceback of its own.
    assert capfd.readouterr().err == ""


def test_a_pattern_that_fails_at_a_text_fails_for_that_text(tmp_path):
    folder = tokenizers.byte_level(tmp_path, tokenizers.SMOLLM2)
    pattern("(q+q+)+#")(folder)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ValueError, match="its tokenizer cannot encode this text"):
        tokenizer.encode(60 * "q")
    assert tokenizer.encode("it is")


def test_a_sentencepiece_model_that_makes_texts_long(tmp_path):
    """Its own rules, those of NFKC, are read; a form of 64,000 bytes is not."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tokenizers.TEXTS * 9),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model.getvalue())
    assert load_tokenizer(file).encode("it is")
    proto = ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.precompiled_charsmap += 64_000 * b"a" + b"\0"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=r"tokenizer\.model: may make a text 1,000 times as long"):
        load_tokenizer(file)
