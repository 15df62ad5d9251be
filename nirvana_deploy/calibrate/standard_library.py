"""Code as calibration text: source files of this Python's standard library.

Folders that some installations lack, tests, tables and files of this machine's build are left out. Files are
ordered by the hash of their path, so that a bounded number of them is spread over all subjects; their text
differs between versions of Python, as pydoc's does.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError

_MOST_BYTES = 2_000_000
_LONGEST_LINE = 160
_MOST_OTHER_BYTES = 0.002
"""Largest share of bytes beyond ASCII: more of them is a table, not a program."""

_ASCII = bytes(range(128))

_SKIPPED_FOLDERS = frozenset(
    {
        *("test", "tests", "idle_test", "__pycache__", "__phello__", "site-packages", "dist-packages"),
        *(
            "idlelib",
            "tkinter",
            "turtledemo",
            "curses",
            "sqlite3",
            "dbm",
            "ensurepip",
            "venv",
        ),  # not everywhere
        *("distutils", "lib2to3"),  # gone since 3.12 and 3.13
        *("encodings", "pydoc_data"),  # tables, and the text of "pydoc"
    }
)
_SKIPPED_STEMS = ("_sysconfigdata", "sitecustomize", "usercustomize", "turtle")


def standard_library_documents() -> tuple[str, ...]:
    """Return source files of the standard library, one document each, 2 MB at most.

    Raises NirvanaError where this Python has none: in a zip archive, or compiled.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    documents = tuple(_bounded(folder))
    if not documents:
        raise NirvanaError(
            "The calibration source 'code' reads this Python's standard library, and "
            f"{folder} holds no source files (.py).",
            hint="Pass --calib pydoc, or a text file with code of your own: --calib FILE.",
        )
    return documents


def _bounded(folder: Path) -> Iterator[str]:
    """Programs below ``folder``, until the next one would be too much."""
    left = _MOST_BYTES
    for path in _candidates(folder):
        content = path.read_bytes()
        if _is_program(content):
            left -= len(content)
            if left < 0:
                return
            yield content.decode()


def _candidates(folder: Path) -> list[Path]:
    """Source files by the hash of their path, the same order on every machine."""
    named = {path.relative_to(folder): path for path in folder.rglob("*.py") if path.is_file()}
    wanted = (name for name in named if _is_wanted(name))
    order = sorted(wanted, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return [named[name] for name in order]


def _is_wanted(name: Path) -> bool:
    folders = name.parts[:-1]
    return not (
        _SKIPPED_FOLDERS.intersection(folders)
        or any(folder.startswith("config-") for folder in folders)
        or name.stem.startswith(_SKIPPED_STEMS)
    )


def _is_program(content: bytes) -> bool:
    """Whether a file is UTF-8 text with few other characters than ASCII and without very long lines."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return False
    other = len(content.translate(None, delete=_ASCII))
    lines = text.splitlines()
    return (
        bool(text.strip())
        and other <= _MOST_OTHER_BYTES * len(content)
        and max(map(len, lines), default=0) <= _LONGEST_LINE
    )
