"""Tokenizers: SentencePiece models and Hugging Face tokenizer folders."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from examples.mimo.configs.schema import MimoConfig

# Of files that strangers wrote. The largest tokenizer.json have 40 MB, and vocabularies 300,000.
MAX_JSON_BYTES, MAX_DEPTH, MAX_SIZE = 2**28, 64, 2**24
# How many times as long a normaliser may make a text, and a character of Unicode's longest form.
MAX_EXPANSION, LONGEST_FORM = 100, 64
# A run of one of them shows most patterns whose time is exponential.
PROBES = "aAx1 -_.\n\u00e9"


class Tokenizer(Protocol):
    """What the data path and generation need of a tokenizer; a token that it lacks is -1.

    Any of `end_ids` ends an answer; `eos_id`, one of them, ends an answer in training. `unk_id`
    stands for characters that the vocabulary lacks. `symbols`
    are the tokens that are found in a text as they are spelled, before it is cut into words;
    those of them in `special` are never text.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    end_ids: frozenset[int]
    size: int
    symbols: dict[str, int]
    special: frozenset[int]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class SentencePieceTokenizer:
    """A `tokenizer.model`."""

    def __init__(self, path: Path) -> None:
        import sentencepiece
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise ValueError(f"{path}: not a SentencePiece model") from None
        self.bos_id = self.model.bos_id()
        self.pad_id = self.model.pad_id()
        self.unk_id = self.model.unk_id()
        self.size = self.model.vocab_size()
        self.eos_id, self.end_ids = end_ids(path.parent, self.model.eos_id(), self.size)
        proto = ModelProto.FromString(self.model.serialized_model_proto())
        pieces, rules = proto.pieces, (proto.normalizer_spec, proto.denormalizer_spec)
        _check_expansion(path, max(_longest_form(rule.precompiled_charsmap) for rule in rules))
        kinds = {number: piece.type for number, piece in enumerate(pieces)}
        piece_type = ModelProto.SentencePiece
        self.special = frozenset(i for i, kind in kinds.items() if kind == piece_type.CONTROL)
        self.symbols = {
            pieces[number].piece: number
            for number, kind in kinds.items()
            if kind in (piece_type.CONTROL, piece_type.USER_DEFINED)
        }

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no begin or end token. ValueError for an unpaired surrogate."""
        _check_whole(text)
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens vanish."""
        return self.model.decode(ids)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 of what a token adds to a text; a word's includes the space before it."""
        piece = self.model.id_to_piece(token_id)
        if self.model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self.model.is_control(token_id) or self.model.is_unknown(token_id):
            return self.model.decode([token_id]).encode()
        return piece.replace("\u2581", " ").encode()


class HuggingFaceTokenizer:
    """A folder with `tokenizer.json`; code in the folder is never run."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        self.path = path
        described = read_json(path / HUGGING_FACE)
        with _errors_of(path, "no tokenizer that can be read"):
            times = max(_expansion(described.get(name)) for name in ("normalizer", "decoder"))
        _check_expansion(path / HUGGING_FACE, times)
        with _errors_of(path, "no tokenizer that can be read"), _silent_rust():
            self.model: Any = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
            for character in PROBES:
                self.model.encode(60 * character + "!")
        # Ids may have gaps, which makes the largest one larger than their number.
        self.size = max(len(self.model), 1 + max(self.model.get_vocab().values(), default=-1))
        if self.size > MAX_SIZE:
            raise ValueError(f"{path}: token ids up to {self.size - 1:,}, more than {MAX_SIZE:,}")
        self.bos_id = _id_or_none(self.model.bos_token_id)
        eos_id = _id_or_none(self.model.eos_token_id)
        self.eos_id, self.end_ids = end_ids(path, eos_id, self.size)
        self.pad_id = _id_or_none(self.model.pad_token_id)
        self.unk_id = _id_or_none(self.model.unk_token_id)
        added = self.model.added_tokens_decoder
        self.symbols = {token.content: token_id for token_id, token in added.items()}
        # Some name a word for padding, such as "!", which stays one that people write.
        words = self.model.backend_tokenizer.get_vocab(with_added_tokens=False)
        self.special = frozenset(
            token_id
            for token_id, token in added.items()
            if token.special and (token.content not in words or RESERVED.fullmatch(token.content))
        )
        # The kind of decoder says how a token spells its bytes; JSON is its only description.
        decoder = self.model.backend_tokenizer.decoder
        self.decoder = bytes(decoder.__getstate__()).decode() if decoder else ""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no begin or end token. ValueError for an unpaired surrogate."""
        _check_whole(text)
        with _errors_of(self.path, "its tokenizer cannot encode this text"):
            return self.model.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens vanish."""
        return self.model.decode([token_id for token_id in ids if token_id not in self.special])

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 of what a token adds to a text; a word's includes the space before it."""
        token = self.model.convert_ids_to_tokens(token_id)
        if token is None or token_id in self.special:
            return b""
        if token in self.symbols:
            return token.encode()
        if '"ByteLevel"' in self.decoder:
            return bytes(_BYTE_OF[character] for character in token if character in _BYTE_OF)
        if '"ByteFallback"' in self.decoder and _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if "\u2581" in self.decoder:
            return token.replace("\u2581", " ").encode()
        # What it adds behind another one, as WordPiece writes "##ing" for "ing".
        before = self.encode("a")
        return self.decode([*before, token_id]).removeprefix(self.decode(before)).encode()


