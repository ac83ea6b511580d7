"""What one client may take from the others: connections, time, bytes, pixels."""

import asyncio
import contextlib
import io
import json
import re
import select
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from examples.mimo import Mimo
from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.generation import api
from examples.mimo.generation.sampling import Options
from examples.mimo.generation.scheduler import Scheduler
from examples.mimo.generation.transformer import KeyValueCache
from examples.mimo.modalities.files import Blob
from examples.mimo.serving.media import Budget, BudgetSpentError, decoded_size
from examples.mimo.serving.worker import CacheTooSmallError, Worker
from tests.helpers import ranks
from tests.helpers.served import KEY, Served, answer_of, says, until

pytest.importorskip("starlette")
PATH = "/v1/chat/completions"
BODY, BODIES, CONNECTIONS = 200_000, 500_000, 40
TOO_LONG = "of the request took too long"


@pytest.fixture(scope="module")
def server(checkpoint):
    server = Served(
        checkpoint,
        *("--max-body-megabytes", str(BODY / 2**20), "--head-seconds", "2", "--body-seconds", "3"),
        *("--max-bodies-megabytes", str(BODIES / 2**20), "--write-seconds", "2"),
        *("--max-connections", str(CONNECTIONS), "--max-cache-gigabytes", "0.006"),
        *("--prefixes", "0"),
        forked=True,
    )
    yield server
    server.end()


def head(length, path=PATH, method="POST", *lines):
    lines = (f"Content-Length: {length}", *lines) if length is not None else lines
    fixed = ("Host: localhost", f"Authorization: Bearer {KEY}", "Content-Type: application/json")
    return "\r\n".join([f"{method} {path} HTTP/1.1", *fixed, *lines, "", ""]).encode()


def connect(server, data=b""):
    client = socket.create_connection(("127.0.0.1", server.port), timeout=120)
    client.sendall(data)
    return client


def received(client):
    """All that comes until the server closes the connection."""
    data = bytearray()
    try:
        while more := client.recv(65_536):
            data += more
    except ConnectionResetError:
        pass
    client.close()
    return data.decode()


def sent_slowly(client):
    """As `received`, by a client that goes on sending a byte now and then."""
    data = bytearray()
    with client, contextlib.suppress(OSError):
        while True:
            if select.select([client], [], [], 0.2)[0]:
                if not (more := client.recv(65_536)):
                    break
                data += more
            client.sendall(b"x")
    return data.decode()


def error_of(reply):
    status, _, rest = reply.partition("\r\n")
    return int(status.split()[1]), json.loads(rest.partition("\r\n\r\n")[2])["error"]["message"]


def timeouts(server, what):
    text = server.get("/metrics")[1].decode()
    name = f'mimo_timeouts_total{{what="{what}"}} '
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return float(lines[0].removeprefix(name)) if lines else 0.0


def test_connections_that_say_nothing_or_half_are_closed(server):
    """Neither a byte now and then nor a request before it buys more time."""
    idle, half = connect(server), connect(server, head(None)[:50])
    body, unread = connect(server, head(50_000) + b"{"), connect(server, head(999, "/health"))
    again = connect(server, head(None, "/health", "GET"))
    assert b"200 OK" in again.recv(65_536)
    again.sendall(b"GET /he")
    assert error_of(sent_slowly(half)) == (408, f"the head {TOO_LONG}")
    assert error_of(received(idle)) == (408, f"the head {TOO_LONG}")
    assert f"the head {TOO_LONG}" in received(again)
    status, message = error_of(sent_slowly(body))
    assert (status, "bytes of the body in 3 s" in message) == (408, True)
    # A route that reads no body answers before it comes.
    assert sent_slowly(unread).startswith("HTTP/1.1 405")
    assert timeouts(server, "head") >= 3
    assert timeouts(server, "body") >= 2
    assert server.ask(says())[0] == 200


