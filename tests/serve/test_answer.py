"""Text is sent up to a stop text, whole, and nothing of it has to be taken back."""

from __future__ import annotations

from typing import Any

import pytest
from builders.extras import needs

needs("fastapi")
needs("prometheus_client")

from nirvana_deploy.serve.answer import AnswerText  # noqa: E402


class Letters:
    """A token is a byte."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


def written(text: str, stops: list[str]) -> tuple[list[str], bool]:
    answer = AnswerText(Letters(), stops=stops, hidden=frozenset({0}))
    pieces = []
    for token in (*text.encode(), 0):
        pieces.append(answer.add(token))
        if answer.stopped:
            break
    pieces.append(answer.finish())
    return pieces, answer.stopped


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one two three", ["two"], "one "),
        ("one twotw", ["twotwo"], "one twotw"),
        ("aaab", ["aab"], "a"),
        ("a\n\nb", ["\n\n", "b"], "a"),
        ("abc", ["abcd", "bc"], "a"),
        ("grün und blau", ["ün"], "gr"),
        ("nothing", [], "nothing"),
        ("ends with en", ["end."], "ends with en"),
    ],
)
def test_the_text_ends_before_the_first_stop_text(text: str, stops: list[str], kept: str) -> None:
    pieces, stopped = written(text, stops)
    assert "".join(pieces) == kept and stopped == (kept != text)


def test_the_beginning_of_a_stop_text_waits() -> None:
    pieces, _ = written("ab--c", ["---"])
    assert pieces == ["a", "b", "", "", "--c", "", ""]


def test_an_unfinished_character_is_shown_at_the_end_alone() -> None:
    answer = AnswerText(Letters(), stops=[], hidden=frozenset())
    assert [answer.add(token) for token in "ü".encode()[:1]] == [""]
    assert answer.finish() == "\ufffd"


def test_a_continuation_begins_where_its_prompt_ends() -> None:
    answer = AnswerText(Letters(), stops=["o"], hidden=frozenset(), after=b"to gr" + "ü".encode()[:1])
    assert [answer.add(token) for token in "ün".encode()[1:]] == ["ü", "n"]
    assert answer.finish() == ""
