"""OpenAI's chat completions: from a request body to a conversation, and from answers to a reply.

Files come as content parts. For every modality of the model, named by its singular NAME:
    {"type": "NAME_url", "NAME_url": {"url": "data:image/png;base64,..."}}     as `image_url`
    {"type": "input_NAME", "input_NAME": {"data": BASE64, "format": "wav"}}    as `input_audio`
    {"type": "input_file", "modality": "sensors", "data": BASE64 or a data: URL}
The first two are OpenAI's where it has them; the last takes any modality by its name in the config.
"""

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
from examples.mimo.data.tokenizer import Tokenizer
from examples.mimo.generation.sampling import Options, Sampling
from examples.mimo.generation.scheduler import Answer
from examples.mimo.modalities.files import Blob, Source

MAX_MESSAGES, MAX_CHOICES, MAX_TEXT, MAX_FILES = 256, 16, 1_000_000, 64
DEFAULT_MAX_TOKENS = 256
ROLES = ("system", "developer", "user", "assistant")
# Fields that are not supported, with the values at which they change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
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
    """A parsed body: a conversation's record, and how many answers to give in which way."""

    record: dict[str, Any]
    options: Options
    choices: int
    stream: bool
    include_usage: bool
    model: str


def parse(body: object, config: MimoConfig) -> Chat:
    """Parse a JSON body; ValueError, one sentence, for what is wrong or not supported in it."""
    if not isinstance(body, Mapping):
        raise ValueError("the body must be a JSON object")
    for name, defaults in UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in defaults:
            raise ValueError(f"{name} is not offered; leave it out")
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, Mapping):
        raise ValueError("stream_options must be an object")
    choices = _number(body, "n", int)
    choices = 1 if choices is None else choices
    if not 1 <= choices <= MAX_CHOICES:
        raise ValueError(f"n {choices!r:.20}: from 1 to {MAX_CHOICES}")
    return Chat(
        record=_record(body.get("messages"), config),
        options=_options(body),
        choices=choices,
        stream=_flag(body, "stream"),
        include_usage=_flag(stream_options, "include_usage"),
        model=config.name,
    )


def _options(body: Mapping[str, Any]) -> Options:
    numbers = {f.name: _number(body, f.name, type(f.default)) for f in dataclasses.fields(Sampling)}
    sampling = {name: number for name, number in numbers.items() if number is not None}
    # OpenAI's seeds may be negative.
    sampling["seed"] = sampling.get("seed", 0) % 2**63
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("stop must be text, or a list of texts")
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    max_tokens = _number(body, name, int)
    max_tokens = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    return Options(max_tokens, Sampling(**sampling), tuple(stops), _flag(body, "logprobs"))


def _number(body: Mapping[str, Any], name: str, kind: type) -> Any:
    """A number or None; `Options` and `Sampling` check its size."""
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


