import pytest

from examples.mimo.evaluate import bootstrap, heldout_splits, is_right


@pytest.mark.parametrize(
    ("fields", "expected", "text", "right"),
    [
        ({}, "A frog.", "A frog.", True),
        ({}, "A frog.", "A frog", False),
        ({"ending": "They agree."}, "I see. They agree.", "I hear. They agree.", True),
        ({"ending": "They agree."}, "I see. They agree.", "They agree. No.", False),
    ],
)
def test_an_answer_is_the_samples_or_ends_like_it(fields, expected, text, right):
    assert is_right(fields, expected, text) is right


def test_the_interval_is_the_binomials_when_samples_are_independent():
    hits = [True] * 60 + [False] * 40
    low, high = bootstrap(hits, list(range(100)))
    assert low == pytest.approx(0.504, abs=0.02)
    assert high == pytest.approx(0.696, abs=0.02)


def test_samples_of_a_group_count_once():
    hits = [True] * 60 + [False] * 40
    low, high = bootstrap(hits, [number // 10 for number in range(100)])
    assert low == pytest.approx(0.3, abs=0.11)
    assert high == pytest.approx(0.9, abs=0.11)
    assert bootstrap([True] * 5, list("abcde")) == (1.0, 1.0)


def test_the_held_out_splits_are_those_of_the_folder(tmp_path):
    """A folder of one's own need not have the demo's second split."""
    (tmp_path / "heldout.jsonl").touch()
    assert heldout_splits(tmp_path) == ["heldout"]
    (tmp_path / "heldout_pairs.jsonl").touch()
    (tmp_path / "train.jsonl").touch()
    assert heldout_splits(tmp_path) == ["heldout", "heldout_pairs"]
