"""The server answers OpenAI's client as the command answers, whatever else is asked of it."""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from PIL import Image

from benchmarks import ranks
from tests.conftest import ROOT, run_command

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")

QUESTION = "Digit eight. Which digit is this?"
KEY = "let me in"


class Served:
    """A server process."""

    def __init__(self, checkpoint, *flags, processes=0, key=KEY):
        self.port = ranks._free_port()
        launch = [sys.executable]
        if processes:
            launch += ["-m", "torch.distributed.run", "--standalone"]
            launch += ["--nproc-per-node", str(processes)]
        launch += [str(ROOT / "examples/mimo/serve.py"), "--ckpt", str(checkpoint)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MIMO_API_KEY": key}
        self.process = subprocess.Popen(
            [*launch, "--port", str(self.port), *flags], env=environment, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.stderr.read()
            try:
                assert self.get("/health")[0] == 200
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("the server does not answer")

    def send(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {KEY}", **headers}
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        found = reply.status, reply.read()
        connection.close()
        return found

    def get(self, path, **headers):
        return self.send("GET", path, **headers)

    def ask(self, body, **headers):
        """Status and JSON of a chat completion; `body` is sent as it is, or as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        status, reply = self.send("POST", "/v1/chat/completions", data, **headers)
        return status, json.loads(reply)

    def metric(self, name):
        found = re.search(rf"^{name} (\S+)$", self.get("/metrics")[1].decode(), re.MULTILINE)
        return float(found[1])

    def client(self):
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0
        )

    def end(self):
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(timeout=30) == 0
        return self.process.stderr.read().decode()


@pytest.fixture(scope="module")
def served(checkpoint):
    server = Served(checkpoint)
    yield server
    said = server.end()
    assert said.count("\n") == 1, said
    assert "with an API key" in said


def encoded(file):
    return base64.b64encode(file.read_bytes()).decode()


def user(text, media=None, items="ia"):
    """A message with a picture, a recording, and text."""
    parts = []
    if media and "i" in items:
        url = f"data:image/png;base64,{encoded(media / 'white.png')}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    if media and "a" in items:
        sound = {"data": encoded(media / "second.wav"), "format": "wav"}
        parts.append({"type": "input_audio", "input_audio": sound})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def answer_of(reply):
    return reply["choices"][0]["message"]["content"]


@pytest.fixture
def command(ask, checkpoint, capsys):
    def said(*flags):
        ask("--ckpt", str(checkpoint), *flags)
        return capsys.readouterr().out.rstrip("\n")

    return said


def test_openais_client(served, media, command):
    client = served.client()
    (model,) = client.models.list()
    chat = client.chat.completions.create
    text = chat(model=model.id, messages=[{"role": "user", "content": QUESTION}])
    assert text.choices[0].message.content == command("--prompt", QUESTION)
    assert text.choices[0].finish_reason == "stop"
    assert text.usage.total_tokens == text.usage.prompt_tokens + text.usage.completion_tokens
    files = ("--image-path", str(media / "white.png"), "--audio-path", str(media / "second.wav"))
    seen = chat(model=model.id, messages=[user("What is it?", media)], logprobs=True)
    wanted = command(*files, "--prompt", "<image><audio>What is it?")
    assert seen.choices[0].message.content == wanted
    assert "".join(t.token for t in seen.choices[0].logprobs.content).strip() == wanted.strip()
    assert all(t.logprob <= 0 for t in seen.choices[0].logprobs.content)
    stream = chat(
        model=model.id,
        messages=[user("What is it?", media)],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == wanted
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == seen.usage


def test_choices_seeds_and_stops(served, command):
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 2,
        "seed": 3,
        "n": 5,
    }
    first, again, other = (served.ask({**body, "seed": seed})[1] for seed in (3, 3, 4))
    texts = [[c["message"]["content"] for c in r["choices"]] for r in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    flags = ("--prompt", QUESTION, "--temperature", "2", "--seed", "3", "--samples", "5")
    assert "\n".join(texts[0]) == command(*flags, "--max-new-tokens", "128")
    whole = command("--prompt", QUESTION)
    cut = served.ask({"messages": body["messages"], "stop": [whole[2:4]]})[1]
    assert answer_of(cut) == whole[: whole.index(whole[2:4])]


def test_a_conversation_with_a_system_text(served, command):
    turns = [user("One. Which digit is this?"), {"role": "assistant", "content": "one"}]
    body = {"messages": [*turns, user(QUESTION)]}
    assert served.ask(body)[0] == 200
    told = {"messages": [{"role": "system", "content": "Digit eight."}, user("Which is it?")]}
    assert answer_of(served.ask(told)[1]) == command("--prompt", "Digit eight.\nWhich is it?")


def png(width, height):
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def part(kind, value):
    return {"messages": [{"role": "user", "content": [{"type": kind, kind: value}]}]}


def url(data, kind="image/png"):
    return {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}


def says(**more):
    return {"messages": [{"role": "user", "content": "hi"}], **more}


PICTURE = {"type": "image_url", "image_url": url(b"x")}
MALFORMED = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b'{"messages": "\xff"}', "not JSON"),
    (b"[" * 200_000, "not JSON"),
    (b"[]", "a JSON object"),
    ({}, "messages must be a list"),
    ({"messages": []}, "messages must be a list"),
    ({"messages": [says()["messages"][0]] * 300}, "300 messages"),
    ({"messages": ["hi"]}, "its role must be one of"),
    ({"messages": [{"role": "ghost", "content": "hi"}]}, "its role must be one of"),
    ({"messages": [{"role": ["user"], "content": "hi"}]}, "its role must be one of"),
    ({"messages": [{"role": "user", "content": 5}]}, "content must be text"),
    ({"messages": [{"role": "user", "content": [5]}]}, "must be an object"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be text"),
    ({"messages": [{"role": "user", "content": ""}]}, "says and shows nothing"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "must be the user's"),
    ({"messages": [{"role": "user", "content": "<image>"}]}, "0 image files"),
    ({"messages": [{"role": "user", "content": "word " * 1_000}]}, "do not fit"),
    ({"messages": [{"role": "user", "content": "x" * 1_000_001}]}, "more than 1,000,000"),
    (part("video_url", url(b"")), "its type must be one of text, image_url, audio_url"),
    (part("image_url", {"url": "http://127.0.0.1/a.png"}), "nothing is fetched"),
    (part("image_url", {"url": "file:///etc/passwd"}), "nothing is fetched"),
    (part("image_url", {"url": "data:image/png,abc"}), "must be ;base64"),
    (part("image_url", {"url": "data:image/png;base64,###"}), "damaged base64"),
    (part("image_url", url(b"no picture")), "not an image"),
    (part("image_url", url(b"")), "is empty"),
    (part("image_url", url(png(9_000, 9_000))), "more than 64,000,000"),
    (part("image_url", url(png(20_000, 20_000))), "more than 178,956,970 pixels"),
    (part("image_url", url(png(9_000, 90)[:100])), "damaged image"),
    (part("input_audio", {"data": "AAAA"}), "not sound"),
    (part("image_url", url(b"%!PS-Adobe-3.0 EPSF-3.0\n")), "not an image"),
    (
        {"messages": [says()["messages"][0] | {"content": 65 * [PICTURE]}]},
        "more than 64 pictures and recordings",
    ),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a character"),
    (part("input_audio", "AAAA"), "must be base64"),
    (says(temperature="hot"), "temperature must be a number"),
    (says(temperature=True), "temperature must be a number"),
    (says(temperature=-1), "temperature -1"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "top_p": NaN}', "top_p nan"),
    (says(max_tokens=0), "max_new_tokens 0: at least 1"),
    (says(max_tokens=1.5), "whole number"),
    (says(temperature=10**400), "temperature 1000"),
    (says(top_k=-1), "top_k -1"),
    (b'{"messages": 1' + b"0" * 5_000 + b"}", "integer string conversion"),
    (says(n=1_000), "n 1000: from 1 to 16"),
    (says(stop=[1]), "stop must be text"),
    (says(stop=["a"] * 17), "17 strings"),
    (says(stream="yes"), "stream must be true or false"),
    (says(tools=[{"type": "function"}]), "tools is not offered"),
    (says(response_format={"type": "json_object"}), "response_format is not offered"),
]


@pytest.mark.parametrize(("body", "message"), MALFORMED)
def test_malformed_requests_get_one_sentence(served, body, message):
    status, reply = served.ask(body)
    assert status == 400
    said = reply["error"]["message"]
    assert message in said
    assert "\n" not in said
    assert len(said) < 400


def test_after_them_the_next_request_is_answered(served, command):
    status, reply = served.ask({"messages": [user(QUESTION)]})
    assert status == 200
    assert answer_of(reply) == command("--prompt", QUESTION)


def test_other_refusals(served):
    assert served.ask(says(), Authorization="Bearer wrong")[0] == 401
    assert served.get("/v1/models", Authorization="")[0] == 401
    assert served.get("/v1/models", Host="evil.example")[0] == 400
    assert served.send("POST", "/v1/chat/completions", b"{}")[0] == 415
    assert served.get("/v1/chat/completions")[0] == 405
    assert served.get("/nothing")[0] == 404
    huge = b"x" * 100
    status, _ = served.ask(huge, **{"Content-Length": str(10**12)})
    assert status == 413


def test_too_large_a_body_is_refused_before_it_is_read(checkpoint):
    small = ("--max-body-megabytes", "0.1", "--max-batch", "1", "--max-waiting", "2")
    server = Served(checkpoint, *small)
    status, reply = server.ask(says(padding="x" * 200_000))
    assert (status, "more than 104,857" in reply["error"]["message"]) == (413, True)
    # Chunked, without a length that could be checked first.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request(
        "POST", "/v1/chat/completions", iter([b"x" * 50_000] * 3), headers, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()
    # One is worked on and two wait; sixteen at once are too many.
    status, reply = server.ask(says(n=16, temperature=3))
    assert (status, "too many requests" in reply["error"]["message"]) == (503, True)
    assert server.ask(says())[0] == 200
    server.end()


def test_a_client_that_leaves_frees_its_places(served):
    before = served.metric("mimo_left_total")
    body = json.dumps(says(n=16, temperature=5, max_tokens=120)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    )
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for stream in (b"", b"S"):
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            sent = body.replace(b'"n"', b'"stream": true, "n"') if stream else body
            client.sendall(head.replace(str(len(body)), str(len(sent))).encode() + sent)
            deadline = time.monotonic() + 10
            while not served.metric("mimo_running") and time.monotonic() < deadline:
                time.sleep(0.001)
    deadline = time.monotonic() + 10
    while served.metric("mimo_running") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.metric("mimo_running") == served.metric("mimo_waiting") == 0
    assert served.metric("mimo_left_total") > before


def test_many_clients_at_once(served, media):
    """None lost, none mixed up, and memory is flat after the first."""
    kinds = [("", "i"), ("", "a"), ("", "ia"), (QUESTION, ""), ("Name it.", "i"), (QUESTION, "ia")]
    bodies = [
        {"messages": [user(f"{text or 'What is it?'}", media, items)]} for text, items in kinds
    ]
    bodies += [
        {
            "messages": [user(f"Digit {word}. Which digit is this?")],
            "temperature": 1.5,
            "seed": seed,
        }
        for word in ("one", "two", "three")
        for seed in range(2)
    ]
    wanted = [answer_of(served.ask(body)[1]) for body in bodies]
    memory, server = [], psutil.Process(served.process.pid)

    def ask(number):
        body = bodies[number % len(bodies)]
        if number % 3 == 0:
            reply = served.client().chat.completions.create(
                model="m",
                messages=body["messages"],
                stream=True,
                temperature=body.get("temperature", 0),
                seed=body.get("seed", 0),
            )
            found = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        else:
            found = answer_of(served.ask(body)[1])
        memory.append(server.memory_info().rss)
        return found

    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(ask, range(200)))
    assert found == [wanted[number % len(bodies)] for number in range(200)]
    assert max(memory[150:]) < 1.03 * max(memory[:50])


def test_served_by_tensor_and_pipeline_parallel_ranks(checkpoint, media, served):
    bodies = [
        {"messages": [user(QUESTION)]},
        {"messages": [user("What is it?", media)]},
        {"messages": [user("What is it?", media)], "temperature": 2, "seed": 1},
    ]
    server = Served(checkpoint, "--tp", "2", processes=2)
    for body in bodies:
        assert answer_of(server.ask(body)[1]) == answer_of(served.ask(body)[1])
    # Torchrun calls any signal a failure; the ranks themselves end in order.
    server.process.send_signal(signal.SIGINT)
    assert "the model failed" not in server.process.communicate(timeout=60)[1].decode()


def test_a_port_that_is_taken_ends_with_one_line(checkpoint, served):
    flags = ("--ckpt", str(checkpoint), "--port", str(served.port))
    done = ranks.run("examples/mimo/serve.py", *flags)
    assert done.returncode == 2
    assert f"--port {served.port}: Address already in use; name another" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_an_empty_api_key_is_none(monkeypatch):
    monkeypatch.setenv("MIMO_API_KEY", "")
    done = run_command("serve.py", "--ckpt", "none", "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "lets other machines in; put an API key" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--host", "0.0.0.0"), "lets other machines in; put an API key"),
        (("--port", "0"), "--port 0: from 1 to 65535"),
        (("--max-batch", "0"), "--max-batch 0: more than 0"),
        (("--prefixes", "-1"), "--prefixes -1: 0 or more"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    done = ranks.run("examples/mimo/serve.py", "--ckpt", "none", *flags)
    assert done.returncode == 2
    assert message in done.stderr
