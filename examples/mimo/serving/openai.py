"""OpenAI's chat completions: from a request body to a conversation, and from answers to a reply.

Files come as content parts. For every modality of the model, named by its singular NAME:
    {"type": "NAME_url", "NAME_url": {"url": "data:image/png;base64,..."}}     as `image_url`
    {"type": "input_NAME", "input_NAME": {"data": BASE64, "format": "wav"}}    as `input_audio`
    {"type": "input_file", "modality": "sensors", "data": BASE64}
The first two are OpenAI's where it has them; the last takes any modality by its name in the config.
Each takes a data: URL, and the last two bare base64 as well. Text is never searched for
placeholders. As in OpenAI's own server, null means that a field is absent.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import soundfile
from PIL import Image

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import Tokenizer
from examples.mimo.generation.engine import STOP, TokenOutput
from examples.mimo.generation.sampling import Options, Sampling
from examples.mimo.generation.scheduler import Answer, Piece
from examples.mimo.modalities.files import FORMATS, Blob, Source

MAX_MESSAGES, MAX_CHOICES, MAX_TEXT, MAX_FILES = 256, 16, 1_000_000, 64
DEFAULT_MAX_TOKENS = 256
ROLES = ("system", "developer", "user", "assistant")
# What clients that call tools add to a conversation.
TOOL_ROLES, TOOL_FIELDS = ("tool", "function"), ("tool_calls", "function_call")
# Fields that are not supported, with the values at which they change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "audio": (),
    "web_search_options": (),
}
# No more of a recording is decoded; a small file of another kind holds little.
LONG_SECONDS, ANYTHING, SMALL_FILE = 600, 2**62, 2**12
URL_SAFE = str.maketrans("-_", "+/")


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
    body = _without_nulls(body)
    for name, defaults in UNSUPPORTED.items():
        if name in body and body[name] not in defaults:
            raise ValueError(f"{name} is not offered; leave it out")
    if not isinstance(body.get("model", ""), str):
        raise ValueError("model must be text")
    stream_options = body.get("stream_options", {})
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


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _options(body: Mapping[str, Any]) -> Options:
    numbers = {f.name: _number(body, f.name, type(f.default)) for f in dataclasses.fields(Sampling)}
    sampling = {name: number for name, number in numbers.items() if number is not None}
    # OpenAI's seeds may be negative.
    sampling["seed"] = sampling.get("seed", 0) % 2**63
    stops = body.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("stop must be text, or a list of texts")
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    max_tokens = _number(body, name, int)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"{name} {max_tokens}: at least 1")
    return Options(
        DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        Sampling(**sampling),
        tuple(stops),
        logprobs=_flag(body, "logprobs"),
        top_logprobs=_number(body, "top_logprobs", int) or 0,
    )


def _number(body: Mapping[str, Any], name: str, kind: type) -> Any:
    """A number or None; `Options` and `Sampling` check its size."""
    value = body.get(name)
    # JSON has one kind of number, and some clients write 8 as 8.0.
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
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
    turns: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        message = _without_nulls(message) if isinstance(message, Mapping) else {}
        _check_role(message, where)
        role = message["role"]
        parts = _parts(_content(message, where), where, config, media if role == "user" else None)
        turns.append({"role": "system" if role == "developer" else role, "content": parts})
    if turns[-1]["role"] == "assistant" or all(turn["role"] != "user" for turn in turns):
        raise ValueError("the last message must be the user's")
    if not any(part.get("text", "file").strip() for part in turns[-1]["content"]):
        raise ValueError("the last message has no text and no file")
    return {"key": "the conversation", "conversations": turns, **media}


def _check_role(message: Mapping[str, Any], where: str) -> None:
    """ValueError for a role that is not known, and for anything that calls tools."""
    role = message.get("role")
    if role in TOOL_ROLES:
        raise ValueError(
            f"{where}: role {role} brings the result of a tool, but this server offers no tools; "
            "give the result as text of a user message"
        )
    if role not in ROLES:
        raise ValueError(f"{where}: its role must be one of {', '.join(ROLES)}")
    for name in TOOL_FIELDS:
        if message.get(name):
            raise ValueError(
                f"{where}: {name} calls a tool, but this server offers no tools; leave the message "
                "out, or say in its content what was done"
            )


def _content(message: Mapping[str, Any], where: str) -> object:
    """What a message says; an assistant's may be missing, or a refusal in its place."""
    if message["role"] != "assistant" or "content" in message:
        return message.get("content")
    if "audio" in message:
        raise ValueError(f"{where}.audio names a spoken answer, and this server gives none")
    return message.get("refusal", "")


