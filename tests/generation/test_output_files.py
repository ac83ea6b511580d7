"""`avlm_inference.py` writes what a model puts out into files, and refuses first what it cannot."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import soundfile

from examples.mimo import avlm_inference, evaluate
from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.generation import api
from tests.helpers import known_answers, outputs, ranks
from tests.helpers.commands import QUESTION


@pytest.fixture
def say(ask, aloud, capsys, monkeypatch):
    """What the command prints for flags, and lines of stdin."""

    def said(*flags, lines=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        ask("--ckpt", str(aloud), *map(str, flags))
        return capsys.readouterr()

    return said


@pytest.fixture(scope="module")
def speech(aloud):
    return open_checkpoint(aloud).config.outputs["speech"]


def codes_of(tokens, speech):
    """The codes of the one output in an answer's tokens."""
    return [t - speech.first_id for t in tokens if t >= speech.first_id]


def holds(path, codes, speech):
    """Whether a file is what these codes stand for, as 16 bits a sample hold it."""
    samples, rate = soundfile.read(path, dtype="float32")
    expected = speech.codec.decode(codes)
    return rate == outputs.RATE_HZ and np.abs(samples - expected).max() < 1e-4


def test_an_answer_is_written_to_the_file_that_a_flag_names(say, speech, tmp_path, sentences):
    file = tmp_path / "answer {0}.wav"
    flags = ("--prompt", QUESTION, "--speech-out", file)
    result = json.loads(say(*flags, "--json").out)
    codes = codes_of(result["tokens"], speech)
    assert codes in known_answers.spoken(open_checkpoint_config(speech))
    assert result["answer"] in sentences
    assert result["outputs"] == {"speech": [str(file)]}
    assert holds(file, codes, speech)
    file.unlink()
    spoken = say(*flags, "--stream")
    assert spoken.out == result["answer"] + "\n"
    assert holds(file, codes, speech)
    # Without the flag there is text alone, and nothing is generated for nobody.
    alone = json.loads(say("--prompt", QUESTION, "--json").out)
    assert alone["answer"] == result["answer"]
    assert alone["tokens"] == result["tokens"][: -len(codes) - 2]
    assert "outputs" not in alone


def open_checkpoint_config(speech):
    """A config with this output alone."""
    return type("Config", (), {"outputs": {"speech": speech}})


def test_samples_are_numbered_and_an_answer_without_output_says_so(say, speech, tmp_path):
    flags = ("--prompt", QUESTION, "--temperature", "1.5", "--samples", "24", "--seed", "3")
    spoken = say(*flags, "--speech-out", tmp_path / "a.flac", "--json")
    lines = [json.loads(line) for line in spoken.out.splitlines()]
    assert len(lines) == 24
    for number, line in enumerate(lines):
        files = sorted(str(file) for file in tmp_path.glob(f"a-{number}[.-]*"))
        assert line.get("outputs", {}) == ({"speech": files} if files else {})
    written = [number for number, line in enumerate(lines) if "outputs" in line]
    assert 0 < len(written) < 24
    assert spoken.err.count("not written, as the answer holds no speech") == 24 - len(written)
    short = say("--prompt", QUESTION, "--max-new-tokens", "3", "--speech-out", tmp_path / "b.wav")
    assert "b.wav: not written, as the answer holds no speech" in short.err
    assert not (tmp_path / "b.wav").exists()


