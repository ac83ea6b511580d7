"""One tokenisation path: conversation -> pieces -> ids, labels and loss mask.

Training, evaluation and inference all go through here. A piece is text, which carries loss or
does not, or the run of placeholders of one item. Labels come from the pieces; nothing ever
searches for an answer in the ids.

A sample: one conversation as ids, with the encoder inputs of its media.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import Tokenizer
from examples.mimo.modalities.base import Source

HUMAN_ROLES = ("human", "user")
ANSWER_ROLES = ("gpt", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one side said; a human's text may hold placeholders."""

    is_answer: bool
    text: str


@dataclass(frozen=True)
class TextPiece:
    """Text, and whether the model learns to say it."""

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
    """`labels[i]` is the token after `ids[i]`; `loss_mask[i]` is 1 where it is to be learned."""

    ids: list[int]
    labels: list[int]
    loss_mask: list[int]


def parse_turns(conversations: object, key: str) -> list[Turn]:
    """Turns from `[{"from": "human", "value": ...}, ...]` or role/content pairs."""
    if not isinstance(conversations, Sequence) or not conversations:
        raise ValueError(f"sample {key}: conversations must be a list of turns, and not empty")
    return [_parse_turn(turn, key) for turn in conversations]


def _parse_turn(turn: object, key: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"sample {key}: a turn must be an object with 'from' and 'value'")
    role = turn.get("from", turn.get("role"))
    text = turn.get("value", turn.get("content"))
    if role not in HUMAN_ROLES + ANSWER_ROLES:
        raise ValueError(
            f"sample {key}: a turn is from {role!r}; known are {HUMAN_ROLES + ANSWER_ROLES}"
        )
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"sample {key}: a turn from {role} has no text")
    return Turn(is_answer=role in ANSWER_ROLES, text=text)


def to_pieces(turns: Sequence[Turn], config: MimoConfig) -> list[Piece]:
    """The turns in the config's chat template, cut at the placeholders.

    Placeholders count in human turns only; in an answer they are plain text.
    """
    pieces: list[Piece] = []
    if config.chat.system:
        pieces.append(TextPiece(config.chat.system, has_loss=False))
    counts = dict.fromkeys(config.modalities, 0)
    for number, turn in enumerate(turns):
        if config.chat.between and number and turns[number - 1].is_answer:
            pieces.append(TextPiece(config.chat.between, has_loss=False))
        if turn.is_answer:
            before, after = config.chat.answer.split("{}")
            pieces.append(TextPiece(before + turn.text + after, has_loss=True))
        else:
            before, after = config.chat.human.split("{}")
            pieces += _cut(before + turn.text + after, config, counts)
    return pieces


def _cut(text: str, config: MimoConfig, counts: dict[str, int]) -> list[Piece]:
    names = {m.placeholder: name for name, m in config.modalities.items()}
    if not names:
        return [TextPiece(text, has_loss=False)]
    pattern = "(" + "|".join(re.escape(placeholder) for placeholder in names) + ")"
    pieces: list[Piece] = []
    for part in re.split(pattern, text):
        if part in names:
            pieces.append(MediaPiece(names[part], counts[names[part]]))
            counts[names[part]] += 1
        elif part:
            pieces.append(TextPiece(part, has_loss=False))
    return pieces


def check_media(
    pieces: Sequence[Piece], files: Mapping[str, Sequence[object]], config: MimoConfig, key: str
) -> None:
    """ValueError unless every file has a placeholder and every placeholder a file."""
    for name, modality in config.modalities.items():
        placed = sum(isinstance(p, MediaPiece) and p.modality == name for p in pieces)
        given_count = len(files.get(name, ()))
        if placed != given_count:
            raise ValueError(
                f"sample {key}: {placed} {modality.placeholder} in the text, but {given_count} "
                f"{modality.singular} files; give one file for each placeholder"
            )


def tokenise(
    pieces: Sequence[Piece],
    media_tokens: Mapping[str, Sequence[int]],
    config: MimoConfig,
    tokenizer: Tokenizer,
) -> TokenSequence:
    """The row of a conversation; `media_tokens[modality][i]` is item i's `num_tokens`.

    An answer ends with the end-of-text token, which is learned too. The last token has no
    successor, so its label is padding without loss.
    """
    ids = [tokenizer.bos_id] if config.add_bos and tokenizer.bos_id >= 0 else []
    learned = [0] * len(ids)
    for piece in pieces:
        if isinstance(piece, MediaPiece):
            count = media_tokens[piece.modality][piece.index]
            new = [config.modalities[piece.modality].token_id] * count
        else:
            new = _without_placeholder_ids(tokenizer.encode(piece.text), config)
        has_loss = isinstance(piece, TextPiece) and piece.has_loss
        if has_loss:
            new = [*new, tokenizer.eos_id]
        ids += new
        learned += [int(has_loss)] * len(new)
    return TokenSequence(ids, [*ids[1:], tokenizer.pad_id], [*learned[1:], 0])


