from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.standard_library import standard_library_documents
from nirvana_deploy.calibrate.texts import read_source

Library = Callable[[dict[str, bytes]], None]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Put files in the place of the standard library."""

    def place(files: dict[str, bytes]) -> None:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))

    return place


def test_code_is_there_bounded_and_the_same_each_time() -> None:
    text = read_source("code")
    assert text.name == "code" and text.documents == standard_library_documents()
    assert 1_500_000 < sum(len(one.encode()) for one in text.documents) <= 2_000_000
    assert any("class " in one and "def " in one for one in text.documents)
    assert all(one.strip() for one in text.documents)
    assert text.sha256 == read_source("code").sha256


def test_the_build_of_this_machine_and_tables_are_left_out(library: Library) -> None:
    program = b"def f():\n    return 1\n"
    skipped = {
        name: program + b"#" + name.encode() + b"\n"
        for name in (
            *("test/t.py", "json/tests/t.py", "idlelib/i.py", "lib2to3/l.py", "site-packages/x/x.py"),
            *("encodings/cp1.py", "pydoc_data/topics.py", "_sysconfigdata_linux.py", "config-3-x/c.py"),
        )
    }
    odd = {
        "latin.py": "# ä".encode("latin-1"),
        "greek.py": ("# " + "\u03b1" * 90).encode(),
        "long.py": b"x = " + b"1" * 400,
        "empty.py": b"\n\n",
        "compiled.pyc": program,
    }
    library({"json/decoder.py": program, **skipped, **odd})
    assert standard_library_documents() == (program.decode(),)


def test_size_is_bounded(library: Library) -> None:
    library({f"m{number}.py": b"x = 1\n" * 50_000 for number in range(9)})
    assert len(standard_library_documents()) == 6


def test_a_python_without_sources_says_what_to_type(library: Library) -> None:
    library({"os.pyc": b"", "lib.zip": b""})
    with pytest.raises(NirvanaError, match=r"holds no source files \(\.py\)") as caught:
        read_source("code")
    assert "--calib pydoc" in (caught.value.hint or "")
