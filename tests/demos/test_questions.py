import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from demos.digits.questions import (
    HELD_OUT_PAIRS,
    KINDS,
    NUMBERS,
    PROMPT,
    best_blind_guess,
    question_pairs,
)
from demos.digits.speech import Synthesiser
from demos.digits.spoken_questions import WRITTEN_TURNS
from examples.mimo.data.tokenizer import load_tokenizer
from tests.helpers.commands import ROOT, run_command


def records(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_answers_checked_by_hand():
    answers = {kind.name: kind.answer for kind in KINDS}
    checked = [
        ("digit", 0, "zero"),
        ("next", 9, "ten"),
        ("previous", 0, "minus one"),
        ("plus_three", 9, "twelve"),
        ("double", 8, "sixteen"),
        ("to_ten", 0, "ten"),
        ("even", 0, "yes"),
        ("even", 7, "no"),
        ("larger", 5, "no"),
        ("larger", 6, "yes"),
        ("first_letter", 8, "e"),
        ("last_letter", 8, "t"),
        ("spelling", 1, "o n e"),
        ("ordinal", 5, "fifth"),
        ("french", 0, "zéro"),
        ("german", 5, "fünf"),
        ("spanish", 9, "nueve"),
        ("roman", 9, "IX"),
        ("roman", 4, "IV"),
    ]
    assert [answers[kind](digit) for kind, digit, _ in checked] == [a for *_, a in checked]


def test_at_least_twelve_kinds_and_a_tenth_of_the_pairs_held_out():
    assert len(KINDS) >= 12
    assert len({kind.wording for kind in KINDS}) == len(KINDS)
    assert 0.08 <= len(HELD_OUT_PAIRS) / (10 * len(KINDS)) <= 0.12


def test_neither_input_alone_is_enough():
    assert max(best_blind_guess(question_pairs(held_out=False)).values()) <= 0.2


def test_splits_share_no_picture_no_voice_and_no_pair(data_folder):
    train = [*records(data_folder, "align"), *records(data_folder, "train")]
    heldout = [*records(data_folder, "heldout"), *records(data_folder, "heldout_pairs")]

    def pictures(records):
        return {file.split("/")[-1] for record in records for file in record["images"]}

    def voices(records):
        return {file.split("-")[1] for record in records for file in record["audios"]}

    assert not pictures(train) & pictures(heldout)
    assert not voices(train) & voices(heldout)

    def pairs(records):
        return {(r["kind"], r["digit"]) for r in records if r["images"] or r["audios"]}

    assert not pairs(train) & HELD_OUT_PAIRS
    assert not pairs(records(data_folder, "heldout")) & HELD_OUT_PAIRS
    assert pairs(records(data_folder, "heldout_pairs")) == HELD_OUT_PAIRS


def test_every_file_is_there_and_fits_the_window(data_folder, tiny):
    window = tiny.modalities["audios"].encoder.window_seconds
    for split in ("align", "train", "heldout", "heldout_pairs"):
        for record in records(data_folder, split):
            for file in record["images"] + record["audios"]:
                assert (data_folder / file).is_file()
    for file in (data_folder / "audios").rglob("*.flac"):
        assert soundfile.info(file).duration <= window


def test_every_answer_matches_its_kind_and_digit(data_folder):
    answers = {kind.name: kind.answer for kind in KINDS}
    for record in records(data_folder, "train"):
        if record["task"] in ("spoken", "written", "words"):
            expected = answers[record["kind"]](record["digit"])
            assert record["conversations"][-1]["value"] == expected


def test_written_questions_name_their_digit_once_and_are_all_answered(data_folder):
    written = [r for r in records(data_folder, "align") if r["task"] == "words"]
    assert written
    for record in written:
        asked, answered = (record["conversations"][start::2] for start in (0, 1))
        assert len(asked) == len(answered) == WRITTEN_TURNS
        name = NUMBERS[record["digit"]]
        for number, (question, answer) in enumerate(zip(asked, answered, strict=True)):
            shown = "" if number else f"Digit {name}. "
            kinds = [k for k in KINDS if question["value"] == f"{shown}{k.wording} {PROMPT}"]
            assert [kind.answer(record["digit"]) for kind in kinds] == [answer["value"]]


def test_the_prompt_of_every_sample_takes_few_tokens(data_folder):
    assert len(load_tokenizer(data_folder / "tokenizer.model").encode(PROMPT)) <= 5


def test_speech_is_sound_and_voices_differ():
    synthesiser = Synthesiser()
    first, other = (synthesiser.say("Which digit is this?", v) for v in ("f3", "m1"))
    assert 0.5 < len(first) / 16_000 < 2.5
    assert np.abs(first).max() > 0.1
    assert len(first) != len(other)
    with pytest.raises(ValueError, match="no voice"):
        synthesiser.say("hello", "nobody")


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--samples", "0"), "--samples 0"), (("--voices", "1"), "--voices 1")],
)
def test_wrong_sizes_end_with_one_line(tmp_path, flags, message):
    done = run_command(
        "prepare_data.py", "spoken-questions", "--output", str(tmp_path / "d"), *flags
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = run_command("prepare_data.py", "spoken-questions", "--output", str(tmp_path))
    assert done.returncode == 2
    assert "holds something else" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_killed_preparation_leaves_no_folder_behind(tmp_path):
    target = tmp_path / "d"
    script = ROOT / "examples/mimo/prepare_data.py"
    process = subprocess.Popen(
        [sys.executable, str(script), "spoken-questions", "--output", str(target)],
        stderr=subprocess.DEVNULL,
    )
    # It speaks 98 voices, one file after the other, so the first file is long before the last.
    while process.poll() is None and not any(tmp_path.rglob("*.flac")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the preparation ended before it could be killed"
    assert not target.exists()
