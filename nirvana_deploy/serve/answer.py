"""Tokens of one answer to text that may be sent: up to a stop text, and never the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nirvana_deploy.runtime.text import TextPieces


class AnswerText:
    """The text of one answer. ``tokenizer`` is one of transformers, ``hidden`` are ids without text."""

    def __init__(self, tokenizer: Any, *, stops: Sequence[str], hidden: frozenset[int]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._pieces = TextPieces(tokenizer, self._hear, hidden=hidden)
        self.stopped = False
        """Whether a stop text came."""

    def add(self, token: int) -> str:
        """Hear one more id; returns what may be sent of the text by now."""
        self._pieces.add(token)
        return self._released(at_end=False)

    def finish(self) -> str:
        """What is left when no token follows."""
        if not self.stopped:
            self._pieces.finish()
        return self._released(at_end=True)

    def _hear(self, text: str) -> None:
        self._held += text

    def _released(self, *, at_end: bool) -> str:
        """All of the text but what may be the beginning of a stop text; none after one."""
        if self.stopped:
            return ""
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        kept = 0 if at_end else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        released, self._held = self._held[:cut], self._held[cut:]
        return released


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
