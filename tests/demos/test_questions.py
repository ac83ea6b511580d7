import json
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import soundfile

from demos.digits.questions import (
    ALOUD_PROMPT,
    HELD_OUT_PAIRS,
    KINDS,
    NUMBERS,
    PROMPT,
    best_blind_guess,
    question_pairs,
    spoken_answers,
)
from demos.digits.speech import Synthesiser
from demos.digits.spoken_questions import HEARD_TURNS, LANGUAGES, WRITTEN_TURNS
from examples.mimo.configs import get_model_config, with_codec_folder
from examples.mimo.data.tokenizer import load_tokenizer
from tests.helpers.commands import ROOT, launch_command, run_command


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


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """The data of a model that answers aloud, by three voices."""
    folder = tmp_path_factory.mktemp("speaking") / "data"
    sizes = ("--samples", "400", "--voices", "3", "--model-provider", "tiny_avlm_speech")
    done = launch_command("prepare_data.py", "spoken-questions", "--output", str(folder), *sizes)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_answer_is_spoken_by_a_voice_that_never_asks(speaking, data_folder):
    answers = spoken_answers()
    assert {a.text for a in answers} == {k.answer(d) for k in KINDS for d in range(10)}
    files = sorted(path.relative_to(speaking).as_posix() for path in speaking.glob("answers/*"))
    assert files == sorted(answer.file for answer in answers)
    # French and English say it differently, numerals are said letter by letter.
    lengths = {a.file: soundfile.info(speaking / a.file).duration for a in answers}
    assert lengths["answers/fr-six.flac"] != lengths["answers/en-six.flac"]
    assert lengths["answers/en-VII.flac"] > 1.5 * lengths["answers/en-V.flac"]
    asking = {path.name for path in speaking.glob("audios/*/*")}
    assert asking
    assert not any("-Annie-" in name for name in asking)
    assert not list(data_folder.glob("answers/*"))
    assert not (data_folder / "codecs").exists()


def test_some_questions_are_answered_aloud_and_the_words_come_first(speaking):
    by_file, kinds = {a.file: a for a in spoken_answers()}, {k.name: k for k in KINDS}
    counts = Counter(record["task"] for record in records(speaking, "train"))
    assert counts["aloud"] > 10
    assert counts["read"] > 1
    assert counts["hear"] > 5
    for split in ("align", "train", "heldout_aloud"):
        for record in records(speaking, split):
            asked, answered = (record["conversations"][start::2] for start in (0, 1))
            if record["task"] == "hear":
                assert [turn["value"] for turn in answered] == [
                    by_file[file].text for file in record["audios"]
                ]
                assert len(asked) == HEARD_TURNS
            if record["task"] not in ("read", "aloud"):
                assert "speech" not in record
                assert not any("<speech>" in turn["value"] for turn in answered)
                continue
            (file,) = record["speech"]
            said = by_file[file]
            if record["task"] == "read":
                assert asked[0]["value"] == f"Read in {LANGUAGES[said.language]}: {said.text}"
                assert answered[0]["value"] == "<speech>"
            else:
                assert asked[0]["value"] == f"<image><audio>{ALOUD_PROMPT}"
                assert answered[0]["value"] == f"{said.text}<speech>"
                kind = kinds[record["kind"]]
                assert (said.text, said.language) == (kind.answer(record["digit"]), kind.language)
    heldout = records(speaking, "heldout_aloud")
    assert not {(r["kind"], r["digit"]) for r in heldout} & HELD_OUT_PAIRS
    assert all("/heldout/" in file for r in heldout for file in r["images"] + r["audios"])
    assert {record["hear_prompt"] for record in heldout} == {"<audio>Write it down."}


def test_the_narrators_codec_says_every_answer_again(speaking):
    config = with_codec_folder(get_model_config("tiny_avlm_speech"), speaking)
    codec = config.outputs["speech"].codec
    for answer in spoken_answers():
        sound = codec.read(speaking / answer.file)
        codes = codec.encode(sound)
        assert abs(len(codec.decode(codes)) - len(sound)) < codec.patch_samples
        assert max(Counter(codes).values()) <= len(codes) / 2 + 1  # not one sound all along
    sample = load_tokenizer(speaking / "tokenizer.model").encode(ALOUD_PROMPT)
    assert len(sample) <= 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model-provider", "llava_vlm"), "llava_vlm takes no audios, which this data set has"),
        (("--model-provider", "tests.helpers.outputs:with_speech"), "speaks with a LevelCodec"),
    ],
)
def test_a_model_that_the_data_do_not_fit_is_one_line(tmp_path, flags, message):
    few = ("--samples", "20", "--voices", "2")
    done = run_command(
        "prepare_data.py", "spoken-questions", "--output", str(tmp_path / "d"), *few, *flags
    )
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "d").exists()


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
