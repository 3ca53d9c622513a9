"""Turn a stream of token ids into text: whole characters, and an end at the first stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class Vocabulary(Protocol):
    """What a tokenizer has to know here."""

    eot: int | None  # the id that ends a text

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of an id; they may be a part of a character."""


class TextStream:
    """One text in the making.

    Characters whose bytes are spread over several tokens are held back until they are complete, and
    so is a possible beginning of a stop string.
    """

    def __init__(self, tokenizer: Vocabulary, stops: Sequence[str] = ()):
        """stops: the text ends before the first of these strings."""
        self.tokenizer = tokenizer
        self.stops = stops
        self.ids: list[int] = []  # all tokens, including those of a stop string
        self.shown = ""  # the text so far
        self.finish_reason: str | None = None  # "stop", "end" (end-of-text token) or "length"
        self._held = ""  # decoded, but not shown yet
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Take the next token and return the text that can be shown now."""
        if self.finish_reason is not None:
            return ""
        if token == self.tokenizer.eot:
            return self.finish("end")
        self.ids.append(token)
        self._held += self._decoder.decode(self.tokenizer.token_bytes(token))
        found = [self._held.find(stop) for stop in self.stops if stop in self._held]
        if found:
            self._held = self._held[: min(found)]
            return self.finish("stop")
        return self._show(len(self._held) - self._length_of_possible_stop())

    def finish(self, reason: str) -> str:
        """End the text and return what was held back."""
        if self.finish_reason is None:
            self.finish_reason = reason
        if reason != "stop":
            self._held += self._decoder.decode(b"", final=True)
        return self._show(len(self._held))

    def _length_of_possible_stop(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = 0
        for stop in self.stops:
            for length in range(longest + 1, len(stop)):
                if self._held.endswith(stop[:length]):
                    longest = length
        return longest

    def _show(self, length: int) -> str:
        new = self._held[:length]
        self._held = self._held[length:]
        self.shown += new
        return new
