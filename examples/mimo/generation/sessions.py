"""How avlm_inference.py asks more than once: a file of questions, and a chat at the terminal.

A line of a file of questions has a `prompt` or `conversations`, and for each modality (`images`,
`audios`) the names of files in the file's folder. The answer that a line of training data ends with
is written beside the model's, as `expected`. A line of the output has the number of its input line,
and an `answer` or an `error`; a run that was interrupted goes on where the output ends. What else
than text an answer holds is in files beside the output, in the folder OUTPUT.files.

In a chat, earlier turns, their media and what the model put out stay in the prefix cache.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from examples.mimo.cli.command import ProgressBar
from examples.mimo.data.conversation import Sample
from examples.mimo.data.turns import (
    FilesInside,
    conversation_of,
    errors_named,
    without_last_answer,
)
from examples.mimo.generation.api import Mimo, on_rank_zero
from examples.mimo.generation.sampling import Options
from examples.mimo.generation.scheduler import Answer, AnswerParts
from examples.mimo.modalities.files import json_lines

MAX_LINE_BYTES = 10_000_000
# Every line of the output starts so, which tells our own files from others.
LINE_START = b'{"line": '


@dataclass(frozen=True)
class Question:
    """A line of the input: a sample, or the error that it is answered with."""

    line: int
    key: str | None = None
    sample: Sample | None = None
    error: str | None = None
    expected: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """What its output says beside the answer."""
        fields = {"key": self.key, "expected": self.expected}
        return {name: value for name, value in fields.items() if value is not None}


def answer_file(
    model: Mimo,
    source: Path,
    target: Path,
    options: Options,
    samples: int = 1,
    batch_size: int = 16,
) -> None:
    """Answer every line of `source` that `target` does not hold yet, `samples` times each.

    Answers are written as soon as they are done, in that order. A line that cannot be read is
    answered with an error.
    """
    folder = target.with_name(f"{target.name}.files")
    num_lines, done = on_rank_zero(lambda: _open_files(source, target, folder))
    progress = ProgressBar(target.name, num_lines * samples)
    fields: dict[int, dict[str, Any]] = {}
    count = len(done)
    with _Output(target, samples) as output:

        def missing_answers() -> Iterator[tuple[int, Sample]]:
            nonlocal count
            for question in _questions(model, source, samples, done):
                fields[question.line] = question.fields
                for number in range(samples):
                    if (question.line, number) in done:
                        continue
                    if question.sample is not None:
                        yield (question.line - 1) * samples + number, question.sample
                        continue
                    error = {**question.fields, "error": question.error}
                    output.write(question.line, number, error)
                    count += 1

        for number, answer in model.iter_answers(missing_answers(), options, batch_size):
            line, sample = number // samples + 1, number % samples
            path_of = functools.partial(_path_of, folder / f"{line}-{sample}")
            files: dict[str, list[str]] = {}
            try:
                saved = save_outputs(model, answer.outputs, path_of)
                files = {m: [f"{folder.name}/{p.name}" for p in ps] for m, ps in saved.items()}
            except NotDecodedError as error:  # the same again in every later run
                answer = dataclasses.replace(answer, error=str(error))
            output.write(line, sample, fields[line] | answer_fields(answer, files))
            count += 1
            progress(count)


def answer_fields(answer: Answer, files: Mapping[str, list[str]]) -> dict[str, Any]:
    """An answer, or the error in its place, as JSON-ready values; `files` hold its outputs."""
    if answer.error is not None:
        return {"error": answer.error}
    fields: dict[str, Any] = {"answer": answer.text}
    fields |= {"outputs": files} if files else {}
    fields["tokens"] = answer.tokens
    fields["finish"] = answer.finish
    if answer.logprobs is not None:
        fields["logprobs"] = answer.logprobs
        fields["prompt_logprobs"] = answer.prompt_logprobs
    return fields


def _path_of(stem: Path, index: int, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}-{index}{suffix}")


# From the number of an output in its answer, and the suffix that its codec prefers, to its file.
PathOf = Callable[[int, str], Path]


class NotDecodedError(ValueError):
    """A codec's own code fails at the codes of an output."""


