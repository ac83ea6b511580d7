"""What some ranks do alone: the others get the result, or fail with them."""

import json

import pytest

from tests.helpers import ranks


def test_every_rank_fails_where_rank_zero_does_and_meets_the_next_result():
    done = ranks.run("tests/helpers/rank_zero.py", processes=3)
    assert done.returncode == 0, done.stderr
    answers = dict(map(json.loads, done.stdout.splitlines()))
    assert answers.keys() == {0, 1, 2}
    invalid = "'utf-8' codec can't decode byte 0x78 in position 0: invalid"
    assert answers[0] == [
        [True, "ValueError", "no such file"],
        [True, "UnicodeDecodeError", invalid],
        [False, "OSError", "[Errno 28] No space left on device"],
        [False, "KeyError", "'images'"],
        [False, "RuntimeError", "out of memory"],
        ["still", "together"],
    ]
    told = [
        [True, "ValueError", "no such file"],
        [True, "ValueError", invalid],
        [False, "RuntimeError", "rank 0: OSError: [Errno 28] No space left on device"],
        [False, "RuntimeError", "rank 0: KeyError: 'images'"],
        [False, "RuntimeError", "rank 0: RuntimeError: out of memory"],
        ["still", "together"],
    ]
    assert answers[1] == answers[2] == told


@pytest.mark.parametrize("layout", [("--tp", "2"), ("--pp", "2")], ids=" ".join)
def test_a_score_needs_the_files_on_rank_zero_alone(layout, checkpoint, data_folder, tmp_path):
    flags = ("--ckpt", str(checkpoint), "--data", str(data_folder), "--samples", "3")
    scores = []
    for script, more, processes in (
        ("examples/mimo/evaluate.py", (), 1),
        ("tests/helpers/blind_rank.py", layout, 2),
    ):
        output = tmp_path / str(processes)
        done = ranks.run(script, *flags, *more, "--output", str(output), processes=processes)
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(output.read_text()))
    assert scores[0] == scores[1]
    assert len(scores[0]["scores"]) >= 3


def test_an_encoder_that_fails_on_the_first_stage_fails_on_all_and_spoils_nothing(checkpoint):
    done = ranks.run("tests/helpers/failing_stage.py", str(checkpoint), "2", processes=2)
    assert done.returncode == 0, done.stderr
    first, last = (said for _, said in sorted(map(json.loads, done.stdout.splitlines())))
    assert first == last
    assert first[:2] == [
        "ValueError: 3 placeholders, 2 embeddings",
        "RuntimeError: out of memory",
    ]
    assert "Error" not in first[2]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_a_codec_that_fails_fails_on_every_rank_and_spoils_nothing(aloud, tp, pp):
    flags = (str(aloud), str(tp), str(pp))
    done = ranks.run("tests/helpers/failing_codec.py", *flags, processes=tp * pp)
    assert done.returncode == 0, done.stderr
    said = dict(map(json.loads, done.stdout.splitlines()))
    assert said.keys() == {*range(tp * pp)}
    before, *errors, after = said[0]
    assert before == after
    assert len(before[1]) > 0
    codec = "speech: LevelCodec.allowed(1)"
    assert errors == [
        f"ValueError: {codec} failed: ValueError: no levels",
        f"ValueError: {codec} failed: IndexError: list index out of range",
        "ValueError: speech: LevelCodec.allowed(0) holds codes 3 to 39, but there are 16",
        "ValueError: no such level",
        "RuntimeError: out of memory",
    ]
    told = [*said[0]]
    told[-2] = f"RuntimeError: rank 0: {errors[-1]}"
    for rank in range(1, tp * pp):
        assert said[rank] == told