def test_several_outputs_in_one_answer_are_numbered(aloud, speech, tmp_path, build_model):
    from examples.mimo.generation.scheduler import Answer
    from examples.mimo.generation.sessions import save_as

    model = api.Mimo(open_checkpoint(aloud))
    items = known_answers.spoken(model.config)[:2]
    answer = Answer("", [], "stop", outputs={"speech": items})
    names = save_as(model, answer, "speech", tmp_path / "a.wav", 4)
    assert names == {"speech": [str(tmp_path / f"a-4-{n}.wav") for n in range(2)]}
    for name, codes in zip(names["speech"], items, strict=True):
        assert holds(name, codes, speech)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--speech-out", "none/a.wav"), "--speech-out none/a.wav: its folder does not exist"),
        (("--speech-out", "a.mp3"), "--speech-out a.mp3: speech is written as .flac or .wav"),
        (("--speech-out", "a"), "--speech-out a: speech is written as .flac or .wav"),
        (("--speech-out", "docs"), "--speech-out docs: this is a folder; name a file"),
        (
            ("--drawing-out", "a.png"),
            "--drawing-out: tests.helpers.outputs:with_speech puts out text, speech",
        ),
        (("--image-out=a.png",), "--image-out: tests.helpers.outputs:with_speech puts out text, "),
        (("--speech-path", "a.wav"), "--speech-path"),
        (("--input", "i", "--output", "o", "--speech-out", "a.wav"), "files go to o.files"),
        (("--interactive", "--speech-out", "none"), "--speech-out none: no such folder, which"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_model_loads(say, monkeypatch, flags, message):
    monkeypatch.setattr(api, "Mimo", None)
    given = () if "--input" in flags or "--interactive" in flags else ("--prompt", QUESTION)
    with pytest.raises(ValueError, match=r".") as error:
        say(*given, *flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_of_text_has_no_output(ask, checkpoint):
    with pytest.raises(ValueError, match=r"^--speech-out: tiny_avlm puts out text$"):
        ask("--ckpt", str(checkpoint), "--prompt", QUESTION, "--speech-out", "a.wav")


def test_a_codec_that_is_missing_is_one_line(ask, aloud, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(aloud, copy)
    shutil.rmtree(copy / "codecs")
    with pytest.raises(ValueError, match=r"scale\.json.*tests write it") as error:
        ask("--ckpt", str(copy), "--prompt", QUESTION, "--no-verify-integrity")
    assert "\n" not in str(error.value)


def test_what_fails_while_it_is_written_takes_no_text_with_it(say, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(avlm_inference, "check_flags", lambda args, config: args.prompt)
    with pytest.raises(ValueError, match=r"a\.mp3: speech is written as"):
        say("--prompt", QUESTION, "--speech-out", tmp_path / "a.mp3")
    assert len(capsys.readouterr().out) > 10


def failing_behind(num_codes):
    """LevelCodec's `decode`, failing at longer outputs."""
    decode = outputs.LevelCodec.decode

    def fails(self, codes):
        if len(codes) > num_codes:
            raise IndexError("no such\nlevel")
        return decode(self, codes)

    return fails


def test_a_codec_that_fails_at_once_is_refused_before_the_model_loads(say, monkeypatch):
    monkeypatch.setattr(outputs.LevelCodec, "decode", failing_behind(0))
    monkeypatch.setattr(api, "Mimo", None)
    with pytest.raises(ValueError, match=r"^--speech-out a.wav: IndexError: no such level$"):
        say("--prompt", QUESTION, "--speech-out", "a.wav")


def test_a_codec_that_fails_at_some_codes_costs_these_answers(say, monkeypatch, tmp_path):
    """And a later run does not try them again."""
    monkeypatch.setattr(outputs.LevelCodec, "decode", failing_behind(2))
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": QUESTION}))
    flags = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    flags += ("--samples", "24", "--temperature", "1.5", "--seed", "3")
    say(*flags)
    text = (tmp_path / "out.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 24
    errors = {row["error"] for row in rows if "error" in row}
    assert len(errors) > 1
    for error in errors:
        assert error.startswith(f"{tmp_path}/out.jsonl.files/1-")
        assert error.endswith(".flac: LevelCodec.decode failed: IndexError: no such level")
    assert any("outputs" in row for row in rows)
    say(*flags)
    assert (tmp_path / "out.jsonl").read_text() == text


def test_a_chat_goes_on_behind_a_codec_that_fails(say, monkeypatch, tmp_path):
    monkeypatch.setattr(outputs.LevelCodec, "decode", failing_behind(0))
    lines = [QUESTION, "/reset", QUESTION]
    spoken = say("--interactive", lines=lines)
    first, second = spoken.out.splitlines()
    assert first == second
    assert spoken.err.count("LevelCodec.decode failed: IndexError: no such level\n") == 2


def test_files_lie_beside_the_lines(say, aloud, speech, tmp_path):
    lines = [{"prompt": QUESTION}, {"prompt": 5}, {"prompt": "What is it?", "key": "it"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    target, folder = tmp_path / "out.jsonl", tmp_path / "out.jsonl.files"
    flags = ("--input", tmp_path / "in.jsonl", "--output", target)
    say(*flags)
    rows = {row["line"]: row for row in map(json.loads, target.read_text().splitlines())}
    assert "prompt must be text" in rows[2]["error"]
    for number in (1, 3):
        assert rows[number]["outputs"] == {"speech": [f"out.jsonl.files/{number}-0-0.flac"]}
        (name,) = rows[number]["outputs"]["speech"]
        assert holds(tmp_path / name, codes_of(rows[number]["tokens"], speech), speech)
    # An interrupted run goes on, on several ranks as well; what is there stays.
    kept = [line for line in target.read_text().splitlines(True) if '"line": 3' not in line]
    target.write_text("".join(kept))
    (folder / "3-0-0.flac").write_bytes(b"half a fi")
    (folder / "1-0-0.flac").write_bytes(b"mine")
    again = ranks.run(
        *("examples/mimo/avlm_inference.py", "--ckpt", str(aloud), "--pp", "2"),
        *map(str, flags),
        processes=2,
    )
    assert again.returncode == 0, again.stderr
    assert {r["line"]: r for r in map(json.loads, target.read_text().splitlines())} == rows
    assert (folder / "1-0-0.flac").read_bytes() == b"mine"
    assert holds(folder / "3-0-0.flac", codes_of(rows[3]["tokens"], speech), speech)
    shutil.rmtree(folder)
    target.unlink()
    folder.touch()
    with pytest.raises(ValueError, match=r"out\.jsonl\.files is for its files, but it is no fold"):
        say(*flags)


def test_a_chat_names_its_files_and_keeps_what_it_said(say, speech, tmp_path):
    (tmp_path / "speech-1.flac").write_bytes(b"of an earlier chat")
    lines = [QUESTION, "And now?", "/reset", QUESTION]
    spoken = say("--interactive", "--speech-out", tmp_path, lines=lines)
    first, one, second, two, again, three = spoken.out.splitlines()
    assert [one, two, three] == [str(tmp_path / f"speech-{n}.flac") for n in (2, 3, 4)]
    assert (tmp_path / "speech-1.flac").read_bytes() == b"of an earlier chat"
    assert first == again == say("--prompt", QUESTION).out.strip("\n")
    assert (tmp_path / "speech-2.flac").read_bytes() == (tmp_path / "speech-4.flac").read_bytes()
    # The second answer is that to the same turns in a file, whose codes the codec encodes anew.
    codes = codes_of(json.loads(say_json(say, QUESTION, tmp_path))["tokens"], speech)
    assert speech.codec.encode(speech.codec.decode(codes)) == codes
    turns = [
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": first}, {"type": "speech", "speech": "said.wav"}],
        },
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": turns}))
    say("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["answer"] == second


def say_json(say, prompt, folder):
    return say("--prompt", prompt, "--speech-out", folder / "said.wav", "--json").out


def test_a_chat_without_a_folder_makes_one(say, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    spoken = say("--interactive", lines=[QUESTION, "And now?"])
    paths = spoken.out.splitlines()[1::2]
    assert len(paths) == 2
    files = sorted(str(path) for path in tmp_path.rglob("*.flac"))
    assert files == paths


@pytest.fixture
def score(aloud, tmp_path, ask, monkeypatch):
    """The scores of records as evaluate.py writes them."""

    def scores_of(records, *flags):
        (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, records)))
        output = tmp_path / "eval.json"
        flags = ["--ckpt", str(aloud), "--data", str(tmp_path), "--output", str(output), *flags]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
        evaluate.main()
        return json.loads(output.read_text())["scores"]

    return scores_of


def record_of(question, answer, **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"speech": ["a.wav"], "conversations": turns, **fields}


def test_evaluation_judges_the_words(aloud, score, tmp_path):
    """Right answers of a model that speaks behind its text, whatever spaces the samples have."""
    generated = api.Mimo(open_checkpoint(aloud)).generate([{"type": "text", "text": QUESTION}])
    outputs.write_wave(tmp_path / "a.wav", 0.1, 0.2)

    def exact_match(*answers):
        records = [record_of(QUESTION, answer) for answer in answers]
        return score(records)["heldout"]["exact_match"]

    assert exact_match(f"{generated} <speech>", f"{generated}<speech>", "no <speech>") == 2 / 3
    # Where text stands behind an output, all of the answer is waited for.
    assert exact_match(f"<speech> {generated}", f"{generated}<speech>.") == 1 / 2


def test_evaluation_shows_the_model_what_it_put_out(aloud, score, tmp_path, capsys):
    model = api.Mimo(open_checkpoint(aloud))
    outputs.write_wave(tmp_path / "a.wav", 0.1, 0.2)
    records, hits = [], 0
    for number in range(24):
        question, hear = f"What is {number}?", "<audio>What is the third digit of it?"
        answer = model.generate(question, outputs=["speech"])
        records.append(record_of(question, f"{answer.text}<speech>", hear_prompt=hear))
        buffer = io.BytesIO()
        soundfile.write(buffer, answer.speech[0], outputs.RATE_HZ, format="FLAC")
        hits += model.generate(hear, audios=[buffer.getvalue()]) == answer.text
    assert 0 < hits < 24
    # A record without the prompt is not counted, and a silent answer is not heard.
    scores = score([*records, record_of(QUESTION, "<speech>")], "--batch-size", "5")
    assert scores["heldout"]["exact_match"] == 24 / 25
    assert scores["heldout, heard again"]["samples"] == 24
    assert scores["heldout, heard again"]["exact_match"] == hits / 24
    assert "heldout, heard again       24" in capsys.readouterr().out
    for prompt in ("Write it down.", "<audio><image>Write it down.", 5):
        with pytest.raises(ValueError, match=r"'hear_prompt' needs one place of an input"):
            score([record_of(QUESTION, "<speech>", hear_prompt=prompt, key="k")])
