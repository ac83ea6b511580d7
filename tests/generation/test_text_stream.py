"""Text comes in whole characters and stops where it is told to."""

import random

import pytest

from examples.mimo.generation.scheduler import TextStream


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
