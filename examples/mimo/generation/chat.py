"""A conversation at the terminal: what was said, seen and heard stays in the cache."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from examples.mimo.data.conversation import Turn
from examples.mimo.generation.api import Answerer, Request, share
from examples.mimo.generation.sampling import numbered
from examples.mimo.generation.scheduler import Options
from examples.mimo.modalities.base import Source


@dataclass
class Conversation:
    """What was said so far, its files, and those that the next turn adds."""

    turns: list[Turn] = field(default_factory=list)
    files: dict[str, list[Source]] = field(default_factory=dict)
    added: dict[str, list[Source]] = field(default_factory=dict)

    def request(self, prompt: str) -> Request:
        """The whole conversation with `prompt` as its last turn."""
        # In the order they were named: a set's would differ from one process to the next.
        names = dict.fromkeys([*self.files, *self.added])
        files = {n: [*self.files.get(n, []), *self.added.get(n, [])] for n in names}
        return Request(prompt, files, "this turn", tuple(self.turns))

    def said(self, prompt: str, answer: str) -> None:
        """A turn is over."""
        self.files = {n: list(of) for n, of in self.request(prompt).files.items()}
        self.added = {}
        self.turns += [Turn(is_answer=False, text=prompt), Turn(is_answer=True, text=answer)]


class ChatSession:
    """Reads lines and answers them; on several ranks rank 0 reads and all answer."""

    def __init__(self, answerer: Answerer, options: Options, output: TextIO) -> None:
        self.answerer, self.options, self.output = answerer, options, output
        self.nouns = {f"/{m.singular}": name for name, m in answerer.config.modalities.items()}
        self.conversation = Conversation()
        self.speaks = os.environ["RANK"] == "0"

    @property
    def help(self) -> str:
        """The commands."""
        files = ", ".join(f"{singular} FILE" for singular in self.nouns)
        return f"{files} add to the next turn; /reset starts over; /quit or Ctrl-D ends"

    def run(self, lines: Iterable[str]) -> None:
        """Answer until the lines end or one says /quit."""
        self._tell(self.help)
        source = iter(lines)
        while (line := share(lambda: self._following(source))) is not None:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                return
            try:
                self._obey(word, rest.strip(), line.strip())
            except ValueError as error:
                self._tell(" ".join(str(error).split()))

    def _following(self, source: Iterator[str]) -> str | None:
        print("> ", end="", file=sys.stderr, flush=True)
        return next(source, None)

    def _obey(self, word: str, rest: str, line: str) -> None:
        if word == "/reset":
            self.conversation = Conversation()
        elif word in self.nouns:
            self._add(self.nouns[word], rest)
        elif word.startswith("/"):
            raise ValueError(f"{word}: not a command; {self.help}")
        elif line or self.conversation.added:
            self._answer(line or self.answerer.config.prompt)

    def _add(self, name: str, file: str) -> None:
        encoder = self.answerer.config.modalities[name].encoder
        described = share(lambda: encoder.describe(encoder.read(Path(file))))
        self.conversation.added.setdefault(name, []).append(Path(file))
        self._tell(f"{file}: {described}")

    def _answer(self, prompt: str) -> None:
        request = self.answerer.with_placeholders(self.conversation.request(prompt))
        sample = share(lambda: self.answerer.read(request))
        turn = len(self.conversation.turns) // 2
        sampling = numbered(self.options.sampling, turn)
        said = ""
        try:
            for piece in self.answerer.stream(
                sample, dataclasses.replace(self.options, sampling=sampling)
            ):
                said += piece.text
                self._show(piece.text)
        except KeyboardInterrupt:
            # Alone, an answer can be cut short; several ranks would not stop at the same token.
            if os.environ["WORLD_SIZE"] != "1":
                raise
        self._show("\n")
        self.conversation.said(request.prompt, said)

    def _show(self, text: str) -> None:
        if self.speaks:
            print(text, end="", file=self.output, flush=True)

    def _tell(self, text: str) -> None:
        if self.speaks:
            print(text, file=sys.stderr, flush=True)
