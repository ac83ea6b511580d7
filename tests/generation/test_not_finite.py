"""Logits that are not finite end an answer with an error, and no other answer."""

import json
import threading

import pytest
import torch

from examples.mimo import Mimo
from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.generation.engine import NO_TOKEN
from examples.mimo.generation.sampling import Options, Sampling, fill_logprobs
from examples.mimo.serving.app import Limits, Server
from examples.mimo.serving.worker import Worker
from tests.helpers import known_answers, ranks
from tests.helpers.commands import QUESTION
from tests.helpers.served import until

# Its tokens are in no other prompt here.
SPOILED = "Zq"
ERROR = "logits are NaN or infinite"
LAYOUTS = (("--tp", "2"), ("--pp", "2"))


@pytest.fixture(scope="module")
def spoiled(tiny, data_folder, tmp_path_factory, build_model):
    folder = tmp_path_factory.mktemp("spoiled") / "checkpoint"
    known_answers.write_checkpoint(tiny, data_folder, folder, SPOILED)
    return folder


@pytest.fixture(scope="module")
def model(spoiled):
    return Mimo(open_checkpoint(spoiled), prefix_cache=4)


def encoded(model, *texts):
    def record(text):
        turns = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        return {"key": text, "conversations": turns}

    return [model.encode(record(text)) for text in texts]


@pytest.mark.parametrize(
    "options",
    [
        Options(12),
        Options(12, Sampling(temperature=1.0, top_k=9, top_p=0.9, min_p=0.01, seed=1)),
        Options(12, Sampling(frequency_penalty=0.1, repetition_penalty=1.1)),
        Options(12, logprobs=True, prompt_logprobs=True, top_logprobs=20),
    ],
)
def test_the_others_of_a_batch_go_on(model, options):
    """Also those that start alike."""
    good = [QUESTION, f"{QUESTION} Say it.", "hi", f"{QUESTION} Say it twice."]
    expected = model.answer(encoded(model, *good), options)
    bad = [f"{QUESTION} {SPOILED}", SPOILED, f"{SPOILED} {QUESTION}"]
    samples = encoded(model, bad[0], good[0], bad[1], *good[1:3], bad[2], good[3], *bad)
    # An answer's seed is that of its number.
    numbers = [100, 0, 101, 1, 2, 102, 3, 103, 104, 105]
    for batch_size in (16, 2):
        pairs = iter(zip(numbers, samples, strict=True))
        answers = dict(model.iter_answers(pairs, options, batch_size))
        assert [answers[n].tokens for n in range(4)] == [a.tokens for a in expected]
        assert all(answers[n].error is None for n in range(4))
        for number in range(100, 106):
            assert ERROR in answers[number].error
            assert (answers[number].text, answers[number].tokens) == ("", [])
    again = model.answer(encoded(model, *good), options)
    assert [a.tokens for a in again] == [a.tokens for a in expected]


def test_the_next_in_its_slot_is_answered(model):
    """A shorter prompt, beside a longer one, attends to a slot that held the NaN of others."""
    long, options = f"{QUESTION} {QUESTION}", Options(12)
    expected = [a.tokens for a in model.answer(encoded(model, "hi", long), options)]
    bad, short, other = encoded(model, f"{SPOILED} {long}", "hi", long)
    scheduler = model.scheduler()
    pieces = []
    for number, sample in enumerate((bad, short, other)):
        pieces += scheduler.start([(number, sample, options)])
    while len(scheduler):
        pieces += scheduler.step()
    answers = {piece.number: piece.answer for piece in pieces if piece.answer}
    assert ERROR in answers[0].error
    assert [answers[number].tokens for number in (1, 2)] == expected


def test_generate_and_stream_raise(model):
    with pytest.raises(ValueError, match=f"^sample prompt: .*{ERROR}"):
        model.generate(SPOILED)
    with pytest.raises(ValueError, match=f"^sample prompt 1: .*{ERROR}"):
        model.generate([QUESTION, SPOILED])
    with pytest.raises(ValueError, match=ERROR):
        list(model.stream(SPOILED))
    assert model.generate(QUESTION)


