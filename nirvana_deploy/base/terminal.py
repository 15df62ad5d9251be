"""What a terminal is told: text without the characters by which a file's name or content could command it."""

from __future__ import annotations

import re

_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed: escape sequences begin so
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # what turns the direction of writing
    "\ud800-\udfff]"  # bytes of a name that are not UTF-8: no terminal can write them
)


def harmless(text: str) -> str:
    r"""``text`` with its control characters spelled out: ``\x1b[2J`` clears no screen."""
    return _COMMANDS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
