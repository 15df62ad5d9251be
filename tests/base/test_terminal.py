"""Words of strangers cannot command a terminal."""

from __future__ import annotations

import sys

import pytest

from nirvana_deploy.base.terminal import brief, harmless


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("over\rwritten\b", r"over\rwritten\x08"),
        ("txt.\u202eexe", r"txt.\u202eexe"),
        (b"not utf-8: \xff".decode(errors="surrogateescape"), r"not utf-8: \udcff"),
        ("tab\tand line\nstay, as do é, 語 and 👩‍💻", "tab\tand line\nstay, as do é, 語 and 👩‍💻"),
    ],
)
def test_control_characters_are_spelled_out(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_a_message_is_brief_whatever_it_quotes() -> None:
    assert brief("Error: a\nb") == "Error: a\nb"
    assert len(brief("x" * 70_000)) < 1000
    lines = brief("\n".join(map(str, range(100)))).splitlines()
    assert lines[0] == "0" and len(lines) == 9 and lines[-1] == "..."


def test_what_is_harmless_can_be_written_and_holds_no_control_character() -> None:
    every = harmless("".join(map(chr, range(sys.maxunicode + 1))))
    every.encode()
    controls = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n", "\t"}
    assert controls.isdisjoint(every)
