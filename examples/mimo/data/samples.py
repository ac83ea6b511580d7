"""A sample: one conversation as ids, with the encoder inputs of its media."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import (
    Piece,
    TokenRow,
    check_media,
    parse_turns,
    to_pieces,
    tokenise,
)
from examples.mimo.data.sources import Source
from examples.mimo.data.tokenizer import Tokenizer

EncoderInputs = dict[str, torch.Tensor]
# From the name of a file in a record to the file.
Find = Callable[[str], Source]


@dataclass(frozen=True)
class Sample:
    """`media[modality]` holds the inputs of each item, `sources` where each came from."""

    key: str
    row: TokenRow
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
        self, record: Mapping[str, Any], find: Find, generator: np.random.Generator | None = None
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
    record: Mapping[str, Any], config: MimoConfig, find: Find, key: str
) -> dict[str, list[Source]]:
    """The files of each modality that a record names; ValueError for other modalities'."""
    refuse_unknown_media(record, key, config)
    return {name: _files(record, name, key, find) for name in config.modalities}


def _files(record: Mapping[str, Any], name: str, key: str, find: Find) -> list[Source]:
    given = record.get(name, [])
    if not isinstance(given, list) or not all(isinstance(f, str) for f in given):
        raise ValueError(f"sample {key}: {name} must be a list of file names, not {given!r}")
    try:
        return [find(file) for file in given]
    except ValueError as error:
        raise ValueError(f"sample {key}: {error}") from None


@dataclass(frozen=True)
class Inside:
    """Files under `root`; ValueError for one that lies elsewhere."""

    root: Path

    def __call__(self, name: str) -> Path:
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError(f"{path} lies outside the data folder {self.root}")
        return path
