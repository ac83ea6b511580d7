"""The clients that people use, each with text, a picture, a recording, a history and a stream.

Every way of asking must give the answer that a plain request with the plainest messages gets. The
clients of the extra `clients` are skipped where they are not installed; `make test-clients`
installs them.
"""

import asyncio
import base64
import importlib.util
import json
import os
import shutil
import subprocess

import pytest

from demos.digits.questions import NUMBERS
from tests.helpers.commands import QUESTION
from tests.helpers.served import KEY, answer_of, encoded, user

pytest.importorskip("starlette")
# Litellm would fetch its list of prices from the network when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
MODEL = "tiny_avlm"
MEDIA_QUESTIONS = [f"{verb} {thing}." for verb in ("Name", "Say", "Add") for thing in NUMBERS]
# LangChain keeps its asynchronous connections, which belong to the loop they were opened in.
LOOP = asyncio.new_event_loop()


def in_lines(file, kind):
    """A data: URL as some encoders write it: parameters, capitals, lines of 76 characters."""
    data = base64.encodebytes(file.read_bytes()).decode()
    return f"DATA:{kind};charset=utf-8;Base64,{data}"


def asked(*parts, text):
    parts = [*parts, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def picture(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def recording(data):
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def conversations(media, question):
    """Name -> (messages as clients send them, the plainest messages that mean the same)."""
    png, wav = media / "white.png", media / "second.wav"
    first, said = user("One. Which digit is this?", media, "i"), "one"
    again = user(QUESTION)
    listed = [{"type": "text", "text": said}]
    url = f"data:image/png;base64,{encoded(png)}"
    return {
        "text": ([{"role": "user", "content": QUESTION}],) * 2,
        "parts": (
            [asked({"type": "text", "text": "Which "}, text="is even?")],
            [{"role": "user", "content": "Which is even?"}],
        ),
        "picture": (
            [asked(picture(url, detail="high"), text=question)],
            [user(question, media, "i")],
        ),
        "picture in lines": (
            [asked(picture(in_lines(png, "image/png"), detail="auto"), text=question)],
            [user(question, media, "i")],
        ),
        "recording": (
            [asked(recording(encoded(wav)), text=question)],
            [user(question, media, "a")],
        ),
        "recording in lines": (
            [asked(recording(in_lines(wav, "audio/wav")), text=question)],
            [user(question, media, "a")],
        ),
        "both": (
            [asked(picture(url), recording(encoded(wav)), text=question)],
            [user(question, media)],
        ),
        "history": (
            [first, {"role": "assistant", "content": listed}, again],
            [first, {"role": "assistant", "content": said}, again],
        ),
        "history without an answer": (
            [
                {"role": "system", "content": [{"type": "text", "text": "Digit eight."}]},
                {"role": "user", "content": "Which is it?", "name": "ann"},
                {"role": "assistant", "content": None},
                {"role": "user", "content": QUESTION},
            ],
            [
                {"role": "developer", "content": "Digit eight."},
                {"role": "user", "content": "Which is it?"},
                {"role": "assistant", "content": ""},
                {"role": "user", "content": QUESTION},
            ],
        ),
    }


NAMES = (
    *("text", "parts", "picture", "picture in lines", "recording", "recording in lines", "both"),
    *("history", "history without an answer"),
)


def url_of(served):
    return f"http://127.0.0.1:{served.port}/v1"


def openai_whole(served, messages):
    reply = served.client().chat.completions.create(
        model=MODEL, messages=messages, max_tokens=64, max_completion_tokens=None, stop=None
    )
    assert reply.usage.completion_tokens > 0
    return reply.choices[0].message.content


def openai_stream(served, messages):
    chunks = served.client().chat.completions.create(model=MODEL, messages=messages, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def openai_helper(served, messages):
    events = []
    with served.client().chat.completions.stream(
        model=MODEL, messages=messages, logprobs=True
    ) as stream:
        events = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert message.role == "assistant"
    assert "content.delta" in events
    assert {"content.done", "logprobs.content.done"} <= set(events)
    return message.content


def in_a_loop(served, ask):
    """The result of `ask(client)` with OpenAI's asynchronous client."""
    import openai

    async def run():
        async with openai.AsyncOpenAI(
            base_url=url_of(served), api_key=KEY, max_retries=0
        ) as client:
            return await ask(client.chat.completions)

    return LOOP.run_until_complete(run())


def openai_async(served, messages):
    async def ask(chat):
        reply = await chat.create(model=MODEL, messages=messages, user="ann", store=False)
        return reply.choices[0].message.content

    return in_a_loop(served, ask)


def openai_async_stream(served, messages):
    async def ask(chat):
        chunks = await chat.create(model=MODEL, messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    return in_a_loop(served, ask)


def openai_async_helper(served, messages):
    async def ask(chat):
        async with chat.stream(model=MODEL, messages=messages) as stream:
            texts = [event.delta async for event in stream if event.type == "content.delta"]
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "".join(texts)
        return "".join(texts)

    return in_a_loop(served, ask)


def litellm_keywords(served, messages):
    key = {"api_base": url_of(served), "api_key": KEY}
    return {"model": f"openai/{MODEL}", "messages": messages, "num_retries": 0, **key}


def litellm_whole(served, messages):
    import litellm

    reply = litellm.completion(**litellm_keywords(served, messages), temperature=0, top_p=1)
    assert reply.choices[0].finish_reason == "stop"
    return reply.choices[0].message.content


def litellm_stream(served, messages):
    import litellm

    chunks = litellm.completion(**litellm_keywords(served, messages), stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def litellm_async(served, messages):
    import litellm

    reply = LOOP.run_until_complete(litellm.acompletion(**litellm_keywords(served, messages)))
    return reply.choices[0].message.content


def langchain(served):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model=MODEL, base_url=url_of(served), api_key=KEY, max_retries=0, stream_usage=True
    )


def langchain_messages(messages):
    from langchain_core.messages import convert_to_messages

    # LangChain's own classes have no null; it sends an empty answer as one.
    return convert_to_messages([{**m, "content": m["content"] or ""} for m in messages])


def langchain_invoke(served, messages):
    reply = langchain(served).invoke(langchain_messages(messages))
    assert reply.response_metadata["finish_reason"] == "stop"
    return reply.content


def langchain_stream(served, messages):
    chunks = list(langchain(served).stream(langchain_messages(messages)))
    assert sum(chunk.usage_metadata is not None for chunk in chunks) == 1
    return "".join(chunk.content for chunk in chunks)


def langchain_async(served, messages):
    return LOOP.run_until_complete(langchain(served).ainvoke(langchain_messages(messages))).content


def curl(served, body):
    command = ["curl", "--silent", "--show-error", "--fail", "--no-buffer", "--data", "@-"]
    headers = [f"Authorization: Bearer {KEY}", "Content-Type: application/json; charset=utf-8"]
    command += [word for header in headers for word in ("--header", header)]
    command.append(f"{url_of(served)}/chat/completions")
    done = subprocess.run(
        command, input=json.dumps(body), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def curl_whole(served, messages):
    nulls = dict.fromkeys(("temperature", "max_tokens", "tools", "seed", "n", "stream_options"))
    return answer_of(json.loads(curl(served, {"messages": messages, **nulls})))


def curl_stream(served, messages):
    *lines, end = curl(served, {"messages": messages, "stream": True}).strip().split("\n\n")
    assert end == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert ["role" in delta for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    return "".join(delta.get("content", "") for delta in deltas)


WAYS = {
    "openai": (openai_whole, openai_stream, openai_helper),
    "openai, async": (openai_async, openai_async_stream, openai_async_helper),
    "litellm": (litellm_whole, litellm_stream, litellm_async),
    "langchain_openai": (langchain_invoke, langchain_stream, langchain_async),
    "curl": (curl_whole, curl_stream),
}
CASES = [(client, way) for client, ways in WAYS.items() for way in ways]


def is_installed(client):
    if client == "curl":
        return shutil.which("curl") is not None
    return importlib.util.find_spec(client.partition(",")[0]) is not None


@pytest.fixture(scope="module")
def question(served, media):
    """Its answer is another without the picture, without the recording, and without both."""
    for question in MEDIA_QUESTIONS:
        messages = user(question), *(user(question, media, kinds) for kinds in ("i", "a", "ia"))
        alone, *one, both = (answer_of(served.ask({"messages": [m]})[1]) for m in messages)
        if alone not in {*one, both} and both not in one:
            return question
    pytest.fail("the model's answers do not depend on pictures and recordings")


@pytest.fixture(scope="module")
def expected(served, media, question):
    """The answers to the plainest messages."""
    plain = {name: messages for name, (_, messages) in conversations(media, question).items()}
    return {name: answer_of(served.ask({"messages": plain[name]})[1]) for name in NAMES}


@pytest.mark.parametrize(("client", "way"), CASES, ids=[way.__name__ for _, way in CASES])
@pytest.mark.parametrize("name", NAMES)
def test_every_client_gets_the_plain_answer(served, media, question, expected, client, way, name):
    if not is_installed(client):
        pytest.skip(f"{client} is not installed; make test-clients does that")
    messages, _ = conversations(media, question)[name]
    assert way(served, messages) == expected[name]


def test_the_answers_differ_so_the_comparison_means_something(served, question, expected):
    alone = answer_of(served.ask({"messages": [user(question)]})[1])
    assert alone not in {expected["picture"], expected["recording"], expected["both"]}
    assert expected["both"] not in {expected["picture"], expected["recording"]}
    assert all(expected.values())


def test_the_matrix_is_of_a_hundred_requests():
    assert len(CASES) * len(NAMES) >= 100
