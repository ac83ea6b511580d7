"""OpenAI's chat completions: from a request body to a conversation, and from answers to a reply.

Files come as content parts. For every modality of the model, named by its singular NAME:
    {"type": "NAME_url", "NAME_url": {"url": "data:image/png;base64,..."}}     as `image_url`
    {"type": "input_NAME", "input_NAME": {"data": BASE64, "format": "wav"}}    as `input_audio`
    {"type": "input_file", "modality": "sensors", "data": BASE64}
The first two are OpenAI's where it has them; the last takes any modality by its name in the config.
Each takes a data: URL, and the last two bare base64 as well. Text is never searched for
placeholders. As in OpenAI's own server, null means that a field is absent. An answer with sound has
its text as the sound's transcript, and an id by which later requests name it.
"""

from __future__ import annotations

import base64
import dataclasses
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import Tokenizer
from examples.mimo.generation.engine import STOP, TokenOutput
from examples.mimo.generation.sampling import Options, Sampling
from examples.mimo.generation.scheduler import Answer, KeptAnswers, Piece
from examples.mimo.modalities.base import CodedItem
from examples.mimo.modalities.files import Blob, Source
from examples.mimo.serving.media import Sound, SpokenChoices, file_part, kept_parts, parse_sound

MAX_MESSAGES, MAX_CHOICES, MAX_TEXT, MAX_FILES = 256, 16, 1_000_000, 64
# Sound takes 20 tokens a second and more.
DEFAULT_MAX_TOKENS, DEFAULT_MAX_SOUND_TOKENS = 256, 1024
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
    "logit_bias": ({},),
    "web_search_options": (),
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
    sound: Sound | None = None


