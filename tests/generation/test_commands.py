"""Streams, conversations and files of questions say what single answers say."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from examples.mimo.data.batch import read_records
from tests.helpers import ranks
from tests.helpers.commands import QUESTION, ROOT

AVLM = "examples/mimo/avlm_inference.py"


@pytest.fixture
def say(ask, checkpoint, capsys, monkeypatch):
    """What the command prints for flags, and lines of stdin."""

    def said(*flags, lines=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        ask("--ckpt", str(checkpoint), *flags)
        return capsys.readouterr()

    return said


def test_a_stream_is_the_answer(say):
    flags = ("--prompt", QUESTION)
    assert say(*flags, "--stream").out == say(*flags).out != "\n"


def test_ctrl_c_ends_a_conversation_without_a_word(checkpoint):
    process = subprocess.Popen(
        [sys.executable, AVLM, "--ckpt", str(checkpoint), "--interactive"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background jobs, and all that they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said = b""
    while not said.endswith(b"> "):
        said += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, rest) == (b"", b"")


def test_in_python(say, checkpoint):
    script = (
        "from examples.mimo import Mimo\n"
        f"model = Mimo.load({str(checkpoint)!r})\n"
        f"print(model.generate({QUESTION!r}))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == say("--prompt", QUESTION).out, done.stderr
    assert done.stderr == ""


def test_a_seed_gives_the_same_answers_and_another_others(say):
    flags = ("--prompt", QUESTION, "--temperature", "2", "--samples", "6", "--json")
    first, again, other = (say(*flags, "--seed", seed).out for seed in ("1", "1", "2"))
    assert first == again != other
    assert len({json.loads(line)["answer"] for line in first.splitlines()}) > 2


def test_a_stop_string_ends_the_answer(say, sentences):
    whole = json.loads(say("--prompt", QUESTION, "--json").out)
    assert whole["answer"] in sentences
    assert whole["finish"] == "stop"
    stop = whole["answer"][8:12]
    cut = json.loads(say("--prompt", QUESTION, "--json", "--stop", stop).out)
    assert cut["answer"] == whole["answer"][: whole["answer"].index(stop)]
    assert cut["finish"] == "stop"
    short = json.loads(say("--prompt", QUESTION, "--json", "--max-new-tokens", "1").out)
    assert short["tokens"] == whole["tokens"][:1]
    assert short["finish"] == "length"


def test_log_probabilities_are_there_when_asked_for(say):
    result = json.loads(say("--prompt", QUESTION, "--json", "--logprobs").out)
    assert result["finish"] == "stop"
    assert len(result["logprobs"]) == len(result["tokens"]) + 1
    assert all(value <= 0 for value in result["logprobs"])
    assert result["prompt_logprobs"][0] is None
    assert all(value < 0 for value in result["prompt_logprobs"][1:])


def test_a_conversation_answers_as_its_turns_in_a_file(say, media, tmp_path):
    picture, sound = media / "white.png", media / "second.wav"
    lines = [f"/image {picture}", "Name it.", f"/audio {sound}", "", "/foo", QUESTION]
    spoken = say(
        "--interactive", lines=[*lines, "/image none.png", "/reset", QUESTION, "/quit", "x"]
    )
    first, second, third, alone = spoken.out.splitlines()
    assert f"{picture}: 40 x 30" in spoken.err
    assert "/foo: not a command" in spoken.err
    assert "none.png: no such image file" in spoken.err
    assert alone == say("--prompt", QUESTION).out.strip()
    turns = [
        {"from": "human", "value": "<image>Name it."},
        {"from": "gpt", "value": first},
        {"from": "human", "value": "<audio>Answer the question."},
        {"from": "gpt", "value": second},
        {"from": "human", "value": QUESTION},
    ]
    for name in ("white.png", "second.wav"):
        (tmp_path / name).write_bytes((media / name).read_bytes())
    record = {"images": ["white.png"], "audios": ["second.wav"], "conversations": turns}
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    say("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    assert json.loads((tmp_path / "out.jsonl").read_text())["answer"] == third


def test_a_command_without_a_file_says_so(say):
    spoken = say("--interactive", lines=["/image", "/audio  "])
    assert "/image: name a file behind it" in spoken.err
    assert "/audio: name a file behind it" in spoken.err


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(say):
    spoken = say("--interactive", lines=[QUESTION, "word " * 200, "/reset", QUESTION])
    first, again = spoken.out.splitlines()
    assert first == again
    assert "do not fit" in spoken.err


BAD = [
    ("not json", "not JSON"),
    ("[1]", "must be a JSON object"),
    ('{"prompt": 5}', "prompt must be text, not 5"),
    ('{"prompt": ""}', "nothing to answer"),
    ('{"prompt": "x", "images": "a.png"}', "images must be a list of file names"),
    ('{"prompt": "x", "images": ["../../a.png"]}', "lies outside the data folder"),
    ('{"prompt": "x", "images": ["none.png"]}', "no such image file"),
    ('{"prompt": "<image>", "images": []}', "0 image files"),
    ('{"prompt": "x", "videos": ["a.mp4"]}', "holds videos, but tiny_avlm takes images, audios"),
    ('{"conversations": [{"from": "gpt", "value": "a"}]}', "end with a question"),
    ('{"conversations": [{"from": "ghost", "value": "a"}]}', "a turn is from 'ghost'"),
    (b'{"prompt": "\xff"}', "not JSON"),
    (r'{"prompt": "a \ud800 b"}', r"the text holds '\ud800', which is half a character"),
    ('{"prompt": "x", "audios": ["' + "a" * 300 + '.wav"]}', "cannot be read (File name too long)"),
    (r'{"key": "\ud800", "prompt": 5}', "prompt must be text, not 5"),
    ("[" * 100_000, "not JSON"),
    ('{"prompt": "' + "a " * 6_000_000 + '"}', "bytes in one line, more than 10,000,000"),
]


def test_bad_lines_are_answered_with_an_error_and_the_others_in_full(say, tmp_path):
    good = json.dumps({"key": "good", "prompt": QUESTION}).encode()
    lines = [line if isinstance(line, bytes) else line.encode() for line, _ in BAD]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([good, *lines, b"", good]))
    output = tmp_path / "out.jsonl"
    flags = ("--input", str(tmp_path / "in.jsonl"), "--output", str(output))
    say(*flags)
    result = {row["line"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert sorted(result) == [*range(1, len(BAD) + 2), len(BAD) + 3]
    for number, (_, message) in enumerate(BAD, start=2):
        assert message in result[number]["error"], number
    last = result[len(BAD) + 3]
    assert result[1]["answer"] == last["answer"] == say("--prompt", QUESTION).out.strip()
    assert last["key"] == "good"
    before = output.read_bytes()
    say(*flags)
    assert output.read_bytes() == before


def test_the_answers_of_training_data_stand_beside_the_models(say, tmp_path, data_folder):
    records = read_records(data_folder / "heldout.jsonl")[:3]
    # Twelve turns, another name of the list, and text in parts.
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "seven?"}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "se"}, {"type": "text", "text": "v"}],
        },
    ]
    table = {"conversations": None, "messages": [{"role": "user", "content": QUESTION}]}
    lines = [*records, {"messages": messages * 6}, {"prompt": QUESTION}, table]
    source = data_folder / "with_answers.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    say("--input", str(source), "--output", str(tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: row["line"])
    expected = [record["conversations"][-1]["value"] for record in records]
    assert [row.get("expected") for row in rows] == [*expected, "sev", None, None]
    assert rows[-1]["answer"] == rows[-2]["answer"]
    # As the same questions without an answer at their end.
    asked = [{**record, "conversations": record["conversations"][:-1]} for record in records]
    source.write_text("\n".join(map(json.dumps, asked)))
    say("--input", str(source), "--output", str(tmp_path / "asked.jsonl"))
    alone = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    answers = {row["line"]: row["answer"] for row in alone}
    assert {row["line"]: row["answer"] for row in rows[:3]} == answers


@pytest.mark.parametrize("content", ["250", '{"a": 1}\n', '{"line":1}', '{"line": 1}\n2'])
def test_a_file_that_is_not_ours_stays_as_it_is(say, tmp_path, content):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": QUESTION}))
    (tmp_path / "out").write_text(content)
    with pytest.raises(ValueError, match="no answer of an earlier run"):
        say("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == content


@pytest.fixture(scope="module")
def questions(data_folder):
    """A file of held-out questions in the data folder, and how many."""
    records = read_records(data_folder / "heldout.jsonl")[:60]
    lines = [
        {**r, "conversations": r["conversations"][:1], "key": n} for n, r in enumerate(records)
    ]
    file = data_folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file, len(lines)


def answers(output):
    """(line, sample) -> answer; each once."""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    result = {(row["line"], row["sample"]): row["answer"] for row in rows}
    assert len(result) == len(rows)
    return result


def test_killed_and_started_again_no_line_is_lost_or_said_twice(checkpoint, questions, tmp_path):
    file, count = questions
    flags = ["--ckpt", str(checkpoint), "--input", str(file), "--samples", "2", "--temperature"]
    flags += ["1.5", "--max-new-tokens", "20", "--batch-size", "6", "--output"]
    whole = ranks.run(AVLM, *flags, str(tmp_path / "whole"), "--pp", "2", processes=2)
    assert whole.returncode == 0, whole.stderr
    output = tmp_path / "killed"
    process = ranks.Forked([str(ROOT / AVLM), *flags, str(output)])
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 9):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 9 <= output.read_bytes().count(b"\n") < 2 * count
    with output.open("a") as file:
        file.write('{"line": 1, "samp')
    again = ranks.run(AVLM, *flags, str(output), "--tp", "2", processes=2)
    assert again.returncode == 0, again.stderr
    assert answers(output) == answers(tmp_path / "whole")
    assert len(answers(output)) == 2 * count


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--top-p", "2"), "--top-p 2.0: from 1e-09 to 1"),
        (("--temperature", "-1"), "--temperature -1.0"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0: at least 1"),
        (("--stop", ""), "--stop string of 0 characters"),
        (("--samples", "2"), "are all alike without --temperature"),
        (("--samples", "0"), "--samples 0"),
        (("--input", "a"), "--input and --output go together"),
        (("--input", "none", "--output", "o"), "--input none: no such file"),
        (("--input", "README.md", "--output", "README.md"), "this is the input"),
        (("--input", "README.md", "--output", "pyproject.toml"), "no answer of an earlier run"),
        (("--input", "README.md", "--output", "none/o"), "its folder does not exist"),
        (("--input", "README.md", "--output", "docs"), "--output docs: Is a directory; name"),
        (("--interactive", "--json"), "--json does not go with --interactive"),
        (("--interactive", "--image-path", "a"), "--image-path does not go with --interactive"),
        (("--prompt", "x", "--stream", "--json"), "--stream shows the text of one answer"),
        (("--prompt", "x", "--logprobs"), "--logprobs needs --json"),
        pytest.param(
            ("--prompt", "x", "--cuda-graphs"),
            "--cuda-graphs needs a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
        ),
    ],
)
def test_flags_that_do_not_go_together(say, flags, message):
    with pytest.raises(ValueError, match=r".") as error:
        say(*flags)
    assert message in str(error.value)