def save_outputs(
    model: Mimo, outputs: Mapping[str, Sequence[Sequence[int]]], path_of: PathOf
) -> dict[str, list[Path]]:
    """Decode outputs into files, which rank 0 writes, and give their paths by modality.

    ValueError, one line, for a file that cannot be written; NotDecodedError, one line, for codes
    that the codec fails at.
    """

    def save() -> dict[str, list[Path]] | str:
        paths: dict[str, list[Path]] = {}
        numbers = itertools.count()
        for name, items in outputs.items():
            codec = model.config.outputs[name].codec
            for codes in items:
                path = path_of(next(numbers), next(iter(codec.suffixes), ""))
                try:
                    raw = codec.decode(codes)
                except Exception as error:
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    return f"{path}: {type(codec).__name__}.decode failed: {reason}"
                with errors_named(str(path), drop=f"{path}: "):
                    path.parent.mkdir(exist_ok=True)
                    codec.save(raw, path)
                paths.setdefault(name, []).append(path)
        return paths

    saved = on_rank_zero(save) if outputs else {}
    if isinstance(saved, str):
        raise NotDecodedError(saved)
    return saved


def save_as(
    model: Mimo, answer: Answer, name: str, path: Path, sample: int | None
) -> dict[str, list[str]]:
    """Write an answer's outputs of a modality to `path`, and give the names of the files.

    Where there are several `samples`, or several outputs in one, their numbers follow the stem.
    """
    items = answer.outputs.get(name, [])
    of_sample = "" if sample is None else f"-{sample}"

    def path_of(index: int, suffix: str) -> Path:
        of_output = f"-{index}" if len(items) > 1 else ""
        return path.with_name(f"{path.stem}{of_sample}{of_output}{path.suffix}")

    if not items and os.environ["RANK"] == "0":
        singular = model.config.outputs[name].singular
        print(f"{path}: not written, as the answer holds no {singular}", file=sys.stderr)
    saved = save_outputs(model, {name: items} if items else {}, path_of)
    return {name: [str(file) for file in files] for name, files in saved.items()}


def question_record(line: object, model: Mimo, key: str) -> tuple[dict[str, Any], str | None]:
    """The record of a parsed line, and the answer that is left out of it, if it ends with one.

    ValueError, one line, when it asks nothing.
    """
    if not isinstance(line, dict):
        raise ValueError("a question must be a JSON object")
    turns = conversation_of(line)
    if turns is None:
        prompt = line.get("prompt")
        prompt = model.config.prompt if prompt is None else prompt
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be text, not {prompt!r:.80}")
        if not prompt.strip() and not any(line.get(name) for name in model.config.inputs):
            raise ValueError("nothing to answer: give a prompt or a file")
        turns = [{"role": "user", "content": prompt}]
    question = {**line, "key": key, "conversations": turns}
    question, expected = without_last_answer(question, model.config)
    if expected is not None and not question["conversations"]:
        raise ValueError("the conversation is an answer alone; end with a question, or begin so")
    return question, expected


def _questions(
    model: Mimo, source: Path, samples: int, done: set[tuple[int, int]]
) -> Iterator[Question]:
    """The lines that lack an answer, read by rank 0 for every rank.

    Read one by one: the file may exceed the memory.
    """
    lines = json_lines(source, MAX_LINE_BYTES) if os.environ["RANK"] == "0" else None

    def next_question() -> Question | None:
        assert lines is not None
        for number, line in lines:
            if any((number, sample) not in done for sample in range(samples)):
                return _question(model, source, number, line)
        return None

    while (question := on_rank_zero(next_question)) is not None:
        yield question


