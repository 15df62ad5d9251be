"""Rules of the code base that a reader relies on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Left to right: a module imports only what stands to its left (or in its own group).
ORDER = [
    "base",
    "model",
    "output",
    "calibrate",
    "prune",
    "export",
    "runtime",
    "quantize",
    "engine",
    "verify",
    "measure",
    "package",
    "report",
    "pipeline",
    "cli",
]
BASE = {"base", "__init__", "calib_sets"}


def group_of(module: str) -> str:
    """The group of a dotted module name of this package."""
    parts = module.split(".")[1:] or ["__init__"]
    return "base" if parts[0] in BASE else parts[0]


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "nirvana_deploy").rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path
    for folder in ("cli", "calib_sets"):
        for path in sorted((ROOT / folder).glob("*.py")):
            yield f"nirvana_deploy.{folder}.{path.stem}", path


def imports_of(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports when it is imported itself (not under TYPE_CHECKING)."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nirvana_deploy"):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("nirvana_deploy"))


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_imports_point_left(module: str, path: Path) -> None:
    if module == "nirvana_deploy.__main__":
        return
    own = ORDER.index(group_of(module))
    for imported in imports_of(path):
        assert ORDER.index(group_of(imported)) <= own, f"{module} imports {imported}"


def test_modules_stay_small() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in modules()}
    assert {module: count for module, count in lines.items() if count > 450} == {}
