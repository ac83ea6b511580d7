"""Turns conversations with media into samples: token ids, labels, loss mask, encoder inputs.

`SampleEncoder.encode` is the only path: training, evaluation and inference all call it. A
conversation is cut into pieces: the template's text, what people said, media that the model is
shown, and outputs that it answers with. What it is shown becomes placeholders and encoder inputs;
an output becomes the codes of its codec, which are tokens as words are, and targets as an answer's
words are. Labels come from the pieces; nothing searches for an answer in the ids. Only the template
and the pieces make control tokens, placeholders and codes: what a person typed never does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch

from examples.mimo.configs import check_codecs
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.tokenizer import Tokenizer
from examples.mimo.data.turns import (
    ASSISTANT,
    SYSTEM,
    FindFile,
    MediaPlace,
    TextEncoder,
    Turn,
    check_tokenizer,
    conversation_of,
    errors_named,
    find_media,
    output_places,
    parse_turns,
    with_leading_places,
)
from examples.mimo.modalities.files import Source

EncoderInputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TextPiece:
    """Text of the template or of people, and whether the model is trained to say it."""

    text: str
    has_loss: bool = False
    is_template: bool = False


@dataclass(frozen=True)
class MediaPiece:
    """The place of the `index`-th item of a modality, of those that are shown or that are said."""

    modality: str
    index: int
    is_output: bool = False


@dataclass(frozen=True)
class EndPiece:
    """The end-of-text token behind an answer, which the model is trained to say."""


Piece = TextPiece | MediaPiece | EndPiece
# Modality and whether it is an output -> the tokens of each item: placeholders, or codes.
ItemTokens = Mapping[tuple[str, bool], Sequence[list[int]]]


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
    files they came from, `outputs[modality]` of those that answers consist of. `skipped` are
    samples that could not be read and that this one stands in for.
    """

    key: str
    tokens: TokenSequence
    media: dict[str, list[EncoderInputs]]
    sources: dict[str, list[str]]
    outputs: dict[str, list[str]] = field(default_factory=dict)
    skipped: tuple[BadSample, ...] = ()


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes records into samples for one model.

    `seq_length` is the most tokens of a sample. `augment` varies the media where `encode` is given
    a generator; `blank` names modalities whose content is wiped out, to measure how much the model
    uses it. Records that are `answered` end with a question: files that have no place go in front
    of it, and earlier answers may be empty. ValueError for a tokenizer that does not fit the model,
    and for a codec without its files.
    """

    config: MimoConfig
    tokenizer: Tokenizer
    seq_length: int
    augment: bool = False
    blank: Collection[str] = ()
    answered: bool = False

    def __post_init__(self) -> None:
        check_codecs(self.config)
        check_tokenizer(self.tokenizer, self.config)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The tokenizer, with this model's control tokens."""
        return TextEncoder(self.tokenizer, self.config)

    def encode(
        self,
        record: Mapping[str, Any],
        find_file: FindFile,
        generator: np.random.Generator | None = None,
        name: str = "the prompt",
    ) -> Sample:
        """The sample of `{"key": ..., "conversations": [...], MODALITY: [files]}`; see `turns.py`.

        A media item is a file's name, which `find_file` resolves, or a `Source`. The last turn may
        be a question. Every error is a ValueError of one line that begins with the sample's key,
        or with `name` where the record has none; one about an item also names its file and
        modality, whatever a modality's `read` or `preprocess` raised.
        """
        key = record.get("key")
        where = name if key is None else f"sample {key}"
        with errors_named(where):
            turns = parse_turns(conversation_of(record), self.config, self.answered)
            if self.answered:
                turns = with_leading_places(turns, record, self.config)
            sources = find_media(turns, record, self.config, find_file)

        media: dict[str, list[EncoderInputs]] = {}
        # Of what is shown to the model (False), and of what it says.
        names: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}
        tokens: defaultdict[tuple[str, bool], list[list[int]]] = defaultdict(list)
        for modality, files in sources.items():
            for file, is_output in zip(files, output_places(turns, modality), strict=True):
                with errors_named(f"{where}, {file}, {modality}", drop=f"{file}: "):
                    if is_output:
                        run = self.config.outputs[modality].tokens_of(file)
                    else:
                        inputs = self._encoder_inputs(modality, file, generator)
                        media.setdefault(modality, []).append(inputs)
                        run = self.config.inputs[modality].tokens_of(inputs)
                tokens[modality, is_output].append(run)
                names[is_output].setdefault(modality, []).append(str(file))
                # After each item, so that no more are decoded than could fit.
                self._check_length(sum(map(len, chain(*tokens.values()))), tokens, where)

        with errors_named(where):
            pieces = to_pieces(turns, self.config)
            sequence = tokenise(pieces, tokens, self.config, self.text_encoder)
        self._check_length(len(sequence.ids), tokens, where)
        key = name if key is None else str(key)
        return Sample(key, sequence, media, names[False], names[True])

    def _encoder_inputs(
        self, modality: str, file: Source, generator: np.random.Generator | None
    ) -> EncoderInputs:
        encoder = self.config.inputs[modality].encoder
        raw = encoder.read(file)
        if modality in self.blank:
            raw = encoder.blank(raw)
        if self.augment and generator is not None:
            raw = encoder.augment(raw, generator)
        return encoder.preprocess(raw)

    def _check_length(self, length: int, tokens: ItemTokens, where: str) -> None:
        if length > self.seq_length:
            counts = [f"{sum(map(len, runs))} for {name}" for (name, _), runs in tokens.items()]
            raise ValueError(
                f"{where}: {length} tokens ({', '.join(counts) or 'all text'}) do not fit a "
                f"sequence of {self.seq_length}; shorten the conversation, or train with a longer "
                "--seq-length"
            )