def test_an_answer_that_meets_them_later_ends_there(model, monkeypatch):
    """Infinity too; what was streamed before is all there is."""
    whole = list(model.stream(QUESTION))
    logits, steps = model.engine.transformer.logits, iter(range(10**9))

    def infinite(hidden):
        result = logits(hidden)
        if next(steps) == 5:
            result[:, 3] = float("inf")
        return result

    monkeypatch.setattr(model.engine.transformer, "logits", infinite)
    pieces = []
    with pytest.raises(ValueError, match=ERROR):
        pieces.extend(model.stream(QUESTION))  # extend keeps what came before the error
    assert pieces == whole[: len(pieces)]
    assert 0 < len(pieces) < len(whole)


def test_the_server_says_so_and_goes_on(model, monkeypatch):
    testclient = pytest.importorskip("starlette.testclient")
    worker = Worker(model, max_batch=4, max_waiting=64)
    thread = threading.Thread(target=worker.run)
    thread.start()
    server = Server(model, worker, Limits(hosts=("testserver",)))

    def body(text, **more):
        return {"messages": [{"role": "user", "content": text}], **more}

    with testclient.TestClient(server.app(), raise_server_exceptions=False) as client:

        def ask(*texts, **more):
            reply = client.post("/v1/chat/completions", json=body(*texts, **more))
            return reply.status_code, reply.text

        try:
            for more in ({}, {"logprobs": True, "top_logprobs": 20}, {"temperature": 1.0, "n": 3}):
                status, text = ask(SPOILED, **more)
                assert (status, ERROR in json.loads(text)["error"]["message"]) == (500, True)
                assert ask(QUESTION)[0] == 200
            status, text = ask(SPOILED, stream=True, logprobs=True)
            (event,) = [json.loads(line[6:]) for line in text.split("\n\n") if line]
            assert (status, ERROR in event["error"]["message"]) == (200, True)
            assert client.get("/health").status_code == 200
            assert "mimo_failed_total 4.0" in client.get("/metrics").text
            # A model that answers nothing any more is told from an input that cannot be answered.
            logits = model.engine.transformer.logits
            nan = float("nan")
            monkeypatch.setattr(model.engine.transformer, "logits", lambda h: logits(h) * nan)
            assert ask(QUESTION)[0] == 500
            until(lambda: worker.failure)
            health = client.get("/health")
            assert (health.status_code, ERROR in health.json()["reason"]) == (503, True)
        finally:
            worker.stop()
            thread.join(timeout=120)


def test_commands_at_every_layout(spoiled, tmp_path):
    questions, output = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    lines = [{"prompt": QUESTION}, {"prompt": SPOILED, "key": "b"}, {"prompt": "hi"}]
    questions.write_text("\n".join(map(json.dumps, lines)))
    command = ("examples/mimo/avlm_inference.py", "--ckpt", str(spoiled))
    for layout in ((), *LAYOUTS):
        processes = 2 if layout else 1
        done = ranks.run(*command, *layout, "--prompt", SPOILED, "--json", processes=processes)
        assert (done.returncode, done.stdout) == (2, "")
        # The known answers are written without a manifest.
        note, line = done.stderr.splitlines()
        assert "has no sha256.json" in note
        assert line.startswith("avlm_inference.py: error: sample prompt: ")
        assert ERROR in line
        output.unlink(missing_ok=True)
        files = ("--input", str(questions), "--output", str(output))
        done = ranks.run(*command, *layout, *files, processes=processes)
        assert done.returncode == 0, done.stderr
        answers = {answer.pop("line"): answer for answer in map(json.loads, output.open())}
        assert set(answers[2]) == {"key", "error"}
        assert ERROR in answers[2]["error"]
        assert answers[1]["answer"]
        assert answers[3]["answer"]


def test_log_probabilities_are_numbers():
    """Of a token that is hopelessly unlikely, of forbidden ones, of a small vocabulary."""
    logits = torch.tensor([[0.0, 3e38, -3e38, 1.0, 2.0]])
    columns = torch.zeros(1, 1 + 2 * 7, dtype=torch.float64)
    allowed = logits.index_fill(1, torch.tensor([0, 3]), float("-inf"))
    fill_logprobs(columns, torch.tensor([2]), logits, allowed, num_top=7)
    assert torch.isfinite(columns[0, 0])
    tokens, logprobs = columns[0, 1:8].tolist(), columns[0, 8:].tolist()
    assert [t for t, p in zip(tokens, logprobs, strict=True) if p > float("-inf")] == [1, 4, 2]
    assert NO_TOKEN not in tokens
