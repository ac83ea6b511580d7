"""A server process, and what is sent to it."""

import base64
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.helpers import ranks
from tests.helpers.commands import ROOT

KEY = "let me in"


SERVE = "examples/mimo/serve.py"


class Served:
    """A server process: as a user types it, under torchrun with `processes`, or `forked`."""

    def __init__(self, checkpoint, *flags, processes=0, key=KEY, script=SERVE, forked=False):
        self.port = ranks.free_port()
        command = [script, "--ckpt", str(checkpoint), "--port", str(self.port), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MIMO_API_KEY": key}
        if forked:
            self.process = ranks.Launched(
                *command, processes=processes, environment=environment, kind="servers"
            )
            self.stderr = self.process.files[1]
        else:
            self.stderr = tempfile.NamedTemporaryFile()  # noqa: SIM115
            launch = [sys.executable]
            if processes:
                launch += ["-m", "torch.distributed.run", "--standalone"]
                launch += ["--nproc-per-node", str(processes)]
            self.process = subprocess.Popen(
                [*launch, *command], cwd=ROOT, env=environment, stderr=self.stderr
            )
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.said()
            try:
                assert self.get("/health")[0] == 200
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("the server does not answer")

    def send(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Authorization": f"Bearer {KEY}", **headers}
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        result = reply.status, reply.read()
        connection.close()
        return result

    def get(self, path, **headers):
        return self.send("GET", path, **headers)

    def ask(self, body, **headers):
        """Status and JSON of a chat completion; `body` is sent as it is, or as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        status, reply = self.send("POST", "/v1/chat/completions", data, **headers)
        return status, json.loads(reply)

    def stream(self, body):
        """The events of a streamed chat completion, as JSON; without the one that ends it."""
        data = json.dumps({**body, "stream": True}).encode()
        headers = {"Content-Type": "application/json"}
        status, reply = self.send("POST", "/v1/chat/completions", data, **headers)
        assert status == 200, reply
        lines = reply.decode().split("\n\n")
        return [json.loads(x.removeprefix("data: ")) for x in lines if x and "[DONE]" not in x]

    def metric(self, name):
        result = re.search(rf"^{name} (\S+)$", self.get("/metrics")[1].decode(), re.MULTILINE)
        return float(result[1])

    def client(self):
        import openai

        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0
        )

    def end(self):
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(timeout=120) == 0
        return self.said()

    def said(self):
        """What it has printed on stderr."""
        return Path(self.stderr.name).read_text()


class InProcess:
    """A server of a model in this process, whose parts a test can replace; without a key."""

    def __init__(self, model):
        import uvicorn

        from examples.mimo.serving.app import Limits, Server
        from examples.mimo.serving.worker import Worker

        self.model, self.port = model, ranks.free_port()
        self.worker = Worker(model, max_batch=8, max_waiting=64)
        self.application = Server(model, self.worker, Limits(hosts=("127.0.0.1",)))
        config = uvicorn.Config(self.application.app(), port=self.port, log_level="warning")
        self.server = uvicorn.Server(config)
        self.threads = [at_work(self.worker), threading.Thread(target=self.server.run)]
        self.threads[1].start()
        until(lambda: self.server.started)

    @property
    def busy(self):
        return self.worker.num_running > 0

    def get(self, path, data=None):
        headers = {"Content-Type": "application/json"}
        address = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(address, data, headers)
        try:
            return urllib.request.urlopen(request, timeout=300).read()
        except urllib.error.HTTPError as error:
            return {"status": error.code, "body": error.read()}

    def ask(self, body, status=200):
        """The JSON of a chat completion, which must have this status."""
        reply = self.get("/v1/chat/completions", json.dumps(body).encode())
        failed = isinstance(reply, dict)
        assert (reply["status"] if failed else 200) == status, reply
        return json.loads(reply["body"] if failed else reply)

    def metric(self, name):
        result = re.search(rf"^{name} (\S+)$", self.get("/metrics").decode(), re.MULTILINE)
        return float(result[1])

    def client(self):
        import openai

        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0
        )

    def end(self):
        self.server.should_exit = True
        self.worker.stop()
        for thread in self.threads:
            thread.join(timeout=120)
            assert not thread.is_alive()


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


def says(**more):
    return {"messages": [{"role": "user", "content": "hi"}], **more}


def until(condition):
    """Wait for it, but not for ever."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def at_work(worker):
    thread = threading.Thread(target=worker.run)
    thread.start()
    return thread