def _question(model: Mimo, source: Path, number: int, line: Any) -> Question:
    if isinstance(line, ValueError):
        return Question(number, error=str(line))
    key = None
    try:
        key = line.get("key") if isinstance(line, dict) else None
        key = None if key is None else str(key)
        record, expected = question_record(line, model, key or f"line {number}")
        sample = model.encode(record, FilesInside(source.parent))
        return Question(number, key, sample, expected=expected)
    except ValueError as error:
        return Question(number, key, error=" ".join(str(error).split()))


def _open_files(source: Path, target: Path, folder: Path) -> tuple[int, set[tuple[int, int]]]:
    """The number of lines, and the (line, sample) pairs that `target` has answered already."""
    if not source.is_file():
        raise ValueError(f"--input {source}: no such file")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"--output {target}: its folder does not exist")
    if target.exists() and target.samefile(source):
        raise ValueError(f"--output {target}: this is the input; name another file")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {target}: {folder} is for its files, but it is no folder")
    try:
        # Also where there is nothing to read: later rank 0 alone would learn that it cannot write.
        with target.open("ab+") as file:
            file.seek(0)
            done = _read_answered(target, file)
    except OSError as error:
        raise ValueError(f"--output {target}: {error.strerror}; name another file") from None
    return sum(1 for _ in json_lines(source, MAX_LINE_BYTES)), done


def _read_answered(target: Path, file: BinaryIO) -> set[tuple[int, int]]:
    """The answers a file holds; the incomplete last line of a killed run is cut off."""
    done, end = set(), 0
    for number, line in enumerate(iter(file.readline, b""), start=1):
        is_complete = line.endswith(b"\n")
        if not is_complete and (line.startswith(LINE_START) or LINE_START.startswith(line)):
            file.truncate(end)
            break
        end += len(line)
        try:
            if not is_complete:
                raise ValueError
            answer = json.loads(line)
            done.add((int(answer["line"]), int(answer.get("sample", 0))))
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"--output {target}, line {number}: no answer of an earlier run; name a new file"
            ) from None
    return done


class _Output:
    """The file of answers, which rank 0 writes."""

    def __init__(self, path: Path, samples: int) -> None:
        self.samples = samples
        self.file = None
        if os.environ["RANK"] == "0":
            # An unpaired surrogate, which JSON allows and UTF-8 does not, is written as an escape.
            self.file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def write(self, line: int, sample: int, fields: dict[str, Any]) -> None:
        """Write one line and flush it, so that a killed run loses none."""
        if not self.file:
            return
        entry: dict[str, Any] = {"line": line}
        entry |= {"sample": sample} if self.samples > 1 else {}
        self.file.write(json.dumps(entry | fields, ensure_ascii=False, allow_nan=False))
        self.file.write("\n")
        self.file.flush()


@dataclass
class Conversation:
    """The turns so far with their media, and the media that the next turn adds."""

    turns: list[dict[str, Any]] = field(default_factory=list)
    media: dict[str, list[Path]] = field(default_factory=dict)
    new_media: dict[str, list[Path]] = field(default_factory=dict)

    def record(self, content: list[dict[str, str]]) -> dict[str, Any]:
        """The whole conversation with a prompt, its parts, as its last turn."""
        turns = [*self.turns, {"role": "user", "content": content}]
        return {"key": "this turn", "conversations": turns, **self._all_media()}

    def add_turns(self, content: list[dict[str, str]], answer: list[dict[str, Any]]) -> None:
        """Append the parts of a prompt and of its answer."""
        self.media, self.new_media = self._all_media(), {}
        self.turns.append({"role": "user", "content": content})
        self.turns.append({"role": "assistant", "content": answer})

    def _all_media(self) -> dict[str, list[Path]]:
        # A dict keeps the order of names, which a set would change from process to process.
        names = dict.fromkeys([*self.media, *self.new_media])
        return {n: [*self.media.get(n, []), *self.new_media.get(n, [])] for n in names}


