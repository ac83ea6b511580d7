"""The server's worker: what waits, what is cancelled, and what happens when the model fails."""

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from starlette.testclient import TestClient

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.generation import Mimo
from examples.mimo.generation.engine import TokenOutput
from examples.mimo.generation.scheduler import Answer, Piece
from examples.mimo.serving.app import Limits, Server
from examples.mimo.serving.worker import QueueFullError, Worker, WorkerFailedError
from tests.helpers.commands import QUESTION
from tests.helpers.failing_serve import ALONE, LATE, SLOTS, START
from tests.helpers.served import Served, answer_of, says, until, user


class Counting:
    """Answers that take so many steps as their sample says; "start" and "step" fail there."""

    def __init__(self):
        self.left, self.most, self.gate = {}, 0, threading.Semaphore(0)
        self.started, self.is_broken = [], False

    def scheduler(self):
        return self

    def __len__(self):
        return len(self.left)

    def start(self, requests):
        self.started.append([number for number, _, _ in requests])
        self.left |= {number: sample for number, sample, _ in requests}
        self.most = max(self.most, len(self.left))
        if "start" in self.left.values():
            raise MemoryError("no room for\nthis prompt")
        return []

    def cancel(self, number):
        self.left.pop(number, None)

    def abort(self, numbers=None):
        for number in list(self.left if numbers is None else numbers):
            self.left.pop(number, None)

    def probe(self):
        if self.is_broken:
            raise RuntimeError("a model that is broken")
        return []

    def step(self):
        if self.left:
            self.gate.acquire()
        if "step" in self.left.values():
            raise RuntimeError("a model that fails")
        self.left = {number: left - 1 for number, left in self.left.items()}
        done = [number for number, left in self.left.items() if not left]
        self.left = {number: left for number, left in self.left.items() if left}
        return [Piece(number, "", Answer(str(number), [], "stop")) for number in done]


@pytest.fixture
def worker(build_model):
    return Worker(Counting(), max_batch=2, max_waiting=3)


def at_work(worker):
    thread = threading.Thread(target=worker.run)
    thread.start()
    return thread


def end(worker, thread):
    worker.stop()
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert worker.num_running == worker.num_waiting == 0


def test_so_many_at_once_and_so_many_more_wait(worker):
    heard = []
    numbers = [worker.submit(2, None, heard.append) for _ in range(3)]
    with pytest.raises(QueueFullError):
        worker.submit(2, None, heard.append)
    thread = at_work(worker)
    worker.scheduler.gate.release(100)
    until(lambda: len(heard) == 3)
    assert [piece.number for piece in heard] == numbers
    assert worker.scheduler.most == 2
    end(worker, thread)


def test_who_leaves_is_not_answered(worker):
    heard = []
    numbers = [worker.submit(5, None, heard.append) for _ in range(3)]
    thread = at_work(worker)
    until(lambda: worker.num_running == 2)
    assert worker.cancel(numbers[0])
    assert worker.cancel(numbers[2])
    assert not worker.cancel(numbers[2])
    worker.scheduler.gate.release()
    until(lambda: worker.num_running == 1)
    assert worker.scheduler.left[numbers[1]] > 1
    worker.scheduler.gate.release(100)
    until(lambda: heard)
    assert [piece.number for piece in heard] == [numbers[1]]
    assert not worker.cancel(numbers[1])
    end(worker, thread)


def submitted(worker, samples):
    """What each sample is answered with, by its index in `samples`."""
    heard = [[] for _ in samples]
    for sample, pieces in zip(samples, heard, strict=True):
        worker.submit(sample, None, pieces.append)
    return heard


def outcomes(heard):
    until(lambda: all(pieces for pieces in heard))
    assert [len(pieces) for pieces in heard] == [1] * len(heard)
    return [pieces[0].error or "answered" for pieces in heard]


def test_a_prompt_that_cannot_start_fails_alone(worker):
    worker.max_batch = 3
    worker.scheduler.gate.release(100)
    heard = submitted(worker, [2, "start", 3])
    thread = at_work(worker)
    reason = "no memory: MemoryError: no room for this prompt"
    assert outcomes(heard) == ["answered", reason, "answered"]
    assert worker.scheduler.started == [[0, 1, 2], [0], [1], [2]]
    assert outcomes(submitted(worker, [1])) == ["answered"]
    assert worker.failure is None
    end(worker, thread)


