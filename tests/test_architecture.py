"""The rules of the house that a reader relies on; nirvana_deploy/README.md tells them in words.

``KNOWN`` lists what breaks a rule today. A test fails when something new breaks it, and when something in the
list no longer does: the lists only shrink.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
from builders.scripts import ROOT

from nirvana_deploy.cli.main import _COMMANDS, commands
from nirvana_deploy.model.families import FAMILIES
from nirvana_deploy.quantize.schemes import SCHEMES
from nirvana_deploy.runtime.table import RUNTIMES

ROOMS = [
    "base",
    "model",
    "output",
    "calibrate",
    "prune",
    "export",
    "runtime",
    "quantize",
    "recover",
    "engine",
    "verify",
    "measure",
    "search",
    "package",
    "serve",
    "report",
    "pipeline",
    "cli",
]
"""Left to right: a room imports itself and the rooms to its left."""
AT_THE_ROOT = {"__init__", "__main__"}

KNOWN: dict[str, set[str]] = {
    "circles": set(),
    "knows Run": {"runtime.models", "verify.folder"},
    "parameters": {
        "calibrate.windows:calibration_data",
        "prune.plan:make_plan",
    },
    "folders": set(),
    "docstrings": set(),
    "runtimes": {
        "engine.from_checkpoint",
        "engine.targets",
        "engine.vendor",
        "package.triton_engine",
        "quantize.weights.write",
    },
    "schemes": {
        "cli.quantize",
        "report.pages.deployed",
        "runtime.tensorrt.memory",
    },
    "lines": set(),
}


@cache
def modules() -> dict[str, Path]:
    """Dotted name within the package: its file."""
    library = {
        path.relative_to(ROOT / "nirvana_deploy"): path for path in ROOT.glob("nirvana_deploy/**/*.py")
    }
    beside = {
        path.relative_to(ROOT): path for name in ("cli", "calib_sets") for path in ROOT.glob(f"{name}/*.py")
    }
    return {
        ".".join(place.with_suffix("").parts).removesuffix(".__init__"): path
        for place, path in sorted({**library, **beside}.items())
    }


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    return module.partition(".")[0]


def _nodes_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, but those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _nodes_at_run_time(child)


def _is_ours(node: ast.ImportFrom) -> bool:
    return node.level > 0 or (node.module or "").partition(".")[0] == "nirvana_deploy"


@cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of this package that ``module`` imports, at its top or inside a function."""
    found = set()
    for node in _nodes_at_run_time(tree(module)):
        if isinstance(node, ast.ImportFrom) and _is_ours(node):
            source = (node.module or "").removeprefix("nirvana_deploy").removeprefix(".")
            if node.level:
                source = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            for alias in node.names:
                name = f"{source}.{alias.name}" if source else alias.name
                found.add(name if name in modules() else source or "__init__")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("nirvana_deploy.")]
            found |= {name.removeprefix("nirvana_deploy.") for name in names}
    return frozenset(found - {module})


