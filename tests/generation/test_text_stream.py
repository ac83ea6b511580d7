"""Text comes in whole characters and stops where it is told to."""

import random

import pytest

from examples.mimo.data.tokenizer import load_tokenizer
from examples.mimo.generation.scheduler import TextStream
from tests.helpers import tokenizers


class Bytes:
    """A token a byte, as byte fallback has them."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def feed(text, stops=()):
    stream = TextStream(Bytes(), stops)
    shown = []
    for byte in text.encode():
        shown.append(stream.add(byte))
        if stream.stopped:
            break
    shown.append(stream.finish())
    return shown, stream


def test_no_half_characters():
    shown, stream = feed("a😀ü漢")
    assert [piece for piece in shown if piece] == ["a", "😀", "ü", "漢"]
    assert stream.text == "a😀ü漢"


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    stream = TextStream(Bytes())
    assert stream.add(ord("a")) == "a"
    assert stream.add(0xF0) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one. two", ["."], "one"),
        ("ab<en<end>x", ["<end>"], "ab<en"),
        ("ab<en", ["<end>"], "ab<en"),
        ("xxab", ["ba", "xab"], "x"),
        ("aaab", ["aab"], "a"),
        ("stop", ["stop"], ""),
        ("größe!", ["ß"], "grö"),
    ],
)
def test_a_stop_string_and_its_prefixes_are_not_shown(text, stops, expected):
    shown, stream = feed(text, stops)
    assert "".join(shown) == stream.text == expected
    assert stream.stopped == any(stop in text for stop in stops)


def test_pieces_make_the_text_whatever_it_is():
    numbers = random.Random(0)
    for _ in range(300):
        text = "".join(numbers.choice("ab<é😀") for _ in range(numbers.randrange(12)))
        stops = ["".join(numbers.choice("ab<é") for _ in range(2)) for _ in range(2)]
        shown, stream = feed(text, stops)
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        assert "".join(shown) == stream.text == text[: min(ends, default=len(text))]


class Counting:
    """A tokenizer that counts the tokens that it is asked to decode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def tokenizers_of_all_kinds(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    folders = [
        tokenizers.byte_level(folder / "bytes", tokenizers.QWEN3),
        tokenizers.metaspace(folder / "first", tokenizers.VICUNA, "first"),
        tokenizers.metaspace(folder / "always", tokenizers.VICUNA, "always"),
    ]
    return [tokenizer, *map(load_tokenizer, folders)]


def test_any_tokens_give_the_text_of_all_of_them(tokenizers_of_all_kinds):
    numbers = random.Random(0)
    for tokenizer in tokenizers_of_all_kinds:
        texts = ["Größe 漢字 it is  a cat\n\n😀🧑‍🚀!", " leading", "a", "  "]
        written = [tokenizer.encode(text) for text in texts]
        # Hugging Face's byte fallback replaces all of a run of bytes when one of them is wrong,
        # those too that were a character before it came.
        falls_back = "ByteFallback" in getattr(tokenizer, "decoder", "")
        ids = [i for i in range(tokenizer.size) if not falls_back or tokenizer.token_bytes(i)[1:]]
        drawn = [numbers.choices(ids, k=numbers.randrange(40)) for _ in range(100)]
        # More control tokens, which have no text, than a window holds.
        control = [*tokenizer.special] * 30
        between = [i + control + j for i in written for j in written]
        for ids in written + drawn + between:
            stream = TextStream(tokenizer)
            shown = "".join(stream.add(token) for token in ids) + stream.finish()
            assert shown == stream.text == tokenizer.decode(ids)


def test_a_token_costs_as_much_at_the_end_of_a_long_answer_as_at_its_beginning(
    tokenizers_of_all_kinds,
):
    for tokenizer in tokenizers_of_all_kinds:
        ids = tokenizer.encode("it is a cat, 漢字 😀 and I hear  a dog! " * 400)[:4000]
        for stops in ((), ("no such text", "cat,x")):
            counting = Counting(tokenizer)
            stream = TextStream(counting, stops)
            for token in ids:
                stream.add(token)
            halfway = counting.decoded
            # A window is two steps, of a character's tokens each at most, and decoded twice.
            assert halfway < 8 * len(ids)
            stream.finish()
            assert counting.decoded == halfway + len(ids)
