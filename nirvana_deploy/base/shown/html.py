"""Results in a notebook: small tables, escaped; how they look is the notebook's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from nirvana_deploy.base.terminal import harmless

_MOST_ROWS = 100


def html_table(
    headers: Sequence[object], rows: Iterable[Sequence[object]], *, title: str = "", note: str = ""
) -> str:
    """A table with a line above and one below; of very many rows the first."""
    every = list(rows)
    if len(every) > _MOST_ROWS:
        note = f"{note} {len(every) - _MOST_ROWS:,} more rows.".strip()
    head = "".join(f"<th>{_text(cell)}</th>" for cell in headers)
    body = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in every[:_MOST_ROWS]
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if every else ""
    return f"{_line(title, 'strong')}{table}{_line(note, 'span')}"


def _line(text: str, tag: str) -> str:
    return f"<p><{tag}>{_text(text)}</{tag}></p>" if text else ""


def _text(value: object) -> str:
    return escape(harmless(str(value)))


class Record(dict[str, Any]):
    """The content of a JSON file: a dictionary that prints as ``line``, and in a notebook as ``html``."""

    def __init__(self, content: Mapping[str, Any], *, line: str, html: Callable[[], str]) -> None:
        super().__init__(content)
        self._line, self._html = line, html

    def __repr__(self) -> str:
        return f"Record({self._line})"

    def _repr_html_(self) -> str:
        return self._html()
