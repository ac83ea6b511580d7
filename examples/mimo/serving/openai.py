"""From a chat-completions body to a request, and from answers to its reply."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import Turn
from examples.mimo.data.tokenizer import Tokenizer
from examples.mimo.generation.api import Request
from examples.mimo.generation.sampling import Sampling
from examples.mimo.generation.scheduler import Answer, Options
from examples.mimo.modalities.base import Blob, Source

MAX_MESSAGES, MAX_CHOICES, MAX_TEXT, MAX_ITEMS = 256, 16, 1_000_000, 64
# Where a body does not say how many.
MAX_TOKENS = 256
ROLES = ("system", "developer", "user", "assistant")
# Fields that would change the answer, and the values at which they do nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "top_logprobs": (0,),
    "audio": (),
}


@dataclass(frozen=True)
class Chat:
    """What a body asks: a request, `choices` answers to it, and how they are given."""

    request: Request
    options: Options
    choices: int
    stream: bool
    include_usage: bool
    model: str


def parse(body: object, config: MimoConfig) -> Chat:
    """ValueError, one sentence, for a body that is none or asks what is not offered."""
    if not isinstance(body, Mapping):
        raise ValueError("the body must be a JSON object")
    for name, idle in REFUSED.items():
        if body.get(name) is not None and body[name] not in idle:
            raise ValueError(f"{name} is not offered; leave it out")
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, Mapping):
        raise ValueError("stream_options must be an object")
    choices = _number(body, "n", int)
    choices = 1 if choices is None else choices
    if not 1 <= choices <= MAX_CHOICES:
        raise ValueError(f"n {choices!r:.20}: from 1 to {MAX_CHOICES}")
    return Chat(
        request=_request(body.get("messages"), config),
        options=_options(body),
        choices=choices,
        stream=_flag(body, "stream"),
        include_usage=_flag(stream_options, "include_usage"),
        model=config.name,
    )


def _options(body: Mapping[str, Any]) -> Options:
    values = {f.name: _number(body, f.name, type(f.default)) for f in dataclasses.fields(Sampling)}
    given = {name: value for name, value in values.items() if value is not None}
    # OpenAI's seeds may be negative.
    given["seed"] = given.get("seed", 0) % 2**63
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("stop must be text, or a list of texts")
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    most = _number(body, name, int)
    most = MAX_TOKENS if most is None else most
    return Options(most, Sampling(**given), tuple(stops), _flag(body, "logprobs"))


def _number(body: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field that is a number; its size is checked where it is used."""
    value = body.get(name)
    allowed = (int,) if kind is int else (int, float)
    # A JSON true is an int to Python.
    if value is not None and (isinstance(value, bool) or not isinstance(value, allowed)):
        raise ValueError(f"{name} must be a {'whole ' if kind is int else ''}number")
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false")
    return bool(value)


def _request(messages: object, config: MimoConfig) -> Request:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list, and not empty")
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"{len(messages)} messages: at most {MAX_MESSAGES}")
    files: dict[str, list[Source]] = {}
    turns: list[Turn] = []
    system = ""
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(f"{where}: its role must be one of {', '.join(ROLES)}")
        is_answer = message["role"] == "assistant"
        text = _text(message.get("content"), where, config, None if is_answer else files)
        if message["role"] in ("system", "developer"):
            # The template's own system text is part of the model; more goes before the question.
            system += f"{text}\n"
            continue
        turns.append(Turn(is_answer, text if is_answer else system + text))
        system = "" if not is_answer else system
    if not turns or turns[-1].is_answer:
        raise ValueError("the last message must be the user's")
    if not turns[-1].text.strip():
        raise ValueError("the last message says and shows nothing")
    return Request(turns[-1].text, files, "the conversation", tuple(turns[:-1]))


def _text(
    content: object, where: str, config: MimoConfig, files: dict[str, list[Source]] | None
) -> str:
    """A message's text, with a placeholder for each item that its parts add to `files`."""
    if isinstance(content, str):
        return _bounded(content, where)
    if not isinstance(content, list):
        raise ValueError(f"{where}: content must be text, or a list of parts")
    kinds = {f"{m.singular}_url": name for name, m in config.modalities.items()}
    kinds |= {f"input_{m.singular}": name for name, m in config.modalities.items()}
    text = ""
    for number, part in enumerate(content):
        at = f"{where}.content[{number}]"
        if not isinstance(part, Mapping):
            raise ValueError(f"{at} must be an object")
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind == "text":
            raise ValueError(f"{at}.text must be text")
        elif isinstance(kind, str) and kind in kinds and files is not None:
            name = kinds[kind]
            if sum(map(len, files.values())) >= MAX_ITEMS:
                raise ValueError(f"more than {MAX_ITEMS} pictures and recordings")
            files.setdefault(name, []).append(Blob(at, _bytes(part.get(kind), kind, at)))
            text += config.modalities[name].placeholder
        else:
            known = ", ".join(["text", *kinds] if files is not None else ["text"])
            raise ValueError(f"{at}: its type must be one of {known}")
    return _bounded(text, where)


def _bounded(text: str, where: str) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError(f"{where}: {len(text):,} characters, more than {MAX_TEXT:,}")
    return text


def _bytes(value: object, kind: str, at: str) -> bytes:
    """The content of a part: a data URL, or base64; nothing is fetched."""
    if kind.endswith("_url"):
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str) or not url.startswith("data:"):
            raise ValueError(f"{at}: {kind} must be a data: URL with base64; nothing is fetched")
        head, comma, encoded = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError(f"{at}: the data: URL must be ;base64")
    else:
        data = value.get("data") if isinstance(value, Mapping) else None
        if not isinstance(data, str):
            raise ValueError(f"{at}: {kind}.data must be base64")
        encoded = data
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{at}: damaged base64") from None


class Reply:
    """The reply to one chat, in pieces or whole."""

    def __init__(self, chat: Chat, tokenizer: Tokenizer, prompt_tokens: int) -> None:
        self.chat, self.tokenizer, self.prompt_tokens = chat, tokenizer, prompt_tokens
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """A `chat.completion` with a choice for each answer."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "finish_reason": answer.finish,
                "logprobs": self._logprobs(answer),
            }
            for index, answer in enumerate(answers)
        ]
        return self._object("chat.completion", choices) | {"usage": self.usage(answers)}

    def piece(self, index: int, text: str, answer: Answer | None = None) -> dict[str, Any]:
        """A `chat.completion.chunk`; the one with the answer ends its choice."""
        delta = {"role": "assistant", "content": text} if text or answer is None else {}
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": answer.finish if answer else None,
            "logprobs": self._logprobs(answer) if answer else None,
        }
        return self._object("chat.completion.chunk", [choice])

    def last(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk that counts tokens, when it was asked for."""
        return self._object("chat.completion.chunk", []) | {"usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        """Tokens of the prompt and of all answers."""
        said = sum(len(answer.tokens) for answer in answers)
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": said}
        return counts | {"total_tokens": self.prompt_tokens + said}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.chat.model}
        return about | {"choices": choices}

    def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if answer.logprobs is None:
            return None
        content = []
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=False):
            text = self.tokenizer.decode([token])
            content.append(
                {
                    "token": text,
                    "logprob": logprob,
                    "bytes": list(text.encode()),
                    "top_logprobs": [],
                }
            )
        return {"content": content, "refusal": None}
