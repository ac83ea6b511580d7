"""The server answers OpenAI's client as the command answers, under load and with any option."""

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import psutil
import pytest

from tests.helpers.commands import QUESTION
from tests.helpers.served import KEY, Served, answer_of, encoded, says, until, user

pytest.importorskip("openai")
pytest.importorskip("starlette")
ROUNDS = 5


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
    expected = command(*files, "--prompt", "<image><audio>What is it?")
    assert seen.choices[0].message.content == expected
    assert "".join(t.token for t in seen.choices[0].logprobs.content).strip() == expected.strip()
    assert all(t.logprob <= 0 for t in seen.choices[0].logprobs.content)
    stream = chat(
        model=model.id,
        messages=[user("What is it?", media)],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == expected
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == seen.usage


def test_a_null_is_an_absent_field(served):
    """Whatever a client's own class of requests has, it may send as null."""
    question = {"role": "user", "content": QUESTION}
    expected = answer_of(served.ask({"messages": [question], "max_tokens": 5})[1])
    names = (
        *("max_completion_tokens", "stop", "n", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "logprobs"),
        *("top_logprobs", "stream", "stream_options", "tools", "tool_choice", "functions"),
        *("function_call", "parallel_tool_calls", "response_format", "modalities", "audio"),
        *("user", "metadata", "store", "service_tier", "model", "prediction", "reasoning_effort"),
    )
    nulls = dict.fromkeys(names)
    silent = dict.fromkeys(("name", "tool_calls", "function_call", "refusal", "audio"))
    messages = [question | silent]
    assert answer_of(served.ask({"messages": messages, "max_tokens": 5, **nulls})[1]) == expected
    for name in names:
        status, reply = served.ask({"messages": messages, "max_tokens": 5, name: None})
        assert (status, answer_of(reply)) == (200, expected), name
    # Values at which a field changes nothing, and numbers as some languages write them.
    body = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "store": False}
    body |= {"max_tokens": 5.0, "n": 1.0, "seed": -1.0, "metadata": {"a": "b"}, "user": "ann"}
    assert answer_of(served.ask({"messages": messages, **body})[1]) == expected
    assert (
        answer_of(
            served.ask({"messages": messages, "max_tokens": 9, "max_completion_tokens": 5})[1]
        )
        == expected
    )


@pytest.mark.parametrize(
    "spell",
    [
        lambda data: data,
        lambda data: data.rstrip("="),
        lambda data: data.replace("+", "-").replace("/", "_"),
        lambda data: "\r\n".join(data[i : i + 64] for i in range(0, len(data), 64)) + "\n",
        lambda data: f"data:audio/wav;base64,{data}",
        lambda data: f" Data:audio/wav;codecs=1;BASE64, {data}\n",
        lambda data: f"data:;base64,{quote(data, safe='')}",
    ],
)
@pytest.mark.parametrize("kind", ["input_audio", "audio_url", "input_file"])
def test_base64_as_encoders_write_it(served, media, spell, kind):
    data = spell(encoded(media / "second.wav"))
    if kind == "audio_url" and not data.strip().lower().startswith("data:"):
        data = f"data:audio/x-wav;rate=16000;base64,{data}"
    part = {
        "input_audio": {"input_audio": {"data": data, "format": "mp3"}},
        "audio_url": {"audio_url": {"url": data, "detail": "low"}},
        "input_file": {"modality": "audios", "data": data},
    }[kind]
    plain = user("Name it.", media, "a")
    message = {"role": "user", "content": [{"type": kind, **part}, plain["content"][1]]}
    body = {"max_tokens": 2, "logprobs": True}
    reply = served.ask({"messages": [message], **body})[1]
    expected = served.ask({"messages": [plain], **body})[1]
    assert reply["choices"][0]["message"] == expected["choices"][0]["message"]
    # How likely an answer is tells every recording apart.
    logprobs = [
        [e["logprob"] for e in r["choices"][0]["logprobs"]["content"]] for r in (reply, expected)
    ]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5)


