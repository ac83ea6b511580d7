"""A served model whose layers fail: what the request at fault is told, and what the others get."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from starlette.testclient import TestClient

from examples.mimo import Mimo
from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.serving.app import Limits, Server
from examples.mimo.serving.worker import Worker
from tests.helpers.commands import QUESTION
from tests.helpers.failing_serve import ALONE, LATE, SLOTS, START
from tests.helpers.served import Served, answer_of, at_work, says, user


@pytest.fixture
def model(checkpoint, build_model):
    return Mimo(open_checkpoint(checkpoint))


@pytest.fixture
def client(model):
    """The application of a model in this process, whose parts a test can break."""
    worker = Worker(model, max_batch=4, max_waiting=8)
    thread = at_work(worker)
    server = Server(model, worker, Limits(hosts=("testserver",)))
    # One event loop for the requests of all threads.
    with TestClient(server.app(), raise_server_exceptions=False) as client:
        yield client
    worker.stop()
    thread.join(timeout=120)


def ask(client, *messages, **more):
    reply = client.post("/v1/chat/completions", json={"messages": messages, **more})
    return reply.status_code, reply.json()


def break_after(monkeypatch, model, calls, error):
    """Let the layers fail in every call after so many."""
    forward, count = model.engine.transformer.forward, iter(range(10**9))

    def broken(*inputs):
        if next(count) >= calls:
            raise error
        return forward(*inputs)

    monkeypatch.setattr(model.engine.transformer, "forward", broken)


@pytest.mark.parametrize("calls", [0, 3])
def test_a_request_that_fails_leaves_nothing_behind(client, model, media, monkeypatch, calls):
    """Neither in the slots nor in the prefix cache, whether it failed at its prompt or later."""
    picture = user("Name it.", media)
    expected = [ask(client, picture), ask(client, user(QUESTION))]
    with monkeypatch.context() as patch:
        # One failure: the probe after it works.
        forward, count = model.engine.transformer.forward, iter(range(10**9))

        def broken_once(*inputs):
            if next(count) == calls:
                raise RuntimeError("CUDA out of memory\nTried to allocate 2 GiB")
            return forward(*inputs)

        patch.setattr(model.engine.transformer, "forward", broken_once)
        status, reply = ask(client, picture)
        assert status == 500
        assert reply["error"] == {
            "message": "the server failed at this request; its log says why",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        assert not model.engine.sequences
        assert client.get("/health").json() == {"status": "ok", "model": "tiny_avlm"}
    again = [ask(client, picture), ask(client, user(QUESTION))]
    for (status, reply), (_, before) in zip(again, expected, strict=True):
        assert status == 200
        assert answer_of(reply) == answer_of(before)
    metrics = client.get("/metrics").text
    assert "mimo_failed_total 1.0" in metrics
    assert "mimo_running 0.0" in metrics


def test_out_of_memory_costs_the_requests_that_need_it(client, model, monkeypatch):
    """And frees what they held, so that those after them have room."""
    emptied, running = [], model.engine.sequences
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(running)))
    reply = ask(client, user(QUESTION))[1]
    expected, length = answer_of(reply), reply["usage"]["prompt_tokens"]
    forward = model.engine.transformer.forward

    def forward_with_little_memory(hidden, cache, first_slot, starts):
        if hidden.shape[1] > 1 and hidden.shape[1] + max(starts) > length:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(hidden, cache, first_slot, starts)

    monkeypatch.setattr(model.engine.transformer, "forward", forward_with_little_memory)
    bodies = [user(QUESTION), user(f"{QUESTION} {QUESTION}")] * 4
    with ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(lambda body: ask(client, body), bodies))
    assert [status for status, _ in replies] == [200, 500] * 4
    assert {answer_of(reply) for status, reply in replies if status == 200} == {expected}
    assert len(emptied) >= 4
    assert not running
    assert client.get("/health").status_code == 200


def test_a_stream_that_fails_ends_with_an_error(client, model, monkeypatch):
    whole = answer_of(ask(client, user(QUESTION))[1])
    break_after(monkeypatch, model, 4, RuntimeError("no"))
    body = {"messages": [user(QUESTION)], "stream": True}
    reply = client.post("/v1/chat/completions", json=body)
    *events, error = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line]
    said = "".join(event["choices"][0]["delta"]["content"] for event in events)
    assert said
    assert whole.startswith(said)
    assert whole != said
    assert "its log says why" in error["error"]["message"]


def test_health_says_why_the_model_cannot_answer(client, model, monkeypatch):
    break_after(monkeypatch, model, 0, RuntimeError("an illegal memory access"))
    assert ask(client, user(QUESTION))[0] == 500
    health = client.get("/health")
    assert health.status_code == 503
    assert health.json() == {
        "status": "failed",
        "model": "tiny_avlm",
        "reason": "RuntimeError: an illegal memory access",
    }
    status, reply = ask(client, user(QUESTION))
    assert (status, "/health says why" in reply["error"]["message"]) == (503, True)


def test_a_request_that_fails_costs_no_other_answer(client, model, monkeypatch):
    """At its prompt or in a step; beside it others are generated, and others start with it."""
    bodies = [user(f"Digit {word}. Which digit is this?") for word in ("one", "two", "three")]
    expected = [answer_of(ask(client, body)[1]) for body in bodies]
    start = model.engine.start

    def start_with_faults(requests):
        outputs = start(requests)
        if any(request.max_new_tokens == START for request in requests):
            raise RuntimeError("no")
        return outputs

    step = model.engine.step

    def step_with_faults():
        outputs = step()
        if any(s.request.max_new_tokens == LATE for s in model.engine.sequences):
            raise RuntimeError("no")
        return outputs

    monkeypatch.setattr(model.engine, "start", start_with_faults)
    monkeypatch.setattr(model.engine, "step", step_with_faults)
    for fault in (START, LATE):
        asked = [(body, {}) for body in bodies] + [(bodies[0], {"max_tokens": fault})]
        with ThreadPoolExecutor(4) as clients:
            for _ in range(5):
                replies = list(clients.map(lambda pair: ask(client, pair[0], **pair[1]), asked))
                assert [status for status, _ in replies] == [200, 200, 200, 500]
                assert [answer_of(reply) for _, reply in replies[:3]] == expected


def answers_beside_faults(server, served, count, faults):
    """So many requests of eight clients, of which some fail: each alone, with an error in JSON."""
    bodies = [
        {
            "messages": [user(f"Digit {word}. Which digit is this?")],
            "temperature": 1.5 * (number % 2),
            "seed": number,
            "max_tokens": 30,
        }
        for number, word in enumerate(("one", "two", "three", "four", "five"))
    ]
    expected = [answer_of(served.ask(body)[1]) for body in bodies]
    every = count // faults

    def ask(number):
        kind, body = number % len(bodies), bodies[number % len(bodies)]
        if number % every == every - 1:
            status, reply = server.ask({**body, "max_tokens": (START, LATE)[number // every % 2]})
            return status, reply["error"]["type"] == "server_error"
        if number % 3:
            status, reply = server.ask(body)
            return status, answer_of(reply) == expected[kind]
        chunks = server.stream(body)
        texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        return 200, "".join(texts) == expected[kind]

    with ThreadPoolExecutor(8) as clients:
        result = list(clients.map(ask, range(count)))
    assert result.count((200, True)) == count - faults
    assert result.count((500, True)) == faults
    assert server.get("/health")[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("--tp", "2"), ("--pp", "2")])
def test_twenty_errors_among_two_hundred_requests(checkpoint, served, layout):
    processes = 2 if layout else 0
    script = "tests/helpers/failing_serve.py"
    server = Served(checkpoint, *layout, processes=processes, script=script, forked=True)
    answers_beside_faults(server, served, 200, 20)
    server.process.send_signal(signal.SIGINT)
    server.process.wait(timeout=60)


def test_ranks_fail_together_or_end_together(checkpoint, served):
    expected = answer_of(served.ask({"messages": [user(QUESTION)]})[1])
    script = "tests/helpers/failing_serve.py"
    server = Served(checkpoint, "--tp", "2", processes=2, script=script, forked=True)
    for fault in (START, LATE, LATE):
        assert server.ask(says(max_tokens=fault))[0] == 500
        status, reply = server.ask({"messages": [user(QUESTION)]})
        assert (status, answer_of(reply)) == (200, expected)
    # One rank alone has no memory as prompts start: the others give up and go on with it. At this
    # temperature answers are long, so that all are generated at once.
    many = says(n=16, temperature=5, max_tokens=60)
    assert server.ask(many)[0] == 500
    status, reply = server.ask({"messages": [user(QUESTION)]})
    assert (status, answer_of(reply)) == (200, expected)
    assert len(server.ask({**many, "n": SLOTS})[1]["choices"]) == SLOTS
    answers_beside_faults(server, served, 30, 4)
    *_, error = server.stream(says(max_tokens=LATE))
    assert error["error"]["type"] == "server_error"
    chat = server.client().chat.completions
    with pytest.raises(openai.APIError, match="its log says why"):
        list(chat.create(model="m", **says(max_tokens=LATE, stream=True)))
    assert server.get("/health")[0] == 200
    # Rank 0 is in a collective that rank 1 never joins, so both end, and the client is told.
    assert server.ask(says(max_tokens=ALONE))[0] == 500
    assert server.process.wait(timeout=60) != 0
    error = "serve.py [rank 1]: error: the worker ended: RuntimeError: RuntimeError: a fault"
    assert error in server.said()
