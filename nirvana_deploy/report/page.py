"""HTML pages from templates: every value is escaped, and a name that a template lacks is an error."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

_OPTION = re.compile(r"--\w[\w-]*(?: \d+)?")


def environment(**settings: Any) -> Environment:
    """The templates of this room; ``settings`` win over those of HTML."""
    usual = {
        "loader": PackageLoader("nirvana_deploy.report"),
        "autoescape": True,
        "undefined": StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
        "keep_trailing_newline": True,
    }
    templates = Environment(**{**usual, **settings})
    templates.filters["unbroken"] = unbroken
    return templates


def unbroken(text: str) -> Markup:
    """``text`` for HTML, in which no line ends after the dashes of an option."""
    return Markup(_OPTION.sub(r'<span class="option">\g<0></span>', str(escape(text))))
