"""Turns conversations with media into samples: token ids, labels, loss mask, encoder inputs.

`SampleEncoder.encode` is the only path: training, evaluation and inference all call it. A
conversation is cut into pieces: text with loss, text without, and media items. Labels come from the
pieces; nothing searches for an answer in the ids. Only the template and the pieces make control
tokens and placeholders: what a person typed never does.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import Tokenizer, free_id_hint, is_ordinary_token
from examples.mimo.modalities.files import Blob, Source

HUMAN_ROLES = ("human", "user")
ANSWER_ROLES = ("gpt", "assistant")

EncoderInputs = dict[str, torch.Tensor]
# From the name of a file in a record to the file; ValueError where there is none.
FindFile = Callable[[str], Source]


@dataclass(frozen=True)
class Turn:
    """What one side said; a human's text may hold placeholders."""

    is_answer: bool
    text: str


@dataclass(frozen=True)
class TextPiece:
    """Text, and whether the model is trained to say it."""

    text: str
    has_loss: bool


@dataclass(frozen=True)
class MediaPiece:
    """The place of the `index`-th item of a modality."""

    modality: str
    index: int


Piece = TextPiece | MediaPiece


@dataclass(frozen=True)
class TokenSequence:
    """`labels[i]` is the token after `ids[i]`; `loss_mask[i]` is 1 where it is a target."""

    ids: list[int]
    labels: list[int]
    loss_mask: list[int]


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read, and why."""

    key: str
    reason: str


@dataclass
class BadSampleCount:
    """How many samples a data-parallel rank could not read since training began, and the last."""

    count: int = 0
    last: BadSample | None = None


@dataclass(frozen=True)
class Sample:
    """One conversation, ready for `collate`.

    `media[modality]` holds the encoder inputs of each item, `sources[modality]` the names of the
    files they came from. `skipped` are samples that could not be read and that this one stands
    in for.
    """

    key: str
    tokens: TokenSequence
    media: dict[str, list[EncoderInputs]]
    sources: dict[str, list[str]]
    skipped: tuple[BadSample, ...] = ()


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes records into samples for one model.

    `seq_length` is the most tokens of a sample. `augment` varies the media where `encode` is given
    a generator; `blank` names modalities whose content is wiped out, to measure how much the model
    uses it. ValueError for a tokenizer that does not fit the model.
    """

    config: MimoConfig
    tokenizer: Tokenizer
    seq_length: int
    augment: bool = False
    blank: Collection[str] = ()

    def __post_init__(self) -> None:
        name, size = self.config.name, self.config.language.vocab_size
        if self.tokenizer.size > size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.size} tokens, but {name}'s vocabulary holds "
                f"{size}; use the tokenizer the data was prepared with"
            )
        # An item's token id must never come out of text: `tokenise` drops it there, since it would
        # ask for an item, so an ordinary word in its place would vanish from what people write.
        taken = {modality.token_id for modality in self.config.modalities.values()}
        for modality in self.config.modalities.values():
            token_id, placeholder = modality.token_id, modality.placeholder
            if token_id in (self.tokenizer.bos_id, self.tokenizer.eos_id):
                meaning = "the token that begins or ends a text"
            elif is_ordinary_token(self.tokenizer, token_id, placeholder):
                meaning = f"the ordinary token {self.tokenizer.decode([token_id])!r}"
            else:
                continue
            raise ValueError(
                f"{name}: token id {token_id} of {placeholder} is {meaning} in this tokenizer; "
                f"choose an unused id{free_id_hint(self.tokenizer, taken)} in the config or with "
                f"--hf-assign-unused-tokens {placeholder},ID, or the tokenizer of the model"
            )

    def encode(
        self,
        record: Mapping[str, Any],
        find_file: FindFile,
        generator: np.random.Generator | None = None,
        name: str = "the prompt",
    ) -> Sample:
        """The sample of `{"key": ..., "conversations": [...], MODALITY: [files]}`.

        A media item is a file's name, which `find_file` resolves, or a `Source`. The last turn may
        be a question. Every error is a ValueError of one line that begins with the sample's key,
        or with `name` where the record has none; one about an item also names its file and
        modality, whatever a modality's `read` or `preprocess` raised.
        """
        key = record.get("key")
        where = name if key is None else f"sample {key}"
        with errors_named(where):
            pieces = to_pieces(parse_turns(record.get("conversations")), self.config)
            sources = find_media(record, self.config, find_file)
            check_media(pieces, sources, self.config)

        media: dict[str, list[EncoderInputs]] = {}
        num_tokens: dict[str, list[int]] = {}
        for modality, files in sources.items():
            encoder = self.config.modalities[modality].encoder
            for file in files:
                with errors_named(f"{where}, {file}, {modality}", drop=f"{file}: "):
                    raw = encoder.read(file)
                    if modality in self.blank:
                        raw = encoder.blank(raw)
                    if self.augment and generator is not None:
                        raw = encoder.augment(raw, generator)
                    inputs = encoder.preprocess(raw)
                    media.setdefault(modality, []).append(inputs)
                    num_tokens.setdefault(modality, []).append(encoder.num_tokens(inputs))
                # After each item, so that no more are decoded than could fit.
                self._check_length(sum(map(sum, num_tokens.values())), num_tokens, where)

        with errors_named(where):
            tokens = tokenise(pieces, num_tokens, self.config, self.tokenizer)
        self._check_length(len(tokens.ids), num_tokens, where)
        names = {modality: [str(file) for file in sources[modality]] for modality in media}
        return Sample(name if key is None else str(key), tokens, media, names)

    def _check_length(
        self, length: int, num_tokens: Mapping[str, Sequence[int]], where: str
    ) -> None:
        if length > self.seq_length:
            spent = ", ".join(f"{sum(n)} for {name}" for name, n in num_tokens.items())
            raise ValueError(
                f"{where}: {length} tokens ({spent or 'all text'}) do not fit a sequence of "
                f"{self.seq_length}; shorten the conversation, or train with a longer --seq-length"
            )


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