def _without_placeholder_ids(ids: list[int], config: MimoConfig) -> list[int]:
    """Text may spell a placeholder, in an answer say; as an id it would ask for an item."""
    special = {modality.token_id for modality in config.modalities.values()}
    return [i for i in ids if i not in special]


EncoderInputs = dict[str, torch.Tensor]
# From the name of a file in a record to the file.
FindFile = Callable[[str], Source]


@dataclass(frozen=True)
class Sample:
    """`media[modality]` holds the inputs of each item, `sources` where each came from."""

    key: str
    tokens: TokenSequence
    media: dict[str, list[EncoderInputs]]
    sources: dict[str, list[str]]


@dataclass(frozen=True)
class SampleReader:
    """Turns records into samples for one model.

    `augment` varies the media; `blank` names modalities whose content is wiped out.
    """

    config: MimoConfig
    tokenizer: Tokenizer
    seq_length: int
    augment: bool = False
    blank: Collection[str] = ()

    def __post_init__(self) -> None:
        if self.tokenizer.size > self.config.language.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.size} tokens, but {self.config.name}'s "
                f"vocabulary holds {self.config.language.vocab_size}; use the tokenizer the data "
                "was prepared with"
            )

    def read(
        self,
        record: Mapping[str, Any],
        find: FindFile,
        generator: np.random.Generator | None = None,
    ) -> Sample:
        """The sample of a JSON record; `find` knows the files that it names."""
        key = str(record.get("key"))
        files = files_of(record, self.config, find, key)
        pieces = to_pieces(parse_turns(record.get("conversations"), key), self.config)
        return self.from_pieces(pieces, files, key, generator)

    def from_pieces(
        self,
        pieces: Sequence[Piece],
        files: Mapping[str, Sequence[Source]],
        key: str,
        generator: np.random.Generator | None = None,
    ) -> Sample:
        """The sample of a conversation that is cut into pieces already."""
        check_media(pieces, files, self.config, key)
        media: dict[str, list[EncoderInputs]] = {}
        counts: dict[str, list[int]] = {}
        for name, given in files.items():
            encoder = self.config.modalities[name].encoder
            for file in given:
                item = self._inputs(name, file, generator)
                media.setdefault(name, []).append(item)
                counts.setdefault(name, []).append(encoder.num_tokens(item))
                self._check_length(sum(map(sum, counts.values())), counts, key)
        row = tokenise(pieces, counts, self.config, self.tokenizer)
        self._check_length(len(row.ids), counts, key)
        sources = {name: [str(f) for f in files[name]] for name in media}
        return Sample(key, row, media, sources)

    def _check_length(self, tokens: int, counts: Mapping[str, Sequence[int]], key: str) -> None:
        """After each item, so that no more are decoded than could fit."""
        if tokens > self.seq_length:
            spent = ", ".join(f"{sum(c)} for {name}" for name, c in counts.items()) or "all text"
            raise ValueError(
                f"sample {key}: {tokens} tokens ({spent}) do not fit --seq-length "
                f"{self.seq_length}; raise it or shorten the conversation"
            )

    def _inputs(
        self, name: str, file: Source, generator: np.random.Generator | None
    ) -> EncoderInputs:
        encoder = self.config.modalities[name].encoder
        raw = encoder.read(file)
        if name in self.blank:
            raw = encoder.blank(raw)
        if self.augment and generator is not None:
            raw = encoder.augment(raw, generator)
        return encoder.preprocess(raw)


def refuse_unknown_media(record: Mapping[str, Any], key: str, config: MimoConfig) -> None:
    """ValueError for files of a modality that `config` does not have."""
    for name, value in record.items():
        is_media = isinstance(value, list) and value and isinstance(value[0], str)
        if is_media and name not in config.modalities:
            raise ValueError(
                f"sample {key}: holds {name}, but {config.name} takes "
                f"{', '.join(config.modalities) or 'text only'}; choose another "
                "--model-provider or --train-split"
            )


def files_of(
    record: Mapping[str, Any], config: MimoConfig, find: FindFile, key: str
) -> dict[str, list[Source]]:
    """The files of each modality that a record names; ValueError for other modalities'."""
    refuse_unknown_media(record, key, config)
    return {name: _files(record, name, key, find) for name in config.modalities}


def _files(record: Mapping[str, Any], name: str, key: str, find: FindFile) -> list[Source]:
    given = record.get(name, [])
    if not isinstance(given, list) or not all(isinstance(f, str) for f in given):
        raise ValueError(f"sample {key}: {name} must be a list of file names, not {given!r}")
    try:
        return [find(file) for file in given]
    except ValueError as error:
        raise ValueError(f"sample {key}: {error}") from None


@dataclass(frozen=True)
class FilesInside:
    """Files under `root`; ValueError for one that lies elsewhere."""

    root: Path

    def __call__(self, name: str) -> Path:
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError(f"{path} lies outside the data folder {self.root}")
        return path