def test_no_more_connections_than_the_limit(server):
    clients = [connect(server) for _ in range(CONNECTIONS)]
    status, message = error_of(received(connect(server)))
    assert (status, f"more than {CONNECTIONS} connections" in message) == (503, True)
    for client in clients:
        client.close()
    until(lambda: server.metric("mimo_connections") <= 2)
    assert server.ask(says())[0] == 200


def test_bodies_that_are_held_back_leave_room_for_small_ones(server):
    large, part = says(padding="x" * 190_000), b"x" * 150_000
    held = [connect(server, head(199_000) + part) for _ in range(2)]
    until(lambda: server.metric("mimo_body_bytes") == 2 * 199_000)
    assert server.ask(says())[0] == 200
    late = connect(server, head(190_100) + part)
    # It waits until there is room, as the others are refused in time.
    late.sendall(b" " * 40_100)
    for client in held:
        assert error_of(received(client))[0] == 408
    assert error_of(received_one(late))[0] == 400
    until(lambda: server.metric("mimo_body_bytes") == 0)
    status, reply = server.ask(large)
    assert (status, bool(answer_of(reply))) == (200, True)


def received_one(client):
    """One reply of a connection that stays open."""
    data = b""
    while b"\r\n\r\n" not in data or b"}}" not in data:
        data += client.recv(65_536)
    client.close()
    return data.decode()


def test_a_client_that_does_not_read_is_left(server):
    body = says(n=16, temperature=5, max_tokens=120, logprobs=True, top_logprobs=20, stream=True)
    data = json.dumps(body).encode()
    clients = []
    for _ in range(4):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", server.port))
        # One after the other, as one alone may fit what the kernel keeps for the client.
        client.sendall(3 * (head(len(data)) + data))
        clients.append(client)
    until(lambda: timeouts(server, "write"))
    until(lambda: server.metric("mimo_running") == 0)
    for client in clients:
        client.close()
    assert server.ask(says())[0] == 200


def test_the_cache_bounds_how_many_are_answered_at_once(server):
    """Half of 6 MB, at 2 KiB a token, are twelve slots of 128 tokens."""
    expected = [
        answer_of(server.ask(says(max_tokens=20, seed=n, temperature=1))[1]) for n in range(4)
    ]
    most = 0
    with ThreadPoolExecutor(16) as clients:
        body = says(max_tokens=20, temperature=1)
        replies = [clients.submit(server.ask, {**body, "seed": n % 4}) for n in range(64)]
        while not all(reply.done() for reply in replies):
            most = max(most, server.metric("mimo_running"))
            assert server.metric("mimo_cache_tokens") <= 12 * 128
    assert [answer_of(reply.result()[1]) for reply in replies] == expected * 16
    assert 0 < most <= 12


def test_an_answer_that_never_fits_is_refused_with_both_numbers(build_model):
    scheduler = SimpleNamespace(seq_length=4096)
    worker = Worker(SimpleNamespace(scheduler=lambda: scheduler), 4, 8, cache_tokens=1024)
    sample = SimpleNamespace(tokens=SimpleNamespace(ids=[1] * 900))
    worker.submit(sample, Options(max_new_tokens=124), None)
    with pytest.raises(CacheTooSmallError, match=r"may take 1,152 tokens of .* but 1,024 fit"):
        worker.submit(sample, Options(max_new_tokens=125), None)


def test_a_cache_gives_back_what_it_does_not_need():
    """Sixteen short sequences and then a long one are not sixteen long ones."""
    cache = KeyValueCache(torch.zeros(1, 0, 1, 2, 0), torch.zeros(1, 0, 1, 0, 2), 16 * 128)
    cache.reserve(16, 100)
    cache.keys[:] = torch.arange(16.0)[:, None, None, None]
    cache.reserve(3, 500)
    assert (cache.batch_size, cache.length) == (3, 512)
    assert cache.keys[0, :, 0, 0, :128].tolist() == [[float(slot)] * 128 for slot in range(3)]
    cache.reserve(4, 300)
    assert (cache.batch_size, cache.length) == (4, 512)


