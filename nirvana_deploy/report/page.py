"""HTML pages from templates: every value is escaped, and a name that a template lacks is an error."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


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
    return Environment(**{**usual, **settings})
