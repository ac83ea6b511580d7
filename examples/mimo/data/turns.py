"""Conversations as the world writes them: turns of text with places of media, and the files there.

A turn is `{"from": "human", "value": ...}` or `{"role": "user", "content": ...}`. What it says is
- a string, in which a user's placeholders, such as `<image>`, are places of media, and an answer's
  those of what the model puts out, such as `<speech>`;
- or a list of parts, `{"type": "text", "text": ...}` and `{"type": "image"}`. Their text is taken
  as it is: there `<image>` is a word. A place may name its file, `{"type": "image", "image": F}`;
  the others take the files of the record, `"images": [F, ...]`, in order.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from examples.mimo.configs.schema import MimoConfig, ModalityConfig
from examples.mimo.data.tokenizer import RESERVED, Tokenizer, free_id_hint, is_ordinary_token
from examples.mimo.modalities.files import Blob, Source

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {
    **{"system": SYSTEM, "developer": SYSTEM, "human": USER, "user": USER},
    **{"gpt": ASSISTANT, "assistant": ASSISTANT},
}

# A place is written as {"type": "image"} or {"type": "image_url"}.
_ENDS = ("", "_url")
# What other programs take in the place of a file's name.
ADDRESS = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)

# In one record.
MAX_FILES = 4096
# As paths on Linux.
MAX_NAME = 4095
# From the name of a file in a record to the file; ValueError where there is none.
FindFile = Callable[[str], Source]


@dataclass(frozen=True)
class MediaPlace:
    """Where an item of a modality goes; `file` is its own, else it is the record's next one.

    In an answer it `is_output`: the model is trained to say it.
    """

    modality: str
    file: str | Source | None = None
    is_output: bool = False


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: str
    parts: tuple[str | MediaPlace, ...]

    @property
    def text(self) -> str:
        """Its words alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def places(self) -> list[MediaPlace]:
        """Its places of media, in order."""
        return [part for part in self.parts if isinstance(part, MediaPlace)]


