"""Sphinx settings of the documentation site; ``make docs`` builds it, and a warning is an error."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # generators/

import nirvana_deploy

project = "nirvana-deploy"
author = "The authors of nirvana-deploy"
release = version = nirvana_deploy.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "generators.commands",
    "generators.library",
    "generators.pictures",
    "generators.records",
    "generators.schemas",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
smartquotes = False  # it makes one dash of the two before an option
highlight_language = "none"  # commands stand in fences without a language, as in all pages of this project
exclude_patterns = ["examples", "generators"]
nitpicky = False  # signatures name types of torch and transformers, which have no inventory here

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

html_theme = "furo"
html_title = f"nirvana-deploy {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
