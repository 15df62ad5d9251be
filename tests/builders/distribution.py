"""The sdist and the wheel of this checkout, as the build backend of pyproject.toml makes them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from builders.scripts import ROOT

_FOLDERS = (".ci", ".github", "benchmarks", "calib_sets", "cli", "docs", "nirvana_deploy", "tests")
_PASSING = shutil.ignore_patterns("__pycache__", ".*_cache", "_build")
_BUILD = "import sys; from setuptools import build_meta as it; print(getattr(it, sys.argv[1])(sys.argv[2]))"


def source_tree(folder: Path) -> Path:
    """A copy of the checkout's sources: building writes beside them."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
        elif path.name in _FOLDERS:
            shutil.copytree(path, folder / path.name, ignore=_PASSING)
    return folder


def built(kind: str, source: Path, target: Path) -> Path:
    """The "sdist" or the "wheel" of a source tree, in ``target``."""
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", _BUILD, f"build_{kind}", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return target / done.stdout.split()[-1]


def unpacked(sdist: Path, target: Path) -> Path:
    """The folder that an sdist unpacks to."""
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    (folder,) = target.iterdir()
    return folder
