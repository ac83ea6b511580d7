"""What the server refuses, with one sentence, and that it goes on after that."""

import base64
import http.client
import io
import json
import socket

import pytest
from PIL import Image

from tests.helpers import ranks
from tests.helpers.commands import QUESTION, ROOT, run_command
from tests.helpers.served import KEY, Served, answer_of, says, until, user

pytest.importorskip("starlette")


def png(width, height):
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def part(kind, value):
    return {"messages": [{"role": "user", "content": [{"type": kind, kind: value}]}]}


def url(data, kind="image/png"):
    return {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}


def after_a_question(message):
    question = says()["messages"]
    return {"messages": [*question, message, *question]}


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
    ({"messages": [{"role": "user", "content": ""}]}, "has no text and no file"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "must be the user's"),
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
        "more than 64 files",
    ),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a character"),
    (part("input_audio", "AAAA"), "must be base64"),
    (says(temperature="hot"), "temperature must be a number"),
    (says(temperature=True), "temperature must be a number"),
    (says(temperature=-1), "temperature -1"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "top_p": NaN}', "top_p nan"),
    (says(max_tokens=0), "max_tokens 0: at least 1"),
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
    (says(tool_choice="required"), "tool_choice is not offered"),
    (says(logit_bias={"5": 1}), "logit_bias is not offered"),
    (
        says(modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"}),
        'modalities: tiny_avlm answers with text and no sound; leave "audio" out',
    ),
    (says(modalities=["video"]), 'modalities must be ["text"], or ["text", "audio"] for'),
    (says(modalities=[["text"]]), "modalities must be"),
    (says(modalities=[]), "modalities must be"),
    (says(modalities="text"), "modalities must be"),
    (says(audio={"voice": "alloy", "format": "wav"}), 'add "audio" to modalities too'),
    (says(model=5), "model must be text"),
    (says(stream_options=[]), "stream_options must be an object"),
    (says(stop=["a", None]), "stop must be text"),
    (says(max_completion_tokens=None, max_tokens=0), "max_tokens 0: at least 1"),
    (says(max_completion_tokens=-1, max_tokens=5), "max_completion_tokens -1: at least 1"),
    (says(top_logprobs=3), "top_logprobs 3: only with logprobs true"),
    (says(top_logprobs=21, logprobs=True), "top_logprobs 21: from 0 to 20"),
    (says(top_logprobs=1.5, logprobs=True), "top_logprobs must be a whole number"),
    (says(logprobs=3), "logprobs must be true or false"),
    (says(frequency_penalty=2.1), "frequency_penalty 2.1: from -2 to 2"),
    (says(presence_penalty="much"), "presence_penalty must be a number"),
    (says(messages=None), "messages must be a list"),
    ({"messages": [{"role": "user", "content": None}]}, "content must be text"),
    ({"messages": [{"role": "user"}]}, "content must be text"),
    (after_a_question({"role": "assistant", "content": 5}), "content must be text"),
    (
        after_a_question({"role": "assistant", "content": [PICTURE]}),
        "its type must be text; files go",
    ),
    (
        after_a_question({"role": "assistant", "audio": {"id": "a"}}),
        "messages[1].audio.id 'a': this server keeps no such answer (any more); send what it said",
    ),
    (after_a_question({"role": "assistant", "audio": "a"}), "messages[1].audio.id must be the id"),
    (after_a_question({"role": "assistant", "audio": {"id": [1]}}), "audio.id must be the id"),
    (
        after_a_question({"role": "assistant", "tool_calls": [{"id": "c"}]}),
        "messages[1]: tool_calls calls a tool, but this server offers no tools; leave the message",
    ),
    (
        after_a_question({"role": "assistant", "content": "", "function_call": {"name": "f"}}),
        "messages[1]: function_call calls a tool",
    ),
    (
        after_a_question({"role": "tool", "tool_call_id": "c", "content": "5"}),
        "messages[1]: role tool brings the result of a tool, but this server offers no tools; give",
    ),
    (
        after_a_question({"role": "function", "name": "f", "content": "5"}),
        "messages[1]: role function brings the result of a tool",
    ),
    ({"messages": [{"role": "system", "content": "x"}]}, "must be the user's"),
    (part("image_url", {"url": "data:image/png;base64"}), "must be ;base64"),
    (part("image_url", {"url": "data:;base64x,AAAA"}), "must be ;base64"),
    (part("image_url", {"url": " DATA:image/png;BASE64,A"}), "damaged base64"),
    (part("input_audio", {"data": "AAAAA=="}), "damaged base64"),
    (part("input_audio", {"data": "https://example.org/a.wav"}), "damaged base64"),
    (part("input_audio", {"data": None}), "must be base64"),
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
    status, reply = served.get("/nothing")
    assert status == 404
    assert json.loads(reply)["error"]["message"] == "no path '/nothing'; a base URL ends in /v1"
    huge = b"x" * 100
    status, _ = served.ask(huge, **{"Content-Length": str(10**12)})
    assert status == 413


def test_too_large_a_body_is_refused_before_it_is_read(checkpoint):
    small = ("--max-body-megabytes", "0.1", "--max-batch", "1", "--max-waiting", "2")
    server = Served(checkpoint, *small, forked=True)
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


def test_a_port_that_is_taken_ends_with_one_line(checkpoint, served):
    flags = ("--ckpt", str(checkpoint), "--port", str(served.port))
    done = ranks.run("examples/mimo/serve.py", *flags)
    assert done.returncode == 2
    assert f"--port {served.port}: Address already in use; name another" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_the_second_of_two_servers_ends_before_either_has_loaded(checkpoint):
    port, script = ranks.free_port(), str(ROOT / "examples/mimo/serve.py")
    flags = ("--ckpt", str(checkpoint), "--port", str(port))
    first = ranks.Forked([script, *flags], kind="servers")

    def listens():
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(listens)
        done = run_command("serve.py", *flags)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"--port {port}: Address already in use; name another" in done.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


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
        (("--port", "70000"), "--port 70000: from 1 to 65535"),
        (("--host", "192.0.2.1", "--api-key-variable", "PATH"), "--host 192.0.2.1 --port 8000: "),
        (("--host", "nowhere.invalid", "--api-key-variable", "PATH"), "--host nowhere.invalid"),
        (("--max-batch", "0"), "--max-batch 0: more than 0"),
        (("--prefixes", "-1"), "--prefixes -1: 0 or more"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    done = ranks.run("examples/mimo/serve.py", "--ckpt", "none", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