# 1,024 tokens of the tiny model in half of it; a quarter is for the prefix cache, and half of the
# rest for growing: three slots of 128 tokens.
LITTLE = 2 * 1024 * 2048
QUESTIONS = [f"Digit {word}. Which digit is this?" for word in ("one", "two", "three", "four")] * 2


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(api, "free_bytes", lambda device: LITTLE)


@pytest.fixture
def slots(monkeypatch):
    """The tokens that the cache's slots held, before and after each time that they changed."""
    seen, reserve = [], KeyValueCache.reserve

    def reserve_and_see(self, *size):
        before = self.batch_size * self.length
        reserve(self, *size)
        seen.append((before, self.batch_size * self.length))

    monkeypatch.setattr(KeyValueCache, "reserve", reserve_and_see)
    return seen


def test_answers_wait_until_the_free_memory_holds_them(checkpoint, build_model, monkeypatch, slots):
    """In Python, and so in evaluate.py; on several ranks the one with the least decides."""
    expected = Mimo(open_checkpoint(checkpoint)).generate(QUESTIONS)
    assert max(after for _, after in slots) == 8 * 128
    slots.clear()
    monkeypatch.setattr(api, "free_bytes", lambda device: LITTLE)
    model = Mimo(open_checkpoint(checkpoint))
    assert model.generate(QUESTIONS) == expected
    assert max(after for _, after in slots) == 3 * 128
    # What a cache is copied from and to fits, too, beside the prefixes.
    assert max(before + after for before, after in slots) <= 1024 - 1024 // 4
    assert model.generate(QUESTIONS[:2], batch_size=1) == expected[:2]


def test_an_answer_that_the_free_memory_cannot_hold_is_refused(
    checkpoint, build_model, monkeypatch, little_memory
):
    """Each with both numbers; those beside it are answered."""
    model = Mimo(open_checkpoint(checkpoint))
    longer = Scheduler(model.engine, model.tokenizer, 4096)
    monkeypatch.setattr(model, "scheduler", lambda options: longer)
    message = r"sample prompt: the prompt and its answer may take 512 tokens of .* but 384 fit"
    with pytest.raises(ValueError, match=message):
        model.generate("hi", max_new_tokens=400)
    with pytest.raises(ValueError, match=message):
        list(model.stream("hi", max_new_tokens=400))
    samples = [model.encode({"key": str(n), "conversations": says()["messages"]}) for n in range(2)]
    long, short = samples[0], samples[1]
    long.tokens.ids.extend(long.tokens.ids[-1:] * 400)
    answers = dict(model.iter_answers(iter([(0, long), (1, short)]), Options(max_new_tokens=4)))
    assert "but 384 fit" in answers[0].error
    assert answers[1].error is None
    assert len(answers[1].tokens) > 0


def test_too_little_memory_for_any_answer_is_one_line(checkpoint, build_model, monkeypatch):
    monkeypatch.setattr(api, "free_bytes", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"room for \d+ tokens, in 50,000 bytes, but at least 128"):
        Mimo(open_checkpoint(checkpoint))


def test_files_of_questions_are_answered_within_the_free_memory(
    command, little_memory, slots, tmp_path
):
    lines = [{"prompt": question} for question in QUESTIONS]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    command("--input", str(source), "--output", str(target))
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert sorted(answer["line"] for answer in answers) == list(range(1, 9))
    assert all(answer["answer"] for answer in answers)
    assert max(after for _, after in slots) == 3 * 128


