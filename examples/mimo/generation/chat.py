"""Terminal chat: a conversation whose earlier turns and media stay in the prefix cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from examples.mimo.data.turns import errors_named
from examples.mimo.generation.api import Mimo, on_rank_zero
from examples.mimo.generation.sampling import Options


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

    def add_turns(self, content: list[dict[str, str]], answer: str) -> None:
        """Append a prompt and its answer."""
        self.media, self.new_media = self._all_media(), {}
        self.turns.append({"role": "user", "content": content})
        self.turns.append({"role": "assistant", "content": answer})

    def _all_media(self) -> dict[str, list[Path]]:
        # A dict keeps the order of names, which a set would change from process to process.
        names = dict.fromkeys([*self.media, *self.new_media])
        return {n: [*self.media.get(n, []), *self.new_media.get(n, [])] for n in names}


class ChatSession:
    """Answers lines of text; on several ranks rank 0 reads the lines and all ranks answer."""

    def __init__(self, model: Mimo, options: Options, output: TextIO) -> None:
        self.model, self.options, self.output = model, options, output
        self.modalities = {f"/{m.singular}": name for name, m in model.config.modalities.items()}
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
        encoder = self.model.config.modalities[name].encoder
        with errors_named(str(file), drop=f"{file}: "):
            return encoder.describe(encoder.read(file))

    def _answer(self, prompt: str) -> None:
        modalities = self.model.config.modalities
        files = self.conversation.new_media
        # What people type is words, whatever it spells; files come by commands, and go in front.
        content = [
            {"type": m.singular} for name, m in modalities.items() for _ in files.get(name, ())
        ]
        content.append({"type": "text", "text": prompt})
        record = self.conversation.record(content)
        sample = on_rank_zero(lambda: self.model.encode(record))
        options = self.options.with_seed_offset(len(self.conversation.turns) // 2)
        answer = ""
        try:
            for piece in self.model.stream_answer(sample, options):
                answer += piece.text
                self._print(piece.text)
        except KeyboardInterrupt:
            # One process can cut its answer short; several ranks would not stop at the same token.
            if os.environ["WORLD_SIZE"] != "1":
                raise
        self._print("\n")
        self.conversation.add_turns(content, answer)

    def _print(self, text: str) -> None:
        if self.is_rank_zero:
            print(text, end="", file=self.output, flush=True)

    def _message(self, text: str) -> None:
        if self.is_rank_zero:
            print(text, file=sys.stderr, flush=True)
