"""What a terminal is told: text without the characters by which a file's name or content could command it."""

from __future__ import annotations

import re

_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed: escape sequences begin so
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # what turns the direction of writing
    "\ud800-\udfff]"  # bytes of a name that are not UTF-8: no terminal can write them
)
_LINES, _LINE = 9, 900


def brief(text: str) -> str:
    """A message of at most nine lines, none of them endless: what it quotes may be of any length."""
    lines = [line if len(line) <= _LINE else f"{line[:_LINE]} ..." for line in text.splitlines()]
    return "\n".join(lines if len(lines) <= _LINES else [*lines[: _LINES - 1], "..."])


def harmless(text: str) -> str:
    r"""``text`` with its control characters spelled out: ``\x1b[2J`` clears no screen."""
    return _COMMANDS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