def test_the_model_by_its_name(served):
    import openai

    client = served.client()
    assert client.models.retrieve("tiny_avlm") == next(iter(client.models.list()))
    for name in ("tiny", "tiny_avlm/other", "gpt-4o"):
        with pytest.raises(openai.NotFoundError) as error:
            client.models.retrieve(name)
        assert error.value.body == {
            "message": f"the model '{name}' does not exist; this server has tiny_avlm",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    assert served.get("/v1/models/tiny_avlm", Authorization="")[0] == 401


@pytest.mark.parametrize("sampling", [{}, {"temperature": 3, "seed": 2, "n": 3}])
def test_streamed_logprobs_come_with_their_text(served, sampling):
    body = {"messages": [user("Name it.")], "logprobs": True, "top_logprobs": 3, **sampling}
    whole = served.ask(body)[1]["choices"]
    streamed = {choice["index"]: [] for choice in whole}
    chunks = served.stream(body)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
    assert len(chunks) > 10
    for choice in whole:
        content = choice["logprobs"]["content"]
        assert [e["token"] for e in streamed[choice["index"]]] == [e["token"] for e in content]
        logprobs = [entry["logprob"] for entry in content]
        assert [e["logprob"] for e in streamed[choice["index"]]] == pytest.approx(logprobs)
        data = b"".join(bytes(entry["bytes"]) for entry in content)
        text = choice["message"]["content"]
        assert data == text.encode() or "\ufffd" in text
        for entry in content:
            assert len(entry["top_logprobs"]) == 3
            best = [other["logprob"] for other in entry["top_logprobs"]]
            assert best == sorted(best, reverse=True)
            assert max(best) >= entry["logprob"] - 1e-6
            if not sampling:
                assert entry["top_logprobs"][0]["token"] == entry["token"]


def test_penalties_are_those_of_the_command_and_change_answers(served, command):
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 2, "seed": 3}
    penalties = {"frequency_penalty": -1.5, "presence_penalty": -2}
    flags = ("--prompt", QUESTION, "--temperature", "2", "--seed", "3", "--max-new-tokens", "128")
    names = ("--frequency-penalty", "-1.5", "--presence-penalty", "-2")
    answer = answer_of(served.ask({**body, **penalties, "max_tokens": 128})[1])
    assert answer == command(*flags, *names)
    assert answer != answer_of(served.ask({**body, "max_tokens": 128})[1])


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
    stop = whole[8:12]
    cut = served.ask({"messages": body["messages"], "stop": [stop]})[1]
    assert answer_of(cut) == whole[: whole.index(stop)]


def test_a_conversation_with_a_system_text(served, command):
    turns = [user("One. Which digit is this?"), {"role": "assistant", "content": "one"}]
    body = {"messages": [*turns, user(QUESTION)]}
    assert served.ask(body)[0] == 200
    told = {"messages": [{"role": "system", "content": "Digit eight."}, user("Which is it?")]}
    assert answer_of(served.ask(told)[1]) == command("--prompt", "Digit eight.\nWhich is it?")
    # In its place; this model's template gives each a line.
    told = [user("One."), {"role": "developer", "content": "Two."}, user("Three.")]
    for messages, text in ((told, "One.\nTwo.\nThree."), (told[:2], "One.\nTwo.")):
        expected = command("--prompt", text, "--max-new-tokens", "5")
        assert answer_of(served.ask({"messages": messages, "max_tokens": 5})[1]) == expected


def test_words_that_spell_a_placeholder_are_words(served, media):
    """Whoever says them; a file has its place from its part alone."""
    words = "What does <image> mean?"
    said = {"role": "assistant", "content": words}
    system = {"role": "system", "content": words}

    def num_tokens(*messages):
        status, reply = served.ask({"messages": messages, "max_tokens": 1})
        assert status == 200, reply
        return reply["usage"]["prompt_tokens"]

    alone = num_tokens(user(words))
    assert num_tokens({"role": "user", "content": words}) == alone
    assert num_tokens(user(words, media, "i")) == alone + 16
    once = num_tokens(user("hi"))
    assert num_tokens(system, user("hi")) > once + 5
    assert num_tokens(user("hi"), said, user("hi")) > 2 * once + 5
    assert num_tokens({"role": "user", "content": "<image>"}) > num_tokens(user("hi"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(served, stream):
    before = served.metric("mimo_left_total")
    body = json.dumps(says(n=16, temperature=5, max_tokens=120, stream=stream))
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall((head + body).encode())
        until(lambda: served.metric("mimo_running"))
    until(lambda: not served.metric("mimo_running"))
    assert served.metric("mimo_waiting") == 0
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
    expected = [answer_of(served.ask(body)[1]) for body in bodies]
    server = psutil.Process(served.process.pid)

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
            result = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        else:
            result = answer_of(served.ask(body)[1])
        return result

    memory = []
    with ThreadPoolExecutor(16) as clients:
        for _ in range(ROUNDS):
            result = list(clients.map(ask, range(48)))
            assert result == [expected[number % len(bodies)] for number in range(48)]
            memory.append(server.memory_info().rss)
    # The keys and values of a sequence are 256 KiB; one of each request left behind: 48 MiB.
    assert memory[-1] - memory[0] < 8 * 2**20


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
    server.process.wait(timeout=60)
    assert "the model failed" not in server.said()