def _record(messages: object, config: MimoConfig) -> dict[str, Any]:
    """The record of a conversation, as `Mimo.encode` takes it."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list, and not empty")
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"{len(messages)} messages: at most {MAX_MESSAGES}")
    media: dict[str, list[Source]] = {}
    turns: list[dict[str, str]] = []
    system = ""
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(f"{where}: its role must be one of {', '.join(ROLES)}")
        role = message["role"]
        content = message.get("content")
        text = _text(content, where, config, None if role == "assistant" else media)
        if role in ("system", "developer"):
            # The template's own system text is part of the model; this goes before the question.
            system += f"{text}\n"
        elif role == "assistant":
            turns.append({"role": role, "content": text})
        else:
            turns.append({"role": role, "content": system + text})
            system = ""
    if not turns or turns[-1]["role"] == "assistant":
        raise ValueError("the last message must be the user's")
    if not turns[-1]["content"].strip():
        raise ValueError("the last message has no text and no file")
    return {"key": "the conversation", "conversations": turns, **media}


def _text(
    content: object, where: str, config: MimoConfig, media: dict[str, list[Source]] | None
) -> str:
    """A message's text, with a placeholder for each file that its parts add to `media`.

    `media` is None for messages that may not have files.
    """
    if isinstance(content, str):
        return _bounded(content, where)
    if not isinstance(content, list):
        raise ValueError(f"{where}: content must be text, or a list of parts")
    text = ""
    for number, part in enumerate(content):
        at = f"{where}.content[{number}]"
        if not isinstance(part, Mapping):
            raise ValueError(f"{at} must be an object")
        if part.get("type") == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{at}.text must be text")
            text += part["text"]
            continue
        name, data = _file_part(part, at, config, allowed=media is not None)
        assert media is not None
        if sum(map(len, media.values())) >= MAX_FILES:
            raise ValueError(f"more than {MAX_FILES} files")
        media.setdefault(name, []).append(Blob(at, data))
        text += config.modalities[name].placeholder
    return _bounded(text, where)


def _bounded(text: str, where: str) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError(f"{where}: {len(text):,} characters, more than {MAX_TEXT:,}")
    return text


def _file_part(
    part: Mapping[str, Any], at: str, config: MimoConfig, allowed: bool
) -> tuple[str, bytes]:
    """The modality and the bytes of a content part; nothing is fetched from anywhere."""
    url_types = {f"{m.singular}_url": name for name, m in config.modalities.items()}
    data_types = {f"input_{m.singular}": name for name, m in config.modalities.items()}
    kind = part.get("type")
    if allowed and isinstance(kind, str) and kind in url_types:
        value = part.get(kind)
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str) or not url.startswith("data:"):
            raise ValueError(f"{at}: {kind} must be a data: URL with base64; nothing is fetched")
        return url_types[kind], _decode(url, at)
    if allowed and isinstance(kind, str) and kind in data_types:
        value = part.get(kind)
        data = value.get("data") if isinstance(value, Mapping) else None
        if not isinstance(data, str):
            raise ValueError(f"{at}: {kind}.data must be base64")
        return data_types[kind], _decode(data, at)
    if allowed and kind == "input_file":
        name, data = part.get("modality"), part.get("data")
        if not isinstance(name, str) or name not in config.modalities:
            raise ValueError(f"{at}.modality must be one of {', '.join(config.modalities)}")
        if not isinstance(data, str):
            raise ValueError(f"{at}.data must be base64 or a data: URL")
        return name, _decode(data, at)
    types = ["text", *url_types, *data_types, "input_file"] if allowed else ["text"]
    raise ValueError(f"{at}: its type must be one of {', '.join(types)}")


def _decode(data: str, at: str) -> bytes:
    """The bytes of base64, or of a data: URL with base64."""
    if data.startswith("data:"):
        head, comma, data = data.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError(f"{at}: the data: URL must be ;base64")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{at}: damaged base64") from None


class Reply:
    """Builds the reply to one chat, whole or in chunks."""

    def __init__(self, chat: Chat, tokenizer: Tokenizer, prompt_tokens: int) -> None:
        self.chat, self.tokenizer, self.prompt_tokens = chat, tokenizer, prompt_tokens
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def completion(self, answers: Sequence[Answer]) -> dict[str, Any]:
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

    def chunk(self, index: int, text: str, answer: Answer | None = None) -> dict[str, Any]:
        """A `chat.completion.chunk`; the one with the answer ends its choice."""
        delta = {"role": "assistant", "content": text} if text or answer is None else {}
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": answer.finish if answer else None,
            "logprobs": self._logprobs(answer) if answer else None,
        }
        return self._object("chat.completion.chunk", [choice])

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last chunk, for `stream_options.include_usage`."""
        return self._object("chat.completion.chunk", []) | {"usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        """Tokens of the prompt and of all answers."""
        completion = sum(len(answer.tokens) for answer in answers)
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion}
        return counts | {"total_tokens": self.prompt_tokens + completion}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.chat.model}
        return fields | {"choices": choices}

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