def first_of(fields: Mapping[str, Any], *names: str) -> Any:
    """The first of these fields that is there; null says that it is not."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def conversation_of(record: Mapping[str, Any]) -> Any:
    """The turns of a record as it holds them, under either of their usual names."""
    return first_of(record, "conversations", "messages")


def without_last_answer(
    record: Mapping[str, Any], config: MimoConfig
) -> tuple[dict[str, Any], str | None]:
    """The record that a model is to answer, and the text of the answer it ends with, or None."""
    turns = conversation_of(record)
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, Mapping) or _role(last) != ASSISTANT:
        return {**record, "conversations": turns}, None
    (answer,) = parse_turns([last], config)
    # The files of its places are the last ones that the record lists.
    without = {**record, "conversations": turns[:-1]}
    for place in answer.places:
        if place.file is None and isinstance(files := without.get(place.modality), list):
            without[place.modality] = files[:-1]
    return without, answer.text


def files_of_parts(conversation: object) -> list[str]:
    """The names of the files that parts of turns name themselves."""
    turns = conversation if isinstance(conversation, list) else []
    files = [_file_of(part) for turn in turns for part in _places(turn)]
    return [file for file in files if isinstance(file, str)]


def _places(turn: object) -> list[Mapping[str, Any]]:
    content = first_of(turn, "value", "content") if isinstance(turn, Mapping) else None
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") != "text"]


def _file_of(part: Mapping[str, Any]) -> Any:
    """What a place names as its file, in any of the usual ways; None where it names none."""
    singular = str(part.get("type")).removesuffix("_url")
    file = first_of(part, *(singular + end for end in _ENDS), "path", "url")
    return first_of(file, "url", "path") if isinstance(file, Mapping) else file


def _role(turn: Mapping[str, Any]) -> str | None:
    role = first_of(turn, "from", "role")
    return ROLES.get(role) if isinstance(role, str) else None


def parse_turns(
    conversation: object, config: MimoConfig, empty_answers: bool = False
) -> list[Turn]:
    """The turns of a conversation; ValueError, one line, for what is no conversation.

    An answer without text is refused unless `empty_answers`; so is any user's turn without text or
    media.
    """
    if not isinstance(conversation, Sequence) or not conversation:
        raise ValueError("conversations must be a list of turns, and not empty")
    turns = []
    for turn in conversation:
        if not isinstance(turn, Mapping):
            raise ValueError("a turn must be an object with 'from' and 'value'")
        role, written = _role(turn), first_of(turn, "from", "role")
        if role is None:
            raise ValueError(f"a turn is from {written!r:.60}; known are {', '.join(ROLES)}")
        content = first_of(turn, "value", "content")
        if not isinstance(content, str | list | None):
            raise ValueError(
                f"a turn from {written} has no text, but {content!r:.60}; write a string or a list "
                "of parts"
            )
        parts = _parse_content(content, role, config)
        may_be_empty = role == SYSTEM or (role == ASSISTANT and empty_answers)
        if not may_be_empty and not any(isinstance(p, MediaPlace) or p.strip() for p in parts):
            raise ValueError(f"a turn from {written} has no text")
        turns.append(Turn(role, parts))
    return turns


def _parse_content(
    content: str | list[Any] | None, role: str, config: MimoConfig
) -> tuple[str | MediaPlace, ...]:
    is_answer = role == ASSISTANT
    if isinstance(content, str):
        # In an answer `<image>` is a word, unless the model draws.
        names = config.outputs if is_answer else config.modalities if role == USER else ()
        parts = split_at_placeholders(content, {n: config.modalities[n] for n in names}, is_answer)
    else:
        parts = tuple(_parse_part(part, config, is_answer) for part in content or ())
    known = config.outputs if is_answer else config.inputs
    for part in parts:
        if isinstance(part, MediaPlace) and part.modality not in known:
            whose, does = ("an answer", "says") if is_answer else (f"a turn from {role}", "takes")
            raise ValueError(
                f"{whose} holds {config.modalities[part.modality].placeholder}, but {config.name} "
                f"{does} {', '.join(['text', *known])}"
            )
    return parts


def _parse_part(part: object, config: MimoConfig, is_answer: bool) -> str | MediaPlace:
    if not isinstance(part, Mapping):
        raise ValueError(f"a part must be an object with a type, not {part!r:.60}")
    kind, text = part.get("type"), part.get("text")
    files = {f"{m.singular}{end}": name for name, m in config.modalities.items() for end in _ENDS}
    if kind == "text":
        if not isinstance(text, str):
            raise ValueError(f"a part of type text must have text, not {text!r:.60}")
        _refuse_other(kind, first_of(part, *files))
        return text
    if isinstance(kind, str) and kind in files:
        file = _file_of(part)
        if not isinstance(file, str | Path | Blob | None):
            raise ValueError(f"a part of type {kind} must name its file, not {file!r:.60}")
        _refuse_other(kind, text)
        return MediaPlace(files[kind], file, is_answer)
    known = ", ".join(["text", *(m.singular for m in config.modalities.values())])
    raise ValueError(f"a part has the type {kind!r:.60}; {config.name} takes {known}")


def _refuse_other(kind: str, content: object) -> None:
    """ValueError where a part holds something that its type would leave out without a word."""
    if content:
        raise ValueError(f"a part of type {kind} holds {content!r:.60} too; give it its own part")


def split_at_placeholders(
    text: str, modalities: Mapping[str, ModalityConfig], is_answer: bool
) -> tuple[str | MediaPlace, ...]:
    """Text cut at the placeholders of these modalities, which are places."""
    places = {m.placeholder: MediaPlace(n, None, is_answer) for n, m in modalities.items()}
    # Split with a group keeps what it splits at; "(?!)" matches nowhere.
    pattern = f"({'|'.join(map(re.escape, places)) or '(?!)'})"
    return tuple(places.get(part, part) for part in re.split(pattern, text) if part)


def prompt_content(
    prompt: str, media: Mapping[str, Any], config: MimoConfig
) -> str | list[dict[str, str]]:
    """What a prompt says: its placeholders are places if it comes with files, else words.

    Files alone, as of a question that is asked aloud, are a place for each.
    """
    if not any(media.values()):
        return [{"type": "text", "text": prompt}]
    places = [m.placeholder for name, m in config.inputs.items() for _ in media.get(name) or ()]
    return prompt if prompt.strip() else "".join(places)


def with_leading_places(
    turns: Sequence[Turn], record: Mapping[str, Any], config: MimoConfig
) -> list[Turn]:
    """The turns with a place in front of the last one for each file that has none.

    Only where that turn has no places of its own.
    """
    if turns[-1].places:
        return list(turns)
    leading: list[str | MediaPlace] = []
    for name in config.inputs:
        files = record.get(name)
        num_files = len(files) if isinstance(files, list) else 0
        places = [place for turn in turns for place in turn.places if place.modality == name]
        leading += [MediaPlace(name)] * (num_files - sum(p.file is None for p in places))
    return [*turns[:-1], Turn(turns[-1].role, (*leading, *turns[-1].parts))]


def refuse_other_modalities(record: Mapping[str, Any], config: MimoConfig) -> None:
    """ValueError for files of a modality that `config` lacks."""
    for name, items in record.items():
        is_media = isinstance(items, list) and items and isinstance(items[0], (str, Path, Blob))
        if is_media and name not in config.modalities:
            raise ValueError(
                f"holds {name}, but {config.name} takes "
                f"{', '.join(config.modalities) or 'text only'}; choose another model or other data"
            )


def check_num_files(record: Mapping[str, Any], config: MimoConfig) -> None:
    """ValueError for more files than any sequence holds; to look for each takes its time."""
    lists = (record.get(name) for name in config.modalities)
    count = sum(len(items) for items in lists if isinstance(items, list))
    count += len(files_of_parts(conversation_of(record)))
    if count > MAX_FILES:
        raise ValueError(f"{count:,} files in one sample, more than {MAX_FILES:,}")


def find_media(
    turns: Sequence[Turn], record: Mapping[str, Any], config: MimoConfig, find_file: FindFile
) -> dict[str, list[Source]]:
    """Modality -> the files of its items, in the order of their places.

    ValueError for a modality that `config` lacks, and unless every file has a place and every place
    a file.
    """
    refuse_other_modalities(record, config)
    check_num_files(record, config)
    media = {}
    for name, modality in config.modalities.items():
        items = record.get(name)
        items = [] if items is None else items
        if not isinstance(items, list) or not all(isinstance(i, (str, Path, Blob)) for i in items):
            raise ValueError(f"{name} must be a list of file names, not {items!r:.80}")
        files = [p.file for turn in turns for p in turn.places if p.modality == name]
        num_places = files.count(None)
        if num_places != len(items):
            raise ValueError(
                f"{num_places} {modality.placeholder} in the text, but {len(items)} "
                f"{modality.singular} files; give one file for each placeholder, or write the turn "
                f"as a list of parts, where {modality.placeholder} is a word"
            )
        listed = iter(items)
        named = [next(listed) if file is None else file for file in files]
        media[name] = [_find(file, find_file) if isinstance(file, str) else file for file in named]
    return media


def output_places(turns: Sequence[Turn], modality: str) -> list[bool]:
    """Of each item of a modality, in the order of `find_media`, whether the model says it."""
    return [p.is_output for turn in turns for p in turn.places if p.modality == modality]


def _find(name: str, find_file: FindFile) -> Source:
    if ADDRESS.match(name):
        raise ValueError(
            f"{name[:60]!r}: an address, and nothing is fetched; name a file in the data folder"
        )
    return find_file(name)


@dataclass(frozen=True)
class FilesInside:
    """Finds files under `root`; ValueError for one that lies elsewhere."""

    root: Path

    def __call__(self, name: str) -> Path:
        if len(name) > MAX_NAME:
            raise ValueError(f"{name[:60]!r} ...: {len(name):,} characters are no file's name")
        try:
            path = (self.root / name).resolve()  # a link may lead out of the folder
        except (OSError, RuntimeError):
            raise ValueError(f"{self.root / name}: a link that leads back to itself") from None
        if not path.is_relative_to(self._resolved_root):
            raise ValueError(f"{path} lies outside the data folder {self.root}")
        return path

    @functools.cached_property
    def _resolved_root(self) -> Path:
        return self.root.resolve()


@contextlib.contextmanager
def errors_named(where: str, drop: str = "") -> Iterator[None]:
    """Any error inside becomes a ValueError of one line that begins with `where`.

    A message that begins with `drop` loses that, where `where` says it already.
    """
    try:
        yield
    except ValueError as error:
        reason = " ".join(str(error).split()).removeprefix(drop)
        raise ValueError(f"{where}: {reason}") from None
    # A modality's own code, or a library on a damaged file, can fail in any way.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{where}: {reason}") from error


def check_tokenizer(tokenizer: Tokenizer, config: MimoConfig) -> None:
    """ValueError unless a model's text and the places of what it takes fit its tokenizer."""
    name, size = config.name, config.language.vocab_size
    if tokenizer.size > size:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens, but {name}'s vocabulary holds {size}; use "
            "the tokenizer the data was prepared with"
        )
    # An item's token id must never come out of text: `TextEncoder` drops it there, since it would
    # ask for an item, so an ordinary word in its place would vanish from what people write.
    taken = {modality.token_id for modality in config.inputs.values()}
    for modality in config.inputs.values():
        token_id, placeholder = modality.token_id, modality.placeholder
        if token_id in (tokenizer.bos_id, tokenizer.eos_id):
            meaning = "the token that begins or ends a text"
        elif is_ordinary_token(tokenizer, token_id, placeholder):
            meaning = f"the ordinary token {tokenizer.decode([token_id])!r}"
        else:
            continue
        raise ValueError(
            f"{name}: token id {token_id} of {placeholder} is {meaning} in this tokenizer; choose "
            f"an unused id{free_id_hint(tokenizer, taken)} in the config or with "
            f"--hf-assign-unused-tokens {placeholder},ID, or the tokenizer of the model"
        )