def to_pieces(turns: Sequence[Turn], config: MimoConfig) -> list[Piece]:
    """The turns in the config's chat template; after a question, with what begins an answer."""
    chat = config.chat
    counts: Counter[tuple[str, bool]] = Counter()
    pieces: list[Piece] = []

    def add(text: str, has_loss: bool = False, is_template: bool = True) -> None:
        if text:
            pieces.append(TextPiece(text, has_loss, is_template))

    add("" if turns[0].role == SYSTEM else chat.system)
    for number, turn in enumerate(turns):
        is_answer, is_last = turn.role == ASSISTANT, number == len(turns) - 1
        if number and turns[number - 1].role == ASSISTANT:
            add(chat.between)
        if is_answer:
            add(chat.answer_start(is_last))
        before, after = chat.around(turn.role)
        add(before, is_answer)
        for part in turn.parts:
            if isinstance(part, MediaPlace):
                item = part.modality, part.is_output
                pieces.append(MediaPiece(part.modality, counts[item], part.is_output))
                counts[item] += 1
            else:
                add(part, is_answer, is_template=False)
        add(after, is_answer)
        if is_answer:
            pieces.append(EndPiece())
    if turns[-1].role != ASSISTANT:
        add(chat.answer_start(is_last=True))
    return pieces


def tokenise(
    pieces: Sequence[Piece], tokens: ItemTokens, config: MimoConfig, encoder: TextEncoder
) -> TokenSequence:
    """The tokens of a conversation whose media take `tokens`.

    An answer ends with the end-of-text token, which is a target too. The last token has no
    successor, so its label is 0 without loss.
    """
    bos_id = encoder.tokenizer.bos_id
    ids = [bos_id] if config.add_bos and bos_id >= 0 else []  # -1: it has none
    is_target = [0] * len(ids)
    goes_on = False
    # Text between two tokens is encoded as a whole, whoever wrote it, as words may cross the seam.
    # An answer is encoded apart from its question, which is all that the model will be given.
    runs = _runs(pieces, tokens, encoder)
    for (is_text, has_loss), run in groupby(runs, key=lambda r: (isinstance(r[0], str), r[1])):
        parts = [part for part, _ in run]
        if is_text:
            ids += encoder.encode("".join(parts), goes_on)
        else:
            ids += [token_id for part in parts for token_id in part]
        goes_on = is_text or not encoder.restarts
        is_target += [int(has_loss)] * (len(ids) - len(is_target))
    # Both are shifted: the loss of a token is taken where it is predicted, one place earlier.
    return TokenSequence(ids, [*ids[1:], 0], [*is_target[1:], 0])


def _runs(
    pieces: Sequence[Piece], tokens: ItemTokens, encoder: TextEncoder
) -> Iterator[tuple[Any, bool]]:
    """Plain text, or the ids of control tokens and media, each with whether it carries loss."""
    for piece in pieces:
        if isinstance(piece, MediaPiece):
            yield tokens[piece.modality, piece.is_output][piece.index], piece.is_output
        elif isinstance(piece, EndPiece):
            yield [encoder.tokenizer.eos_id], True
        elif piece.is_template:
            for part in encoder.split(piece.text):
                yield part if isinstance(part, str) else [part], piece.has_loss
        else:
            yield piece.text, piece.has_loss