def parse_turns(conversations: object) -> list[Turn]:
    """Turns from `[{"from": "human", "value": ...}, ...]` or role/content pairs.

    A `Turn` is taken as it is; only such a one may be empty, as an answer of a chat can be.
    """
    if not isinstance(conversations, Sequence) or not conversations:
        raise ValueError("conversations must be a list of turns, and not empty")
    turns = []
    for turn in conversations:
        if isinstance(turn, Turn):
            turns.append(turn)
            continue
        if not isinstance(turn, Mapping):
            raise ValueError("a turn must be an object with 'from' and 'value'")
        role = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if role not in HUMAN_ROLES + ANSWER_ROLES:
            raise ValueError(f"a turn is from {role!r}; known are {HUMAN_ROLES + ANSWER_ROLES}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a turn from {role} has no text")
        turns.append(Turn(is_answer=role in ANSWER_ROLES, text=text))
    return turns


def to_pieces(turns: Sequence[Turn], config: MimoConfig) -> list[Piece]:
    """The turns in the config's chat template, cut at the placeholders.

    Placeholders count in human turns only; in an answer they are plain text.
    """
    names = {modality.placeholder: name for name, modality in config.modalities.items()}
    # Split with a group keeps what it splits at; "(?!)" matches nowhere.
    pattern = f"({'|'.join(map(re.escape, names)) or '(?!)'})"
    counts = dict.fromkeys(config.modalities, 0)
    pieces: list[Piece] = []
    if config.chat.system:
        pieces.append(TextPiece(config.chat.system, has_loss=False))
    for number, turn in enumerate(turns):
        if config.chat.between and number and turns[number - 1].is_answer:
            pieces.append(TextPiece(config.chat.between, has_loss=False))
        before, after = (config.chat.answer if turn.is_answer else config.chat.human).split("{}")
        text = before + turn.text + after
        if turn.is_answer:
            pieces.append(TextPiece(text, has_loss=True))
            continue
        for part in re.split(pattern, text):
            if part in names:
                name = names[part]
                pieces.append(MediaPiece(name, counts[name]))
                counts[name] += 1
            elif part:
                pieces.append(TextPiece(part, has_loss=False))
    return pieces


