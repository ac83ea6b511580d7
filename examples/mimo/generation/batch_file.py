"""A file of questions and a file of answers, a JSON object a line.

A line of the input has a `prompt`, or `conversations` that end with a question, and the files of
each modality (`images`, `audios`) by name, in the input's folder. A line of the output has the
number of its input line, and an `answer` or an `error`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from examples.mimo.cli.command import ProgressBar
from examples.mimo.data.conversation import FilesInside, Sample, Turn, find_media, parse_turns
from examples.mimo.generation.api import Answerer, Request, share
from examples.mimo.generation.scheduler import Answer, Options

MAX_LINE_BYTES = 10_000_000
# Of every line of the output.
BEGINNING = b'{"line": '


@dataclass(frozen=True)
class Question:
    """A line of the input: a sample, or why it is none."""

    line: int
    key: str | None = None
    sample: Sample | None = None
    error: str | None = None


def answer_file(
    answerer: Answerer,
    source: Path,
    target: Path,
    options: Options,
    samples: int = 1,
    batch_size: int = 16,
) -> None:
    """Answer every line of `source` that `target` does not hold yet, `samples` times each.

    Answers are written as soon as they are known, in the order in which they are done. A line that
    cannot be read is answered with an error.
    """
    total, done = share(lambda: _begin(source, target))
    clock = ProgressBar(target.name, total * samples)
    keys: dict[int, str | None] = {}
    count = len(done)
    with _Output(target) as output:

        def asked() -> Iterator[tuple[int, Sample]]:
            nonlocal count
            for question in _questions(answerer, source, samples, done):
                keys[question.line] = question.key
                for number in range(samples):
                    if (question.line, number) in done:
                        continue
                    if question.sample is not None:
                        yield (question.line - 1) * samples + number, question.sample
                        continue
                    output.write(question.line, number, samples, question.key, error=question.error)
                    count += 1

        for number, answer in answerer.answers(asked(), options, batch_size):
            line, sample = number // samples + 1, number % samples
            output.write(line, sample, samples, keys[line], answer)
            count += 1
            clock(count)


def request_of(record: Any, root: Path, answerer: Answerer, key: str) -> Request:
    """What a line asks; ValueError, one line, when it asks nothing or names no file."""
    if not isinstance(record, dict):
        raise ValueError("a question must be a JSON object")
    files = find_media(record, answerer.config, FilesInside(root))
    if "conversations" in record:
        *history, last = parse_turns(record["conversations"])
    else:
        prompt = record.get("prompt", answerer.config.prompt)
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be text, not {prompt!r:.80}")
        history, last = [], Turn(is_answer=False, text=prompt)
    if last.is_answer:
        raise ValueError("the last turn is an answer already; end with a question")
    if not last.text.strip() and not any(files.values()):
        raise ValueError("nothing to answer: give a prompt or a file")
    return Request(last.text, files, key, tuple(history))


def _questions(
    answerer: Answerer, source: Path, samples: int, done: set[tuple[int, int]]
) -> Iterator[Question]:
    """The lines that still want an answer, on every rank as rank 0 reads them."""
    lines = _lines(source) if os.environ["RANK"] == "0" else None

    def following() -> Question | None:
        assert lines is not None
        for number, line in lines:
            if any((number, sample) not in done for sample in range(samples)):
                return _question(answerer, source, number, line)
        return None

    while (question := share(following)) is not None:
        yield question


def _question(answerer: Answerer, source: Path, number: int, line: bytes) -> Question:
    key = None
    try:
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES:,} bytes")
        record = json.loads(line)
        key = str(record["key"]) if isinstance(record, dict) and "key" in record else None
        request = request_of(record, source.parent, answerer, key or f"line {number}")
        return Question(number, key, answerer.read(request))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return Question(number, error=f"not JSON ({error})")
    except ValueError as error:
        return Question(number, key, error=" ".join(str(error).split()))


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, blank ones left out; of a giant one its beginning."""
    with source.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            rest = line
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
            if line.strip():
                yield number, line


def _begin(source: Path, target: Path) -> tuple[int, set[tuple[int, int]]]:
    """How many lines there are, and which of them `target` has answered whole."""
    if not source.is_file():
        raise ValueError(f"--input {source}: no such file")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"--output {target}: its folder does not exist")
    if target.exists() and target.samefile(source):
        raise ValueError(f"--output {target}: this is the input; name another file")
    done: set[tuple[int, int]] = set()
    if target.exists():
        with target.open("rb+") as file:
            done = _answered(target, file)
    return sum(1 for _ in _lines(source)), done


def _answered(target: Path, file: BinaryIO) -> set[tuple[int, int]]:
    """The answers a file holds; what a killed run left of a line is cut off."""
    done, end = set(), 0
    for number, line in enumerate(iter(file.readline, b""), start=1):
        is_whole = line.endswith(b"\n")
        if not is_whole and (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
            file.truncate(end)
            break
        end += len(line)
        try:
            if not is_whole:
                raise ValueError
            found = json.loads(line)
            done.add((int(found["line"]), int(found.get("sample", 0))))
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"--output {target}, line {number}: no answer of an earlier run; name a new file"
            ) from None
    return done


class _Output:
    """The file of answers, which rank 0 writes."""

    def __init__(self, path: Path) -> None:
        # A half character, which JSON can say, is written as JSON says it.
        self.file = None
        if os.environ["RANK"] == "0":
            self.file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def write(
        self,
        line: int,
        sample: int,
        samples: int,
        key: str | None = None,
        answer: Answer | None = None,
        error: str | None = None,
    ) -> None:
        """One line, at once."""
        if not self.file:
            return
        found: dict[str, Any] = {"line": line}
        found |= {"sample": sample} if samples > 1 else {}
        found |= {"key": key} if key is not None else {}
        found |= {"error": error} if answer is None else answer_fields(answer)
        self.file.write(json.dumps(found, ensure_ascii=False) + "\n")
        self.file.flush()


def answer_fields(answer: Answer) -> dict[str, Any]:
    """An answer as JSON-ready values."""
    fields: dict[str, Any] = {"answer": answer.text, "tokens": answer.tokens}
    fields["finish"] = answer.finish
    if answer.logprobs is not None:
        fields["logprobs"] = answer.logprobs
        fields["prompt_logprobs"] = answer.prompt_logprobs
    return fields