def parse(body: object, config: MimoConfig, kept: KeptAnswers) -> Chat:
    """Parse a JSON body; ValueError, one sentence, for what is wrong or not supported in it.

    `kept` are the answers that its messages may name.
    """
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
    stream = _flag(body, "stream")
    sound = parse_sound(body, config, stream)
    return Chat(
        record=_record(body.get("messages"), config, kept),
        options=_options(body, sound),
        choices=choices,
        stream=stream,
        include_usage=_flag(stream_options, "include_usage"),
        model=config.name,
        sound=sound,
    )


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _options(body: Mapping[str, Any], sound: Sound | None) -> Options:
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
    if max_tokens is None:
        max_tokens = DEFAULT_MAX_SOUND_TOKENS if sound else DEFAULT_MAX_TOKENS
    return Options(
        max_tokens,
        Sampling(**sampling),
        tuple(stops),
        logprobs=_flag(body, "logprobs"),
        top_logprobs=_number(body, "top_logprobs", int) or 0,
        outputs=(sound.modality,) if sound else (),
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


def _record(messages: object, config: MimoConfig, kept: KeptAnswers) -> dict[str, Any]:
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
        content = _content(message, where)
        parts = _parts(content, where, config, media if role == "user" else None)
        if role == "assistant" and "audio" in message:
            parts = kept_parts(message["audio"], parts, f"{where}.audio", kept)
        turns.append({"role": "system" if role == "developer" else role, "content": parts})
    items = (value for turn in turns for part in turn["content"] for value in part.values())
    codes = sum(len(item.codes) for item in items if isinstance(item, CodedItem))
    if codes > config.language.seq_length:
        raise ValueError(
            f"the answers that messages name have {codes:,} codes, but "
            f"{config.language.seq_length:,} tokens fit; leave some out"
        )
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
    return message.get("refusal", "")


def _parts(
    content: object, where: str, config: MimoConfig, media: dict[str, list[Source]] | None
) -> list[dict[str, Any]]:
    """A message's parts: text as it is, and the place of each file that they add to `media`.

    `media` is None for messages that may not have files.
    """
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, list):
        raise ValueError(f"{where}: content must be text, or a list of parts")
    parts: list[dict[str, Any]] = []
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
        name, data = file_part(part, at, config, allowed=media is not None)
        assert media is not None
        if sum(map(len, media.values())) >= MAX_FILES:
            raise ValueError(f"more than {MAX_FILES} files")
        media.setdefault(name, []).append(Blob(at, data))
        parts.append({"type": config.inputs[name].singular})
    length = sum(len(part.get("text", "")) for part in parts)
    if length > MAX_TEXT:
        raise ValueError(f"{where}: {length:,} characters, more than {MAX_TEXT:,}")
    return parts


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    param = "model" if code == "model_not_found" else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class TokenLogprobs:
    """The log-probabilities of one choice, each with the piece of text that its token is in.

    A token's `bytes` are its share of the answer: joined, they are the answer in UTF-8, whatever
    characters the tokens cut through. The start of a stop string is not in the answer, so a token
    waits until its text is certain. Codes and markers of outputs are no text: they have no entry.
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
        if output is not None and output.finish != STOP and self._is_text(output.token):
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
            if self._is_text(token)
        ]
        data = self._bytes(output.token)
        if not self.has_begun:
            self.first_tokens.append(output.token)
            self.has_begun = bool(data.strip(b" "))
        return {**_spelling(data), "logprob": output.logprob, "top_logprobs": top}

    def _is_text(self, token: int) -> bool:
        # Outputs have the ids behind those of the text.
        return token < self.tokenizer.size

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
    """Builds the reply to one chat, whole or in chunks.

    With sound the text is its transcript. A whole answer without any sound is a text, as OpenAI's
    clients know it; a stream cannot tell before its end, so there it is a transcript without data.
    """

    def __init__(
        self,
        chat: Chat,
        tokenizer: Tokenizer,
        prompt_tokens: int,
        spoken: SpokenChoices | None = None,
    ) -> None:
        self.chat, self.prompt_tokens, self.spoken = chat, prompt_tokens, spoken
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.logprobs: list[TokenLogprobs] = []
        if chat.options.logprobs:
            self.logprobs = [TokenLogprobs(tokenizer) for _ in range(chat.choices)]
        # Choices whose first chunk is sent: it alone names the role.
        self.begun: set[int] = set()

    def add(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Take a piece of choice `index`; returns the chunks that it makes.

        The one with the answer ends its choice, unless there is sound, which `finish` ends.
        """
        if self.spoken:
            self.spoken.add(index, piece)
        entries = self.logprobs[index].add(piece) if self.logprobs else []
        chunks = []
        if piece.text or entries:
            logprobs = {"content": entries, "refusal": None} if self.logprobs else None
            chunks.append(self._text_chunk(index, piece.text, logprobs))
        if piece.answer is not None and not self.spoken:
            delta = {} if index in self.begun else {"content": ""}
            chunks.append(self._chunk(index, delta, None, piece.answer.finish))
        return chunks

    def add_sound(self, index: int, data: bytes) -> dict[str, Any]:
        """A chunk with new bytes of the sound."""
        return self._sound_chunk(index, {"data": base64.b64encode(data).decode()})

    def finish(self, index: int, answer: Answer, expires_at: int) -> list[dict[str, Any]]:
        """The chunks that end a choice with sound."""
        expiry = self._sound_chunk(index, {"expires_at": expires_at})
        return [expiry, self._chunk(index, {}, None, answer.finish)]

    def completion(
        self, answers: Sequence[Answer], sounds: Mapping[int, tuple[bytes, int]]
    ) -> dict[str, Any]:
        """A `chat.completion` with a choice for each answer, once `add` took all their pieces.

        `sounds` are the bytes of those that have any, and when they expire.
        """
        choices = [
            {
                "index": index,
                "message": self._message(index, answer, sounds.get(index)),
                "finish_reason": answer.finish,
                "logprobs": {"content": self.logprobs[index].content, "refusal": None}
                if self.logprobs
                else None,
            }
            for index, answer in enumerate(answers)
        ]
        return self._object("chat.completion", choices) | {"usage": self.usage(answers)}

    def _message(
        self, index: int, answer: Answer, sound: tuple[bytes, int] | None
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        if sound is None:
            return message | ({"audio": None} if self.spoken else {})
        assert self.spoken is not None
        data, expires_at = sound
        audio: dict[str, Any] = {"id": self.spoken.ids[index]}
        audio |= {"data": base64.b64encode(data).decode()}
        audio |= {"expires_at": expires_at, "transcript": answer.text}
        return message | {"content": None, "audio": audio}

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last chunk, for `stream_options.include_usage`."""
        return self._object("chat.completion.chunk", []) | {"usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Tokens of the prompt and of all answers; those of sound are its codes."""
        completion = sum(len(answer.tokens) for answer in answers)
        counts: dict[str, Any] = {"prompt_tokens": self.prompt_tokens}
        counts |= {"completion_tokens": completion}
        counts |= {"total_tokens": self.prompt_tokens + completion}
        if self.chat.sound:
            items = (
                codes for a in answers for codes in a.outputs.get(self.chat.sound.modality, ())
            )
            codes = sum(map(len, items))
            details = {"audio_tokens": codes, "text_tokens": completion - codes}
            counts["completion_tokens_details"] = details
        return counts

    def _text_chunk(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        if self.spoken:
            return self._sound_chunk(index, {"transcript": text}, logprobs)
        return self._chunk(index, {"content": text}, logprobs)

    def _sound_chunk(
        self, index: int, audio: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        # Clients join what has one name, so the id comes once.
        assert self.spoken is not None
        first = {"id": self.spoken.ids[index], "data": "", "transcript": ""}
        audio = audio if index in self.begun else first | audio
        return self._chunk(index, {"audio": audio}, logprobs)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
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
