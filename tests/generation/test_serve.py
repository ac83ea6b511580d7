"""The server answers OpenAI's client as the command answers, under load and with any option."""

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.helpers.commands import QUESTION
from tests.helpers.served import KEY, Served, answer_of, says, until, user

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
    assert "the model failed" not in server.process.communicate(timeout=60)[1].decode()
