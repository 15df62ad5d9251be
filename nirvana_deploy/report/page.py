"""Pages from templates: every value is escaped for HTML or Markdown, and a name that is missing an error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from nirvana_deploy.base.terminal import harmless

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#])")
_PIECES = re.compile(r" (?=[(±])")
_OPTION = re.compile(r"--\w[\w-]*(?: \d+)?")


@dataclass(frozen=True)
class PlacedFigure:
    """A figure with its caption."""

    svg: Markup
    caption: str


def environment(**settings: Any) -> Environment:
    """The templates of this room; ``settings`` win over those of HTML."""
    usual = {
        "loader": PackageLoader("nirvana_deploy.report"),
        "autoescape": True,
        "finalize": _without_commands,
        "undefined": StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
        "keep_trailing_newline": True,
    }
    templates = Environment(**{**usual, **settings})
    templates.filters |= {"unbroken": unbroken, "whole": whole}
    return templates


def _without_commands(value: Any) -> Any:
    """Text without the characters that no page may hold; lines stay."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else harmless(value)


def unbroken(text: str) -> Markup:
    """``text`` for HTML, in which no line ends after the dashes of an option."""
    return Markup(_OPTION.sub(r'<span class="option">\g<0></span>', str(escape(harmless(text)))))


def whole(cell: str) -> Markup:
    """A cell of numbers for HTML, in which a line ends before a bracket or an error alone."""
    pieces = [escape(harmless(piece)) for piece in _PIECES.split(cell)]
    if len(pieces) == 1:
        return pieces[0]
    return Markup(f'<span class="pieces">{" ".join(f"<span>{piece}</span>" for piece in pieces)}</span>')


def markdown_environment() -> Environment:
    """The templates of this room for Markdown; every value is escaped."""
    templates = environment(autoescape=False, finalize=markdown_text)  # which applies Markdown's rules
    templates.filters |= {"code": markdown_code, "verbatim": Markup, "lines": markdown_lines}
    return templates


def markdown_text(value: Any) -> str:
    """Escape ``value`` for Markdown, on one line; Markup passes unchanged."""
    if isinstance(value, Markup):
        return str(value)
    return _MARKDOWN_SPECIAL.sub(r"\\\1", harmless(" ".join(str(value).split())))


def markdown_code(value: Any) -> Markup:
    """Format ``value`` as inline code for a table cell: one line, without backticks and bars."""
    return Markup("`" + harmless(" ".join(str(value).split())).replace("`", "'").replace("|", "/") + "`")


def markdown_lines(value: Any) -> Markup:
    """Escape ``value`` for a Markdown table cell that keeps its line breaks."""
    return Markup("<br>".join(markdown_text(line) for line in str(value).split("\n")))