class ChatSession:
    """Answers lines of text; on several ranks rank 0 reads the lines and all ranks answer.

    What else than text an answer holds is written into `folders`, by modality, by default into a
    new one for temporary files.
    """

    def __init__(
        self, model: Mimo, options: Options, output: TextIO, folders: Mapping[str, Path]
    ) -> None:
        self.model, self.options, self.output = model, options, output
        self.folders = dict(folders)
        self.modalities = {f"/{m.singular}": name for name, m in model.config.inputs.items()}
        self.conversation = Conversation()
        self.is_rank_zero = os.environ["RANK"] == "0"

    @property
    def help(self) -> str:
        """One line about the commands."""
        files = ", ".join(f"{slash} FILE" for slash in self.modalities)
        return f"{files} add to the next turn; /reset starts over; /quit or Ctrl-D ends"

    def run(self, lines: Iterable[str]) -> None:
        """Answer lines until they end or one is /quit."""
        self._message(self.help)
        iterator = iter(lines)
        while (line := on_rank_zero(lambda: self._next_line(iterator))) is not None:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                return
            try:
                self._run_line(word, rest.strip(), line.strip())
            except ValueError as error:
                self._message(" ".join(str(error).split()))

    def _next_line(self, lines: Iterator[str]) -> str | None:
        print("> ", end="", file=sys.stderr, flush=True)
        return next(lines, None)

    def _run_line(self, word: str, rest: str, line: str) -> None:
        if word == "/reset":
            self.conversation = Conversation()
        elif word in self.modalities:
            if not rest:
                raise ValueError(f"{word}: name a file behind it")
            self._add_file(self.modalities[word], Path(rest))
        elif word.startswith("/"):
            raise ValueError(f"{word}: not a command; {self.help}")
        elif line or self.conversation.new_media:
            self._answer(line or self.model.config.prompt)

    def _add_file(self, name: str, file: Path) -> None:
        description = on_rank_zero(lambda: self._describe(name, file))
        self.conversation.new_media.setdefault(name, []).append(file)
        self._message(f"{file}: {description}")

    def _describe(self, name: str, file: Path) -> str:
        encoder = self.model.config.inputs[name].encoder
        with errors_named(str(file), drop=f"{file}: "):
            return encoder.describe(encoder.read(file))

    def _answer(self, prompt: str) -> None:
        modalities = self.model.config.inputs
        files = self.conversation.new_media
        # What people type is words, whatever it spells; files come by commands, and go in front.
        content = [
            {"type": m.singular} for name, m in modalities.items() for _ in files.get(name, ())
        ]
        content.append({"type": "text", "text": prompt})
        record = self.conversation.record(content)
        sample = on_rank_zero(lambda: self.model.encode(record))
        options = self.options.with_seed_offset(len(self.conversation.turns) // 2)
        answer = AnswerParts(self.model.config)
        try:
            for piece in self.model.stream_answer(sample, options):
                answer.add(piece)
                self._print(piece.text)
        except KeyboardInterrupt:
            # One process can cut its answer short; several ranks would not stop at the same token.
            if os.environ["WORLD_SIZE"] != "1":
                raise
        self._print("\n")
        self.conversation.add_turns(content, answer.parts)
        for modality, codes in answer.outputs:
            self._save(modality, codes)

    def _save(self, modality: str, codes: Sequence[int]) -> None:
        if modality not in self.folders:
            self.folders[modality] = Path(on_rank_zero(lambda: tempfile.mkdtemp(prefix="mimo-")))
        folder, singular = self.folders[modality], self.model.config.outputs[modality].singular

        def path_of(_: int, suffix: str) -> Path:
            """Files of earlier conversations stay as they are."""
            numbered = (folder / f"{singular}-{n}{suffix}" for n in itertools.count(1))
            return next(path for path in numbered if not path.exists())

        ((path,),) = save_outputs(self.model, {modality: [codes]}, path_of).values()
        self._print(f"{path}\n")

    def _print(self, text: str) -> None:
        if self.is_rank_zero:
            print(text, end="", file=self.output, flush=True)

    def _message(self, text: str) -> None:
        if self.is_rank_zero:
            print(text, file=sys.stderr, flush=True)