def test_a_rank_without_memory_is_one_line_that_says_what_to_lower(checkpoint, tmp_path):
    """The last rank alone lacks it; the other does not wait for it in the next collective."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{json.dumps({'prompt': question})}\n" for question in QUESTIONS))
    flags = ("--tp", "2", "--input", str(source), "--output", str(tmp_path / "out"))
    script = "tests/helpers/small_gpu.py"
    done = ranks.run(script, "avlm_inference", "--ckpt", str(checkpoint), *flags, processes=2)
    assert done.returncode == 2, done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert re.match(r"avlm_inference.py( \[rank 1\])?: error: out of memory: no room", done.stderr)
    assert "lower --batch-size or --max-new-tokens" in done.stderr


def test_a_cache_that_cannot_grow_keeps_what_it_has(checkpoint, build_model, monkeypatch):
    """The prompts that it would have grown for get the error, and the others go on."""
    model = Mimo(open_checkpoint(checkpoint))
    expected = model.generate(QUESTIONS[:2])
    samples = [
        model.encode({"key": text, "conversations": [{"role": "user", "content": text}]})
        for text in QUESTIONS[:3]
    ]
    scheduler, options, answers = model.scheduler(), Options(), {}

    def keep(pieces):
        answers.update({piece.number: piece.answer for piece in pieces if piece.answer})

    keep(scheduler.start([(n, samples[n], options) for n in range(2)]))
    keep(scheduler.step())
    with monkeypatch.context() as patch:

        def fail(self, slots, length):
            self.keys = self.keys.new_zeros(0)
            raise torch.OutOfMemoryError("CUDA out of memory.")

        patch.setattr(KeyValueCache, "reserve", fail)
        with pytest.raises(torch.OutOfMemoryError, match="no room for 3 slots of"):
            scheduler.start([(2, samples[2], options)])
    scheduler.abort([2])
    while len(scheduler):
        keep(scheduler.step())
    assert [answers[n].text for n in range(2)] == expected
    keep(scheduler.start([(2, samples[2], options)]))
    scheduler.cancel_all()


@pytest.mark.parametrize("line", ["Transfer-Encoding: chunked", "transfer-encoding: Chunked"])
def test_a_body_of_two_lengths_is_refused(server, line):
    """By either length another request would begin elsewhere."""
    smuggled = head(None, "/v1/models", "GET")
    reply = received(connect(server, head(5, PATH, "POST", line) + b"0\r\n\r\n" + smuggled))
    status, message = error_of(reply)
    assert (status, "Content-Length together with" in message) == (400, True)
    assert "connection: close" in reply.lower()
    assert reply.count("HTTP/1.1") == 1
    old = head(None, PATH, "POST", line).replace(b"HTTP/1.1", b"HTTP/1.0")
    assert error_of(received(connect(server, old + b"0\r\n\r\n")))[0] == 400


def png(*size):
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    return file.getvalue()


def wav(samples, rate):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(samples), rate, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ([], 0),
        ([png(300, 200)], 60_000),
        ([png(300, 200), wav(70_000, 16_000), png(10, 10)], 70_000),
        ([b"no file"], 0),
        ([png(20_000, 20_000)], 0),
        ([b"\0\0\0\x18ftypmp42" + bytes(5000)], 2**62),
    ],
)
def test_what_a_file_takes_is_known_from_its_head(files, size):
    record = {"key": "a", "conversations": [{}], "any": [Blob("a", data) for data in files]}
    assert decoded_size(record) == size


def test_who_needs_more_than_is_left_waits_and_others_pass():
    async def share():
        budget, events = Budget(10), []

        async def take(name, units, released, seconds=None):
            try:
                async with budget.share(units, seconds):
                    events.append(name)
                    await released.wait()
            except BudgetSpentError:
                events.append(f"{name} spent")

        first, others = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(take("most", 8, first))]
        # As much as there is counts as all.
        tasks.append(asyncio.create_task(take("all", 2**62, others)))
        tasks.append(asyncio.create_task(take("late", 5, others, seconds=0.01)))
        tasks.append(asyncio.create_task(take("small", 2, others)))
        left = asyncio.create_task(take("left", 3, others))
        await tasks[2]
        assert events == ["most", "small", "late spent"]
        left.cancel()
        others.set()
        await tasks[3]
        first.set()
        await asyncio.gather(*tasks)
        assert events == ["most", "small", "late spent", "all"]
        assert (budget.used, budget.waiters) == (0, [])

    asyncio.run(share())