def _parts(
    content: object, where: str, config: MimoConfig, media: dict[str, list[Source]] | None
) -> list[dict[str, str]]:
    """A message's parts: text as it is, and the place of each file that they add to `media`.

    `media` is None for messages that may not have files.
    """
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, list):
        raise ValueError(f"{where}: content must be text, or a list of parts")
    parts: list[dict[str, str]] = []
    for number, part in enumerate(content):
        at = f"{where}.content[{number}]"
        if not isinstance(part, Mapping):
            raise ValueError(f"{at} must be an object")
        kind = part.get("type")
        if kind in ("text", "refusal"):
            text = part.get(kind)
            if not isinstance(text, str):
                raise ValueError(f"{at}.{kind} must be text")
            parts += [{"type": "text", "text": text}] if text else []
            continue
        name, data = _file_part(part, at, config, allowed=media is not None)
        assert media is not None
        if sum(map(len, media.values())) >= MAX_FILES:
            raise ValueError(f"more than {MAX_FILES} files")
        media.setdefault(name, []).append(Blob(at, data))
        parts.append({"type": config.inputs[name].singular})
    length = sum(len(part.get("text", "")) for part in parts)
    if length > MAX_TEXT:
        raise ValueError(f"{where}: {length:,} characters, more than {MAX_TEXT:,}")
    return parts


def _file_part(
    part: Mapping[str, Any], at: str, config: MimoConfig, allowed: bool
) -> tuple[str, bytes]:
    """The modality and the bytes of a content part; nothing is fetched from anywhere."""
    url_types = {f"{m.singular}_url": name for name, m in config.inputs.items()}
    data_types = {f"input_{m.singular}": name for name, m in config.inputs.items()}
    kind = part.get("type")
    if allowed and isinstance(kind, str) and kind in url_types:
        value = part.get(kind)
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str) or not _is_data_url(url):
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
        if not isinstance(name, str) or name not in config.inputs:
            raise ValueError(f"{at}.modality must be one of {', '.join(config.inputs)}")
        if not isinstance(data, str):
            raise ValueError(f"{at}.data must be base64 or a data: URL")
        return name, _decode(data, at)
    if not allowed:
        raise ValueError(f"{at}: its type must be text; files go into messages of the user")
    types = ["text", *url_types, *data_types, "input_file"]
    raise ValueError(f"{at}: its type must be one of {', '.join(types)}")


def _is_data_url(text: str) -> bool:
    return text.lstrip()[:5].lower() == "data:"


