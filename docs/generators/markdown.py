"""Markdown from plain text, and a directive that parses it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

_SPECIAL = re.compile(r"([\\`*_<>\[\]{}|$])")


def escaped(text: str) -> str:
    """``text`` with every character that Markdown would read spelled out."""
    return _SPECIAL.sub(r"\\\1", text)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A table of cells that are Markdown; columns behind the first hold ``numbers``, or text."""
    line = "| --- |" + (" ---: |" if numbers else " --- |") * (len(headers) - 1)
    return "\n".join([_row(headers), line, *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


class Generated(SphinxDirective):
    """A directive whose content is Markdown made at build time; its page is read anew by every build."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Parse what was made, headings included."""
        self.env.note_reread()
        return self.parse_text_to_nodes(self.made(*self.arguments), allow_section_headings=True)

    def made(self, *arguments: str) -> str:
        """The Markdown; raises an error of Sphinx where the argument names nothing."""
        raise NotImplementedError