def strings_of(module: str) -> set[str]:
    """String literals; docstrings are longer than any name that is looked for."""
    return {
        node.value
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def namers(names: set[str], *, home: tuple[str, ...]) -> set[str]:
    """Modules outside ``home`` in which one of ``names`` is a string literal."""
    return {m for m in modules() if not m.startswith(home) and not names.isdisjoint(strings_of(m))}


@pytest.mark.parametrize("module", [m for m in modules() if m not in {"__init__", "__main__"}])
def test_imports_point_left(module: str) -> None:
    def place(name: str) -> int:
        room = room_of(name)
        return ROOMS.index("base" if room in {"__init__", "calib_sets"} else room)

    assert not [name for name in imports_of(module) if place(name) > place(module)]


def test_no_circles_inside_a_room() -> None:
    inside = {m: {i for i in imports_of(m) if room_of(i) == room_of(m)} for m in modules()}

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = inside.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    assert {module for module in inside if module in reached(module)} == KNOWN["circles"]


def test_only_stages_output_pipeline_and_cli_know_the_run() -> None:
    knowing = {
        module
        for module in modules()
        if any(
            isinstance(node, ast.ImportFrom)
            and node.module == "nirvana_deploy.output.run"
            and any(alias.name == "Run" for alias in node.names)
            for node in ast.walk(tree(module))
        )
    }
    allowed = {m for m in knowing if m.endswith(".stage") or room_of(m) in {"output", "pipeline", "cli"}}
    assert knowing - allowed == KNOWN["knows Run"]


def test_every_module_lives_in_a_room() -> None:
    assert {path.stem for path in ROOT.glob("nirvana_deploy/*.py")} == AT_THE_ROOT
    folders = {path.parent.name for path in ROOT.glob("nirvana_deploy/*/__init__.py")}
    assert folders <= set(ROOMS)


def test_folders_stay_small() -> None:
    """At most twelve modules a folder; cli/ holds one module a command beside them."""
    commands = {f"cli/{module}.py" for module, _ in _COMMANDS.values()}
    places = [path.relative_to(ROOT).as_posix() for path in modules().values()]
    counts = Counter(
        place.rpartition("/")[0]
        for place in places
        if not place.endswith("__init__.py") and place not in commands
    )
    assert {folder for folder, count in counts.items() if count > 12} == KNOWN["folders"]


def test_modules_stay_small() -> None:
    long = {m for m, path in modules().items() if len(path.read_text(encoding="utf-8").splitlines()) > 450}
    assert long == KNOWN["lines"]


def test_module_docstrings_stay_short() -> None:
    """Purpose, equation, source, in at most eight lines; measurements lie in benchmarks/NOTES.md."""
    long = {m for m in modules() if len((ast.get_docstring(tree(m)) or "").splitlines()) > 8}
    assert long == KNOWN["docstrings"]


def test_functions_take_few_parameters() -> None:
    """At most nine: a recipe holds what a user can say."""
    many = set()
    for module in modules():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if sum(argument.arg not in {"self", "cls"} for argument in arguments) > 9:
                    many.add(f"{module}:{node.name}")
    assert many == KNOWN["parameters"]


def test_a_family_is_named_in_its_file_and_in_the_aliases() -> None:
    """llama.cpp has names of its own for tokenizers, and some of them are those of families."""
    home = ("model.families", "model.sources", "model.gguf.cuts", "package.gguf_tokenizer")
    assert namers(set(FAMILIES), home=home) == set()


def test_a_runtime_is_named_in_its_row() -> None:
    names = set(RUNTIMES) - {"torch"}  # which is a package as well
    assert namers(names, home=("runtime.",)) == KNOWN["runtimes"]


def test_a_scheme_is_named_in_its_row_and_where_it_is_written() -> None:
    assert namers(set(SCHEMES), home=("quantize.",)) == KNOWN["schemes"]


def test_what_a_report_reads_is_made_by_a_stage() -> None:
    """Names of stages stand in output/stage.py alone: others say ``stage.QUALITY``, never a string."""
    read, made = set(), set()
    for module in modules():
        for node in ast.walk(tree(module)):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = ast.unparse(node.func)
            if called.rpartition(".")[2] in {"stage", "has", "result"} and room_of(module) != "cli":
                assert not isinstance(node.args[0], ast.Constant), f"{module}: {ast.unparse(node)}"
            name = ast.unparse(node.args[0]).removeprefix("stage.")
            if called in {"records.stage", "records.result"} and name.isupper():
                read.add(name)
            elif called == "Stage":
                made.add(name)
    assert read and read <= made


ABOUT_THE_COMMAND = {
    *(
        "against",
        "as_json",
        "compare",
        "curves_at",
        "dry_run",
        "force",
        "log_file",
        "model",
        "out",
        "plan_file",
        "quiet",
        "recipe_file",
        "resume",
    ),
    "verbose",
}
"""Options that say where to read and write, not what to do."""


def test_every_option_is_a_field_of_a_recipe() -> None:
    fields = set()
    for path in ROOT.glob("nirvana_deploy/*/recipe.py"):
        module = importlib.import_module(f"nirvana_deploy.{path.parent.name}.recipe")
        for kind in vars(module).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                fields |= {field.name for field in dataclasses.fields(kind)}
    for name in _COMMANDS:
        command = commands.get_command(click.Context(commands), name)
        assert command is not None
        options = {parameter.name for parameter in command.params if isinstance(parameter, click.Option)}
        assert options <= fields | ABOUT_THE_COMMAND, name


def test_tests_mirror_the_sources() -> None:
    """A folder of tests is a room; a test file imports its own room, or runs it as a program."""
    tests = ROOT / "tests"
    folders = {path.name for path in tests.iterdir() if any(path.glob("**/test_*.py"))}
    assert folders <= {*ROOMS, "benchmarks", "docs"}
    programs = {"benchmarks", "cli", "docs", "pipeline"}
    strangers = set()
    for path in tests.glob("*/**/test_*.py"):
        room, *_ = inside = path.relative_to(tests).parts[:-1]
        if room in programs:
            continue
        assert (ROOT / "nirvana_deploy").joinpath(*inside).is_dir()
        imported = {
            (node.module or "").split(".")[1]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nirvana_deploy.")
        }
        if room not in imported:
            strangers.add(path.relative_to(ROOT).as_posix())
    assert not strangers
