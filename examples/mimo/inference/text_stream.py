"""Text of tokens as they come: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

from examples.mimo.data.tokenizer import Tokenizer

# What a decoder writes for the bytes of a character that is not whole yet.
UNFINISHED = "\ufffd"


class TextStream:
    """The text of one answer; `stops` end it and are not part of it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown now and could not before."""
        self.tokens.append(token)
        whole = self.tokenizer.decode(self.tokens)
        return self._show(self._without_stop(whole), final=self.stopped)

    def _without_stop(self, whole: str) -> str:
        found = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        self.stopped = bool(found)
        return whole[: min(found)] if found else whole

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        return self._show(self._without_stop(self.tokenizer.decode(self.tokens)), final=True)

    def _show(self, text: str, final: bool) -> str:
        if not final:
            text = text.rstrip(UNFINISHED)
            text = text[: len(text) - max((_overlap(text, s) for s in self.stops), default=0)]
        if not text.startswith(self.text):
            # The next token changed what its predecessors spell; wait for the end of it.
            return ""
        new, self.text = text[len(self.text) :], text
        return new


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