class TextEncoder:
    """Encodes a conversation's text: only the template makes control tokens, people never do.

    Control tokens are the tokenizer's special ones, the placeholders, and what looks like one and
    stands in the config's chat template, such as Qwen's `<think>`.
    """

    def __init__(self, tokenizer: Tokenizer, config: MimoConfig) -> None:
        self.tokenizer = tokenizer
        placeholders = {modality.token_id for modality in config.inputs.values()}
        template = " ".join(text or "" for text in vars(config.chat).values())
        self.control = {
            spelling: token_id
            for spelling, token_id in tokenizer.symbols.items()
            if token_id in tokenizer.special
            or token_id in placeholders
            or (spelling in template and RESERVED.fullmatch(spelling))
        }
        self.control_ids = placeholders | set(self.control.values())
        # Of two that begin alike the longer one; "(?!)" matches nowhere.
        longest_first = sorted(self.control, key=len, reverse=True)
        self.spelling = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # Many a SentencePiece tokenizer puts a space before a text, or takes away the one it begins
        # with. Text that goes on must keep its own, so it is encoded behind a character that merges
        # with nothing, and that the tokenizer knows: unknown ones may swallow what follows.
        known = (c for c in _LEADS if tokenizer.decode(tokenizer.encode(c)).strip() == c)
        self.lead = next(known, "")
        self.lead_ids = tokenizer.encode(self.lead)
        self.needs_lead = any(
            tokenizer.encode(self.lead + text)[len(self.lead_ids) :] != tokenizer.encode(text)
            for text in ("a", " a")
        )
        # Some Hugging Face ones put a space behind each control token as well.
        first = next(iter(self.control), "")
        begins = [tokenizer.encode(text) for text in (first, "a", f"{first}a")]
        self.restarts = self.needs_lead and bool(first) and begins[0] + begins[1] == begins[2]

    def split(self, template: str) -> list[str | int]:
        """Text of the template, cut at its control tokens, which become their ids."""
        parts: list[str | int] = []
        start = 0
        for match in self.spelling.finditer(template):
            parts += [template[start : match.start()], self.control[match[0]]]
            start = match.end()
        return [part for part in (*parts, template[start:]) if part != ""]

    def encode(self, text: str, goes_on: bool = False) -> list[int]:
        """Ids of plain text; what spells a control token stays text.

        `goes_on` says that other text, or a token after which it begins as in mid-sentence, comes
        before it.
        """
        ids = self._encode(text, goes_on)
        cuts = [match.start() + 1 for match in self.spelling.finditer(text)]
        # Unless it is spelled, the unknown token stands for a character that people may well write.
        unspelled = self.control_ids - {self.tokenizer.unk_id}
        if (self.control_ids if cuts else unspelled).isdisjoint(ids):
            return ids
        # Cut in the middle, no spelling is whole; one that a normaliser makes is cut everywhere.
        edges = [0, *(cuts or range(1, len(text))), len(text)]
        parts = [text[start:end] for start, end in pairwise(edges)]
        ids = [i for n, part in enumerate(parts) for i in self._encode(part, goes_on or n > 0)]
        return [token_id for token_id in ids if token_id not in unspelled]

    def _encode(self, text: str, goes_on: bool) -> list[int]:
        if not (goes_on and self.needs_lead):
            return self.tokenizer.encode(text)
        ids = self.tokenizer.encode(self.lead + text)
        if ids[: len(self.lead_ids)] != self.lead_ids:
            return self.tokenizer.encode(text)
        return ids[len(self.lead_ids) :]


_LEADS = ("\U0001f600", "~", ".")
