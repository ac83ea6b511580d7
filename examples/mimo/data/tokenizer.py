"""Text to ids and back: a SentencePiece model, or a Hugging Face tokenizer folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What the data path and generation need of a tokenizer; without a begin token it is -1."""

    bos_id: int
    eos_id: int
    pad_id: int
    size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class SentencePieceTokenizer:
    """A `tokenizer.model`; text is encoded as it is, without a space put before it."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise ValueError(f"{path}: not a SentencePiece model") from None
        self.bos_id = self.model.bos_id()
        self.eos_id = self.model.eos_id()
        self.pad_id = max(self.model.pad_id(), 0)
        self.size = self.model.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no begin or end token. ValueError for half a character."""
        _check_whole(text)
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens vanish."""
        return self.model.decode(ids)


class HuggingFaceTokenizer:
    """A folder with `tokenizer.json`; code in the folder is never run."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        self.model: Any = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        self.bos_id = -1 if self.model.bos_token_id is None else self.model.bos_token_id
        self.eos_id = self.model.eos_token_id
        self.pad_id = self.model.pad_token_id or 0
        self.size = len(self.model)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no begin or end token. ValueError for half a character."""
        _check_whole(text)
        return self.model.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens vanish."""
        return self.model.decode(ids, skip_special_tokens=True)


def _check_whole(text: str) -> None:
    """JSON can say one half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.start + 1]
        raise ValueError(f"the text holds {half!r}, which is half a character") from None


def is_ordinary_token(tokenizer: Tokenizer, token_id: int, placeholder: str = "") -> bool:
    """Whether plain text can hold this token: no control token, no unused one, no `placeholder`."""
    if token_id >= tokenizer.size:
        return False
    text = tokenizer.decode([token_id])
    if text in ("", placeholder):
        return False
    if isinstance(tokenizer, HuggingFaceTokenizer):
        added = tokenizer.model.added_tokens_decoder.get(token_id)
        if added is not None and added.special:
            return False
    elif _RESERVED.fullmatch(text):
        return False
    # A part of a character, which spells characters that the vocabulary lacks.
    if "\ufffd" in text:
        return True
    # Decoding may have taken the space away that a word begins with.
    return any(token_id in tokenizer.encode(start + text) for start in ("", " ", "a ", "a"))


# How tokenizers spell tokens that are kept for later: <unused7>, [unused7], <|reserved_7|>.
_RESERVED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


HUGGING_FACE, SENTENCE_PIECE = "tokenizer.json", "tokenizer.model"
FILES = (
    *(SENTENCE_PIECE, HUGGING_FACE, "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put the files of the tokenizer at `source`, a SentencePiece file or a folder, in `folder`."""
    if source.is_file():
        shutil.copyfile(source, folder / SENTENCE_PIECE)
        return
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def holds_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` finds one there."""
    return any((folder / name).is_file() for name in (HUGGING_FACE, SENTENCE_PIECE))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer at `path`: a SentencePiece file, or a folder that holds either kind."""
    if path.is_file():
        return SentencePieceTokenizer(path)
    if (path / HUGGING_FACE).is_file():
        return HuggingFaceTokenizer(path)
    if (path / SENTENCE_PIECE).is_file():
        return SentencePieceTokenizer(path / SENTENCE_PIECE)
    raise ValueError(f"{path}: no tokenizer here (tokenizer.model or tokenizer.json)")
