"""The server takes a modality that it has never heard of: nothing in it names one."""

import base64
import dataclasses

import pytest
import torch

from examples.mimo import Mimo
from examples.mimo.generation.scheduler import Answer, Piece

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from examples.mimo.serving.app import Limits, Server

LENGTH = 3


@dataclasses.dataclass(frozen=True)
class SensorConfig:
    """A series of numbers in a text file; LENGTH of them make a token."""

    suffixes = (".csv", ".series")
    max_tokens = 8

    def read(self, source):
        return [float(value) for value in source.data.decode().split(",")]

    def preprocess(self, raw):
        return {"patches": torch.tensor(raw).reshape(1, -1, LENGTH)}

    def num_tokens(self, inputs):
        return inputs["patches"].shape[1]


class Echo:
    """A worker that answers with what the encoder would get."""

    num_running = num_waiting = 0

    def submit(self, sample, options, callback):
        text = str([inputs["patches"].tolist() for inputs in sample.media["sensors"]])
        callback(Piece(0, text, Answer(text, [7], "stop")))
        return 0

    def cancel(self, number):
        return False


@pytest.fixture
def client(tiny, tokenizer):
    model = Mimo.__new__(Mimo)  # without weights, which the worker would need
    sensors = dataclasses.replace(
        tiny.modalities["images"],
        singular="sensor",
        placeholder="<sensor>",
        token_id=261,  # <0xFF>, a byte that no text uses
        encoder=SensorConfig(),
    )
    modalities = {**tiny.modalities, "sensors": sensors}
    model.config = dataclasses.replace(tiny, modalities=modalities)
    model.tokenizer = tokenizer
    return TestClient(Server(model, Echo(), Limits(hosts=("testserver",))).app())


def ask(client, *parts):
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]
    return client.post("/v1/chat/completions", json={"messages": messages})


def encoded(text):
    return base64.b64encode(text.encode()).decode()


def test_it_is_listed_with_its_files(client):
    listed = client.get("/modalities").json()
    names = [modality["name"] for modality in listed["modalities"]]
    assert names == ["images", "audios", "sensors"]
    sensors = listed["modalities"][-1]
    assert sensors == {
        "name": "sensors",
        "singular": "sensor",
        "suffixes": [".csv", ".series"],
        "media_types": ["text/csv"],
    }
    assert "image/png" in listed["modalities"][0]["media_types"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_file", "modality": "sensors", "data": encoded("1,2,3,4,5,6")},
        {
            "type": "input_file",
            "modality": "sensors",
            "data": "data:text/csv;base64," + encoded("1,2,3,4,5,6"),
        },
        {"type": "input_sensor", "input_sensor": {"data": encoded("1,2,3,4,5,6")}},
        {
            "type": "sensor_url",
            "sensor_url": {"url": "data:text/csv;base64," + encoded("1,2,3,4,5,6")},
        },
    ],
)
def test_its_files_reach_the_model(client, part):
    reply = ask(client, part)
    assert reply.status_code == 200, reply.text
    answer = reply.json()["choices"][0]["message"]["content"]
    assert answer == "[[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]]"
    # Two placeholders' worth of tokens more than another of one token.
    shorter = ask(client, {**part, "type": "input_file", "modality": "sensors", "data": "MSwyLDM="})
    assert reply.json()["usage"]["prompt_tokens"] - shorter.json()["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "input_file", "modality": "smells", "data": ""},
            "one of images, audios, sensors",
        ),
        ({"type": "input_file", "modality": "sensors"}, "data must be base64 or a data: URL"),
        ({"type": "input_file", "modality": "sensors", "data": "#"}, "damaged base64"),
        # What reading raises is a ValueError here, and a RuntimeError from `reshape` below.
        ({"type": "input_file", "modality": "sensors", "data": encoded("x")}, "could not convert"),
        (
            {"type": "input_file", "modality": "sensors", "data": encoded("1,2")},
            "invalid for input",
        ),
        ({"type": "smell_url", "smell_url": {}}, "input_sensor, input_file"),
    ],
)
def test_wrong_files_of_it_are_refused_in_one_sentence(client, part, message):
    reply = ask(client, part)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_a_server_that_fails_says_so_as_json(client, monkeypatch):
    def broken(self, record):
        raise RuntimeError("a fault of the server's own")

    monkeypatch.setattr(Mimo, "encode", broken)
    safe = TestClient(client.app, raise_server_exceptions=False)
    reply = ask(safe)
    assert reply.status_code == 500
    assert "its log says why" in reply.json()["error"]["message"]
