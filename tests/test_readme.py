"""Pages say what records and code say; their commands, files and links exist, their Python runs."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from builders.documents import (
    PAGES,
    SITE,
    blocks,
    command_named,
    commands_in,
    commands_of,
    parse,
    text_of,
)
from builders.extras import EXTRAS
from builders.scripts import ROOT, script
from builders.tiny import write_tiny

from nirvana_deploy import __version__
from nirvana_deploy.base.privacy import SWITCHES
from nirvana_deploy.cli.main import _COMMANDS
from nirvana_deploy.model.text.chat import CPU_SECONDS, MEMORY_BYTES
from nirvana_deploy.output import layout, stage

FRONT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for page, sections in script("readme").sections_by_page().items():
        text = page.read_text(encoding="utf-8")
        for name, section in sections.items():
            assert f"<!-- {name}: begin -->\n{section}\n<!-- {name}: end -->" in text


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load(text_of("CITATION.cff"))
    assert cited["version"] == __version__
    assert cited["license"] == tomllib.loads(text_of("pyproject.toml"))["project"]["license"]


def test_the_security_page_says_what_the_code_does() -> None:
    page = text_of("SECURITY.md")
    for variable, value in SWITCHES.items():
        assert f"| `{variable}` | `{value}` |" in page
    assert f"more than {MEMORY_BYTES >> 20} MB or {CPU_SECONDS} s of CPU time" in page


def test_make_has_the_targets_of_the_security_page() -> None:
    command = ["make", "--dry-run", "--always-make", "sbom", "audit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "build/sbom.json" in done.stdout and "pip-audit --strict" in done.stdout


def test_the_front_page_is_read_at_one_sitting() -> None:
    assert len(FRONT.splitlines()) <= 135


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text_of(page)):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]*)\)", text_of(page)):
        place = (ROOT / page).parent / target if target else ROOT / page
        headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_files_named_on_a_page_exist(page: str) -> None:
    """``like/this.py``, beside the page, in the package or from the root; ``this.py`` in any room too."""
    places = (ROOT, ROOT / "nirvana_deploy", (ROOT / page).parent)
    for name in re.findall(r"`((?:\.\./)?[\w.]+/[\w./]*|[\w/]+\.py)`", text_of(page)):
        if not name.startswith("onnx") and name not in vars(layout).values():
            found = any((place / name).exists() for place in places)
            assert found or any(ROOT.glob(f"nirvana_deploy/**/{name}")), name


@pytest.mark.parametrize("page", [*PAGES, *SITE])
def test_commands_parse(page: str) -> None:
    for words in commands_of(page):
        parse(words)


@pytest.mark.parametrize("name", _COMMANDS)
def test_the_examples_of_help_pages_parse(name: str) -> None:
    page = command_named(name).help or ""
    assert "\\b" not in page  # a mark for click that was spelled out instead
    examples = list(commands_in("\n".join(line.strip() for line in page.splitlines())))
    assert examples
    for words in examples:
        parse(words)


def test_a_command_that_does_not_parse_is_noticed() -> None:
    for wrong in (["prune", "m", "--sparsty", "0.4"], ["prune-export", "m", "--preset", "worst"]):
        with pytest.raises(click.UsageError):
            parse(wrong)


def test_the_front_page_names_every_command() -> None:
    in_tables = " ".join(re.findall(r"^\| (`.*?) \|", FRONT, flags=re.MULTILINE))
    named = {*re.findall(r"`([a-z-]+)`", in_tables), *(name for name, *_ in commands_of("README.md"))}
    assert named == set(_COMMANDS)


def test_the_table_of_stages_is_what_the_code_says() -> None:
    row = r"^\| `([^`]*)` \| (\w+) \| (.*?) ?\| (.*?) ?\|$"
    rows = re.findall(row, text_of("nirvana_deploy/README.md"), re.MULTILINE)
    told = {
        name: (room, *(set(re.findall(r"`([^`]*)`", cell)) for cell in cells)) for name, room, *cells in rows
    }
    fixed = {value for name, value in vars(stage).items() if name.isupper() and isinstance(value, str)}
    named = {stage.quantized("SCHEME"), stage.dense_quantized("SCHEME")}
    assert set(told) == fixed | named | {stage.engine("NAME"), stage.gguf("TYPE")}
    found: dict[str, tuple[set[str], set[str]]] = {}
    for path in ROOT.glob("nirvana_deploy/**/stage.py"):
        for call, variables in _calls(ast.parse(path.read_text(encoding="utf-8"))):
            name = _constants(call.args[0]) if ast.unparse(call.func) == "Stage" else set()
            if name and (name := name.pop()) in fixed:
                parts = {"needs": call.args[1:2], "makes": call.args[2:3]}
                parts |= {keyword.arg: [keyword.value] for keyword in call.keywords if keyword.arg in parts}
                needs, makes = (
                    {c for node in parts[key] for c in _constants(variables.get(ast.unparse(node), node))}
                    for key in parts
                )
                before = found.get(name, (set(), set()))
                found[name] = (before[0] | needs, before[1] | makes)
                assert told[name][0] == path.relative_to(ROOT / "nirvana_deploy").parts[0]
    assert fixed - found.keys() == {stage.TRITON, stage.OPENVINO}
    assert found == {name: told[name][1:] for name in found}


def _calls(source: ast.Module) -> Iterator[tuple[ast.Call, dict[str, ast.expr]]]:
    """Each call in a function, with the tuples that the function gives a name."""
    for function in (node for node in source.body if isinstance(node, ast.FunctionDef)):
        variables: dict[str, ast.expr] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                pairs = zip(target.elts, value.elts, strict=True) if several else [(target, value)]
                variables |= {ast.unparse(name): given for name, given in pairs}
        yield from ((node, variables) for node in ast.walk(function) if isinstance(node, ast.Call))


def _constants(node: ast.AST) -> set[str]:
    """Names of stages and files in an expression; what is spread into a tuple is known at run time only."""
    if isinstance(node, ast.Tuple):
        fixed = [element for element in node.elts if not isinstance(element, ast.Starred)]
        return {value for element in fixed for value in _constants(element)}
    home, _, name = ast.unparse(node).rpartition(".")
    value = vars(stage if home else layout).get(name)
    return {value} if isinstance(value, str) else set()


@pytest.mark.parametrize("page", [*PAGES, *SITE])
def test_make_targets_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)|`make (\w+)`", text_of(page), flags=re.MULTILINE):
        assert f"\n{''.join(target)}:" in makefile


@pytest.mark.parametrize("page", [*PAGES, *SITE])
def test_python_names_what_there_is(page: str) -> None:
    """It compiles, what it imports exists, and what it calls of ours takes such arguments."""
    for source in blocks(page, "python"):
        names: dict[str, Any] = {}
        nodes = list(ast.walk(ast.parse(source)))
        for node in nodes:
            if isinstance(node, ast.Import):
                assert all(_is_known(alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        for node in nodes:
            function = names.get(ast.unparse(node.func)) if isinstance(node, ast.Call) else None
            if function is not None and function.__module__.startswith("nirvana_deploy"):
                assert isinstance(node, ast.Call)
                keywords = {str(keyword.arg): None for keyword in node.keywords}
                inspect.signature(function).bind_partial(*(None for _ in node.args), **keywords)


def _is_known(module: str) -> bool:
    top = module.partition(".")[0]
    return top in EXTRAS or importlib.util.find_spec(top) is not None


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load
def test_the_python_of_the_front_page_runs(tmp_path: Path) -> None:
    """In order, on a tiny model in SmolLM2's place."""
    write_tiny(tmp_path / "tiny", "llama-tied")
    short = "run_benchmark=False, num_sequences=4, seq_len=16, round_to=4"
    small = f'prune_export("./tiny", {short}, quantize=("w4",), '
    for source in blocks("README.md", "python"):
        script = source.replace('prune_export("smollm2", ', small)
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
