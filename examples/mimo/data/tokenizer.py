"""Tokenizers: SentencePiece models and Hugging Face tokenizer folders."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from examples.mimo.configs.schema import MimoConfig


class Tokenizer(Protocol):
    """What the data path and generation need of a tokenizer; without a begin token it is -1."""

    bos_id: int
    eos_id: int
    pad_id: int
    size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


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
        """Ids of `text`; no begin or end token. ValueError for an unpaired surrogate."""
        _check_whole(text)
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens vanish."""
        return self.model.decode(ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for control tokens."""
        if self.model.is_control(token_id):
            return b""
        piece = self.model.id_to_piece(token_id)
        if self.model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self.model.is_unknown(token_id):
            return self.model.decode([token_id]).encode()
        return piece.replace("▁", " ").encode()


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
        """Ids of `text`; no begin or end token. ValueError for an unpaired surrogate."""
        _check_whole(text)
        return self.model.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens vanish."""
        return self.model.decode(ids, skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for control tokens."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        added = self.model.added_tokens_decoder.get(token_id)
        if added is not None:
            return b"" if added.special else added.content.encode()
        piece = self.model.convert_ids_to_tokens(token_id)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        if "ByteLevel" in repr(self.model.backend_tokenizer.decoder):
            return bytes(byte_of[character] for character in piece)
        return piece.replace("▁", " ").encode()


def _check_whole(text: str) -> None:
    """ValueError for an unpaired surrogate, which JSON can spell and UTF-8 cannot."""
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
    elif _RESERVED.fullmatch(text) or (
        isinstance(tokenizer, SentencePieceTokenizer)
        and tokenizer.model.id_to_piece(token_id) in _NEVER_IN_UTF_8
    ):
        return False
    # A part of a character, which spells characters that the vocabulary lacks.
    if "\ufffd" in text:
        return True
    # Decoding may have taken the space away that a word begins with.
    return any(token_id in tokenizer.encode(start + text) for start in ("", " ", "a ", "a"))


def free_id_hint(tokenizer: Tokenizer, taken: Collection[int]) -> str:
    """`, such as 261,`: an id that is not `taken` and that no text uses; empty without any."""
    control = {*taken, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    # Reserved tokens stand at either end of a vocabulary, bytes at its beginning.
    near = [i for i in range(tokenizer.size) if i < 300 or i >= tokenizer.size - 300]
    for token_id in reversed(near):
        if token_id not in control and not is_ordinary_token(tokenizer, token_id):
            return f", such as {token_id},"
    return ""


# How tokenizers spell tokens that are kept for later: <unused7>, [unused7], <|reserved_7|>.
_RESERVED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")

# Byte tokens of SentencePiece that no text is spelled with (RFC 3629), so they are free as well.
_NEVER_IN_UTF_8 = {f"<0x{byte:02X}>" for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}


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


# Ids 0 to 3: padding, unknown, begin and end of text.
NUM_CONTROL_TOKENS = 4
NUM_BYTES = 256


def train_tokenizer(
    texts: Iterable[str], config: MimoConfig, vocab_size: int | None = None
) -> bytes:
    """A SentencePiece model for `config`: BPE with byte fallback, trained on `texts`.

    The placeholders are symbols of their own, at the ids that the config gives them. It has at most
    `vocab_size` tokens (default: the model's vocabulary), fewer if the text has no more to merge.
    ValueError when the placeholders or the characters of the text do not fit.
    """
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    size = config.language.vocab_size if vocab_size is None else vocab_size
    placeholders = {m.placeholder: m.token_id for m in config.modalities.values()}
    _check_vocab_size(size, placeholders, config)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            byte_fallback=True,
            # Text is encoded as it is, so that decoding gives it back to the character.
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            user_defined_symbols=sorted(placeholders, key=placeholders.__getitem__),
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).rpartition("] ")[2].split())
        raise ValueError(f"no tokenizer of {size} tokens from this text: {reason}") from None
    trained = ModelProto.FromString(model.getvalue())
    # The trainer numbers symbols from 4 on; merges go by score, so that pieces can be reordered.
    pieces = [piece for piece in trained.pieces if piece.piece not in placeholders]
    symbols = {piece.piece: piece for piece in trained.pieces if piece.piece in placeholders}
    for placeholder, token_id in sorted(placeholders.items(), key=lambda item: item[1]):
        if token_id > len(pieces):
            raise ValueError(
                f"{config.name} has {placeholder} at token id {token_id}, but the text gives only "
                f"{len(pieces)} tokens; give more text, or a config with a smaller id"
            )
        pieces.insert(token_id, symbols[placeholder])
    del trained.pieces[:]
    trained.pieces.extend(pieces)
    return trained.SerializeToString()


def _check_vocab_size(size: int, placeholders: Mapping[str, int], config: MimoConfig) -> None:
    if size > config.language.vocab_size:
        raise ValueError(
            f"--vocab-size {size}: {config.name}'s vocabulary holds {config.language.vocab_size}"
        )
    smallest = NUM_CONTROL_TOKENS + len(placeholders) + NUM_BYTES
    if size < smallest:
        raise ValueError(
            f"--vocab-size {size}: at least {smallest} are needed for {NUM_CONTROL_TOKENS} control "
            f"tokens, {len(placeholders)} placeholders and {NUM_BYTES} bytes"
        )
    for placeholder, token_id in placeholders.items():
        if not NUM_CONTROL_TOKENS <= token_id < size:
            raise ValueError(
                f"{config.name} has {placeholder} at token id {token_id}; a tokenizer of {size} "
                f"tokens can place it at {NUM_CONTROL_TOKENS} to {size - 1}"
            )