def test_a_step_that_fails_costs_the_answer_that_it_fails_for(worker):
    """Each that was generated is generated alone then, and the third, which waited, after them."""
    worker.scheduler.gate.release(100)
    heard = submitted(worker, [5, "step", 2])
    thread = at_work(worker)
    reason = "RuntimeError: a model that fails"
    assert outcomes(heard) == ["answered", reason, "answered"]
    assert worker.scheduler.started == [[0, 1], [0], [1], [2]]
    assert worker.failure is None
    end(worker, thread)


@pytest.mark.parametrize(("repeats", "outcome"), [(True, "answered"), (False, "differed")])
def test_what_was_sent_is_not_sent_again(worker, repeats, outcome):
    """An answer that is begun again must repeat it."""

    def step():
        left = worker.scheduler.left
        position = 5 - left[0] if 0 in left else 0
        if 1 in left and position == 3:
            raise RuntimeError("a model that fails")
        is_again = len(worker.scheduler.started) > 1
        token = position if repeats or not is_again else 7
        left.update({0: left[0] - 1} if 0 in left else {})
        pieces = [Piece(0, f"{token} ", output=TokenOutput(0, token))] if 0 in left else []
        if left.get(0) == 0:
            del left[0]
            pieces = [Piece(0, "4 ", Answer("", [], "stop"), TokenOutput(0, 4))]
        return pieces

    worker.scheduler.step = step
    heard = []
    worker.submit(5, None, heard.append)
    other = worker.submit("other", None, heard.append)
    thread = at_work(worker)
    until(lambda: any(piece.answer or piece.error for piece in heard))
    assert [piece.text for piece in heard][:3] == ["0 ", "1 ", "2 "]
    if outcome == "answered":
        assert "".join(piece.text for piece in heard) == "0 1 2 3 4 "
    else:
        assert (len(heard), outcome in heard[3].error) == (4, True)
    worker.cancel(other)
    until(lambda: not worker.num_running)
    end(worker, thread)


def test_a_suspect_whose_client_leaves_is_not_tried(worker):
    heard = submitted(worker, [5, "step"])
    worker.scheduler.is_broken = False
    abort = worker.scheduler.abort

    def abort_and_leave(numbers=None):
        abort(numbers)
        worker.cancel(0)

    worker.scheduler.abort = abort_and_leave
    worker.scheduler.gate.release(100)
    thread = at_work(worker)
    assert outcomes(heard[1:]) == ["RuntimeError: a model that fails"]
    assert worker.scheduler.started == [[0, 1], [1]]
    assert not heard[0]
    end(worker, thread)


def test_a_callback_that_fails_costs_its_own_answer(worker):
    worker.scheduler.gate.release(100)
    heard = []

    def refuse(piece):
        heard.append(piece)
        raise ValueError("no")

    worker.submit(1, None, refuse)
    (other,) = submitted(worker, [3])
    thread = at_work(worker)
    assert outcomes([other]) == ["answered"]
    assert [piece.error for piece in heard] == [None, "ValueError: no"]
    end(worker, thread)


def test_a_model_that_stays_broken_takes_no_more_requests(worker):
    worker.scheduler.gate.release(100)
    worker.scheduler.is_broken = True
    heard = submitted(worker, [5, "step", 2])
    thread = at_work(worker)
    reason = "RuntimeError: a model that fails; then RuntimeError: a model that is broken"
    assert outcomes(heard) == [reason] * 3
    assert worker.failure == reason
    with pytest.raises(WorkerFailedError, match="a model that is broken"):
        worker.submit(1, None, None)
    end(worker, thread)


def test_a_loop_that_ends_answers_what_is_open(worker, monkeypatch):
    heard = submitted(worker, [2])

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(worker.scheduler, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    assert outcomes(heard) == [worker.failure]
    assert worker.failure.startswith("the worker ended: KeyboardInterrupt")


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
    server = Served(checkpoint, *layout, processes=processes, script=script)
    answers_beside_faults(server, served, 200, 20)
    server.process.send_signal(signal.SIGINT)
    server.process.communicate(timeout=60)


def test_ranks_fail_together_or_end_together(checkpoint, served):
    expected = answer_of(served.ask({"messages": [user(QUESTION)]})[1])
    server = Served(checkpoint, "--tp", "2", processes=2, script="tests/helpers/failing_serve.py")
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
    said = server.process.stderr.read().decode()
    assert "serve.py [rank 1]: error: the worker ended: RuntimeError: RuntimeError: a fault" in said