def _decode(data: str, at: str) -> bytes:
    """The bytes of base64, or of a data: URL with base64.

    As encoders write it: in lines, with either alphabet of RFC 4648, with or without padding.
    """
    if _is_data_url(data):
        head, comma, data = data.partition(",")
        if not comma or head.rpartition(";")[2].strip().lower() != "base64":
            raise ValueError(f"{at}: the data: URL must be ;base64")
        data = unquote(data)
    data = "".join(data.split()).translate(URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{at}: damaged base64") from None


def decoded_size(chat: Chat) -> int:
    """The most pixels of a picture, or samples of a recording, in a chat, as headers say.

    Files are decoded one after the other. One that may hold anything, such as a video, counts as
    more than there is room for; one that is refused at once as nothing.
    """
    files = (file for files in chat.record.values() for file in files if isinstance(file, Blob))
    return max((_decoded_size(file.data) for file in files), default=0)


def _decoded_size(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.width * picture.height
    except Image.DecompressionBombError:
        return 0
    except (OSError, ValueError, SyntaxError):
        pass
    try:
        header = soundfile.info(io.BytesIO(data))
    except soundfile.SoundFileError:
        return ANYTHING if len(data) > SMALL_FILE else 0
    return min(header.frames, LONG_SECONDS * header.samplerate)


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    param = "model" if code == "model_not_found" else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class TokenLogprobs:
    """The log-probabilities of one choice, each with the piece of text that its token is in.

    A token's `bytes` are its share of the answer: joined, they are the answer in UTF-8, whatever
    characters the tokens cut through. The start of a stop string is not in the answer, so a token
    waits until its text is certain.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.content: list[dict[str, Any]] = []
        self.waiting: deque[dict[str, Any]] = deque()
        # Bytes of the text so far that are not yet those of a token in `content`.
        self.num_bytes = 0
        # The answer's first tokens, to the first that is not all spaces.
        self.first_tokens: list[int] = []
        self.has_begun = False

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """The entries that belong to a piece's text."""
        output, ready = piece.output, []
        if output is not None and output.finish != STOP:
            self.waiting.append(self._entry(output))
        self.num_bytes += len(piece.text.encode())
        while self.waiting and len(self.waiting[0]["bytes"]) <= self.num_bytes:
            self.num_bytes -= len(self.waiting[0]["bytes"])
            ready.append(self.waiting.popleft())
        if piece.answer is not None:
            stopped_by_string = piece.answer.finish == STOP and output and output.finish != STOP
            if not stopped_by_string:
                ready += self.waiting
            elif self.waiting and self.num_bytes:
                # The stop string begins within this token.
                begin = bytes(self.waiting[0]["bytes"][: self.num_bytes])
                ready.append({**self.waiting[0], **_spelling(begin)})
            self.waiting.clear()
        self.content += ready
        return ready

    def _entry(self, output: TokenOutput) -> dict[str, Any]:
        """A token's entry; those of the tokens that were likely in its place are part of it."""
        top = [
            {**_spelling(self._bytes(token)), "logprob": logprob}
            for token, logprob in output.top_logprobs or ()
        ]
        data = self._bytes(output.token)
        if not self.has_begun:
            self.first_tokens.append(output.token)
            self.has_begun = bool(data.strip(b" "))
        return {**_spelling(data), "logprob": output.logprob, "top_logprobs": top}

    def _bytes(self, token: int) -> bytes:
        """What a token adds to the answer; many tokenizers drop a space at the very start."""
        data = self.tokenizer.token_bytes(token)
        if self.has_begun or not data.startswith(b" "):
            return data
        before = self.tokenizer.decode(self.first_tokens).encode()
        after = self.tokenizer.decode([*self.first_tokens, token]).encode()
        added = after[len(before) :]
        return added if data.endswith(added) else data


def _spelling(data: bytes) -> dict[str, Any]:
    return {"token": data.decode(errors="replace"), "bytes": list(data)}


class Reply:
    """Builds the reply to one chat, whole or in chunks."""

    def __init__(self, chat: Chat, tokenizer: Tokenizer, prompt_tokens: int) -> None:
        self.chat, self.prompt_tokens = chat, prompt_tokens
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.logprobs: list[TokenLogprobs] = []
        if chat.options.logprobs:
            self.logprobs = [TokenLogprobs(tokenizer) for _ in range(chat.choices)]
        # Choices whose first chunk is sent: it alone names the role.
        self.begun: set[int] = set()

    def add(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Take a piece of choice `index`; returns the chunks that it makes.

        The one with the answer ends its choice.
        """
        entries = self.logprobs[index].add(piece) if self.logprobs else []
        chunks = []
        if piece.text or entries:
            logprobs = {"content": entries, "refusal": None} if self.logprobs else None
            chunks.append(self._chunk(index, {"content": piece.text}, logprobs))
        if piece.answer is not None:
            delta = {} if index in self.begun else {"content": ""}
            chunks.append(self._chunk(index, delta, None, piece.answer.finish))
        return chunks

    def completion(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """A `chat.completion` with a choice for each answer, once `add` took all their pieces."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "finish_reason": answer.finish,
                "logprobs": {"content": self.logprobs[index].content, "refusal": None}
                if self.logprobs
                else None,
            }
            for index, answer in enumerate(answers)
        ]
        return self._object("chat.completion", choices) | {"usage": self.usage(answers)}

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last chunk, for `stream_options.include_usage`."""
        return self._object("chat.completion.chunk", []) | {"usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        """Tokens of the prompt and of all answers."""
        completion = sum(len(answer.tokens) for answer in answers)
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion}
        return counts | {"total_tokens": self.prompt_tokens + completion}

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: dict[str, Any] | None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        if index not in self.begun:
            self.begun.add(index)
            delta = {"role": "assistant", **delta}
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.chat.model}
        return fields | {"choices": choices}
