"""The documentation site: built without a warning, its links lead somewhere, nothing is left out."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import click
import pytest
from builders.extras import needs
from builders.scripts import ROOT

import nirvana_deploy
from nirvana_deploy.cli.main import _COMMANDS, commands

pytestmark = pytest.mark.integration


class _Page(HTMLParser):
    """Where a page links to, and what can be linked to on it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if name in {"href", "src"} and value and not tag.startswith("use"):
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` does."""
    for module in ("sphinx", "myst_parser", "furo"):
        needs(module)
    out = tmp_path_factory.mktemp("site")
    told = ["--fail-on-warning", "--keep-going", "--quiet", "--builder", "html"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *told, "docs", str(out), "--doctree-dir", f"{out}-doctrees"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Page]:
    return {file: _Page(file) for file in site.rglob("*.html")}


def test_every_page_is_built_and_reached(site: Path, pages: dict[Path, _Page]) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix("") for path in ROOT.glob("docs/**/*.md")}
    assert sources <= {file.relative_to(site).with_suffix("") for file in pages}
    reached = {unquote(urldefrag(link).url) for link in pages[site / "index.html"].links}
    assert {f"{source.as_posix()}.html" for source in sources} - reached == {"index.html"}


def test_links_lead_somewhere(site: Path, pages: dict[Path, _Page]) -> None:
    count = 0
    for file, page in pages.items():
        for link in page.links:
            if link.startswith(("http:", "https:", "data:")):
                continue
            url, anchor = urldefrag(unquote(link))
            target = (file.parent / url.partition("?")[0]).resolve() if url else file
            assert target.exists(), f"{file.relative_to(site)}: {link}"
            if target in pages and not anchor.startswith("_"):
                assert anchor in pages[target].anchors, f"{file.relative_to(site)}: {link}"
            count += 1
    assert count > 1000


def test_every_command_has_every_option_on_one_page(pages: dict[Path, _Page]) -> None:
    for name in _COMMANDS:
        (page,) = [one for one in pages.values() if f"command-{name}" in one.anchors]
        command = commands.get_command(click.Context(commands), name)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                flag = option.opts[0].lstrip("-")
                assert f"cmdoption-nirvana-deploy-{name}-{flag}" in page.anchors, (name, flag)


def test_an_option_says_its_choices_and_its_default(site: Path) -> None:
    text = (site / "reference" / "commands-make.html").read_text(encoding="utf-8")
    preset = text[text.index("cmdoption-nirvana-deploy-prune-export-preset") :][:2000]
    assert "[best|paper|fast]" in preset and '<span class="pre">best</span>' in preset
    rounded = text[text.index("cmdoption-nirvana-deploy-prune-export-round-to") :][:2000]
    assert "At least 1; default: " in rounded and '<span class="pre">auto</span>' in rounded


def test_the_library_is_documented(site: Path, pages: dict[Path, _Page]) -> None:
    file = site / "reference" / "library.html"
    text, anchors = file.read_text(encoding="utf-8"), pages[file].anchors
    assert " object at 0x" not in text
    for name in nirvana_deploy.__all__:
        if inspect.isfunction(getattr(nirvana_deploy, name)):
            assert f"nirvana_deploy.{name}" in anchors
        assert name in text


def test_the_schemas_are_published(site: Path) -> None:
    validator = needs("jsonschema").Draft202012Validator
    files = sorted(site.glob("schemas/*.schema.json"))
    assert len(files) == 15
    for file in files:
        validator.check_schema(json.loads(file.read_text(encoding="utf-8")))