def refuse_other_modalities(record: Mapping[str, Any], config: MimoConfig) -> None:
    """ValueError for files of a modality that `config` lacks."""
    for name, items in record.items():
        is_media = isinstance(items, list) and items and isinstance(items[0], (str, Path, Blob))
        if is_media and name not in config.modalities:
            raise ValueError(
                f"holds {name}, but {config.name} takes "
                f"{', '.join(config.modalities) or 'text only'}; choose another model or other data"
            )


def find_media(
    record: Mapping[str, Any], config: MimoConfig, find_file: FindFile
) -> dict[str, list[Source]]:
    """Modality -> the files of its items; ValueError for a modality that `config` lacks."""
    refuse_other_modalities(record, config)
    media = {}
    for name in config.modalities:
        items = record.get(name, [])
        if not isinstance(items, list) or not all(isinstance(i, (str, Path, Blob)) for i in items):
            raise ValueError(f"{name} must be a list of file names, not {items!r}")
        media[name] = [find_file(item) if isinstance(item, str) else item for item in items]
    return media


def check_media(
    pieces: Sequence[Piece], media: Mapping[str, Sequence[object]], config: MimoConfig
) -> None:
    """ValueError unless every item has a placeholder and every placeholder an item."""
    for name, modality in config.modalities.items():
        num_placeholders = sum(isinstance(p, MediaPiece) and p.modality == name for p in pieces)
        num_items = len(media.get(name, ()))
        if num_placeholders != num_items:
            raise ValueError(
                f"{num_placeholders} {modality.placeholder} in the text, but {num_items} "
                f"{modality.singular} files; give one file for each placeholder"
            )


def tokenise(
    pieces: Sequence[Piece],
    num_tokens: Mapping[str, Sequence[int]],
    config: MimoConfig,
    tokenizer: Tokenizer,
) -> TokenSequence:
    """The tokens of a conversation; `num_tokens[modality][i]` is what item i takes.

    An answer ends with the end-of-text token, which is a target too. The last token has no
    successor, so its label is padding without loss.
    """
    placeholder_ids = {modality.token_id for modality in config.modalities.values()}
    ids = [tokenizer.bos_id] if config.add_bos and tokenizer.bos_id >= 0 else []  # -1: it has none
    is_target = [0] * len(ids)
    for piece in pieces:
        if isinstance(piece, MediaPiece):
            token_id = config.modalities[piece.modality].token_id
            ids += [token_id] * num_tokens[piece.modality][piece.index]
        else:
            # Text may spell a placeholder, in an answer say; as an id it would ask for an item.
            ids += [i for i in tokenizer.encode(piece.text) if i not in placeholder_ids]
            if piece.has_loss:
                ids.append(tokenizer.eos_id)
        has_loss = isinstance(piece, TextPiece) and piece.has_loss
        is_target += [int(has_loss)] * (len(ids) - len(is_target))
    # Both are shifted: the loss of a token is taken where it is predicted, one place earlier.
    return TokenSequence(ids, [*ids[1:], tokenizer.pad_id], [*is_target[1:], 0])


@dataclass(frozen=True)
class FilesInside:
    """Finds files under `root`; ValueError for one that lies elsewhere."""

    root: Path

    def __call__(self, name: str) -> Path:
        path = (self.root / name).resolve()  # a link may lead out of the folder
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError(f"{path} lies outside the data folder {self.root}")
        return path