def read_json(file: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; ValueError, one line, for another, a huge or a deep one."""
    try:
        size = file.stat().st_size
        values = json.loads(file.read_text(encoding="utf-8")) if size <= max_bytes else {}
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: not JSON; mend or remove it") from None
    if size > max_bytes:
        raise ValueError(f"{file}: {size:,} bytes of JSON, more than {max_bytes:,}")
    if not isinstance(values, dict):
        raise ValueError(f"{file}: not a JSON object; mend or remove it")
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        lists = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for some in lists for child in some if isinstance(child, dict | list)]
        if not level:
            return values
    raise ValueError(f"{file}: JSON of more than {MAX_DEPTH} levels")


@contextlib.contextmanager
def _errors_of(path: Path, what: str) -> Iterator[None]:
    """A ValueError in place of any error; a panic of the library's Rust is no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path}: {what} ({' '.join(str(error).split())[:200]})") from None


@contextlib.contextmanager
def _silent_rust() -> Iterator[None]:
    """Throw away stderr, where a panic in Rust writes a traceback of its own."""
    with open(os.devnull, "w") as nowhere, os.fdopen(os.dup(2)) as stderr:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr.fileno(), 2)


def _check_expansion(file: Path, times: float) -> None:
    if times > MAX_EXPANSION:
        raise ValueError(
            f"{file}: may make a text {times:,.0f} times as long, over {MAX_EXPANSION}"
        )


def _expansion(step: Any) -> float:
    """How many times as long a normaliser or a decoder of a `tokenizer.json` may make a text."""
    step = step if isinstance(step, dict) else {}
    times, new = 1.0, str(step.get("content", ""))
    for part in (*(step.get("normalizers") or ()), *(step.get("decoders") or ())):
        times *= _expansion(part)
    if step.get("type") == "Replace":
        old = (step.get("pattern") or {}).get("String")  # an expression may match nothing
        times *= max(1.0, len(new) / len(old)) if old else 1.0 + len(new)
    times *= _longest_form(base64.b64decode(step.get("precompiled_charsmap") or ""))
    return times * (1 + len(str(step.get("prepend", ""))))


def _longest_form(charsmap: bytes) -> float:
    """The longest of SentencePiece's forms of a character, in the longest that Unicode has."""
    # They end with a zero each, behind a trie whose length comes first.
    forms = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
    return max(1.0, max(map(len, forms)) / LONGEST_FORM)


def _id_or_none(token_id: int | None) -> int:
    return -1 if token_id is None else token_id


_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def _byte_level_alphabet() -> dict[str, int]:
    """The character -> the byte that it stands for in the tokens of GPT-2 and its successors.

    Bytes that print stand for themselves; the others follow from 256 on.
    """
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    characters = {chr(byte): byte for byte in printing}
    return characters | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def end_ids(folder: Path, eos_id: int, size: int) -> tuple[int, frozenset[int]]:
    """The token that ends an answer in training, and all that end one.

    They are `eos_id`, -1 if there is none, and those of a `generation_config.json` in `folder`.
    ValueError, one line, when nothing can end an answer.
    """
    ends = frozenset(i for i in (eos_id, *listed_end_ids(folder, size)) if i >= 0)
    if not ends:
        raise ValueError(
            f"{folder}: this tokenizer has no end-of-text token, so no answer would end; name one "
            f"as eos_token in tokenizer_config.json, or as eos_token_id in {GENERATION_CONFIG}"
        )
    return (eos_id if eos_id >= 0 else min(ends)), ends


def listed_end_ids(folder: Path, size: int) -> list[int]:
    """The end tokens in a `generation_config.json`, where Llama 3 and Qwen list several.

    ValueError, one line, when the file is damaged or a vocabulary of `size` lacks one of them.
    """
    file = folder / GENERATION_CONFIG
    listed: Any = []
    if file.is_file():
        listed = read_json(file).get("eos_token_id")
        listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    for token_id in listed:
        if type(token_id) is not int or not 0 <= token_id < size:
            raise ValueError(
                f"{file}: eos_token_id {token_id!r:.40} is no token of these {size:,}; mend or "
                "remove the file"
            )
    return listed


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
    if token_id in tokenizer.special:
        return False
    if (not isinstance(tokenizer, HuggingFaceTokenizer) and RESERVED.fullmatch(text)) or (
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
RESERVED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")

# Byte tokens of SentencePiece that no text is spelled with (RFC 3629), so they are free as well.
_NEVER_IN_UTF_8 = {f"<0x{byte:02X}>" for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}


HUGGING_FACE, SENTENCE_PIECE = "tokenizer.json", "tokenizer.model"
GENERATION_CONFIG = "generation_config.json"
FILES = (
    *(SENTENCE_PIECE, HUGGING_FACE, "tokenizer_config.json", "special_tokens_map.json"),
    GENERATION_CONFIG,
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put the files of the tokenizer at `source`, a SentencePiece file or a folder, in `folder`."""
    names: Iterable[str] = FILES
    if source.is_file():
        shutil.copyfile(source, folder / SENTENCE_PIECE)
        source, names = source.parent, [GENERATION_CONFIG]
    for name in names:
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
    placeholders = {m.placeholder: m.token_id for m in config.inputs.values()}
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
