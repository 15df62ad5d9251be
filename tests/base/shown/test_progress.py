"""Progress in a terminal, a pipe and a notebook."""

from __future__ import annotations

import builtins
import sys
from types import ModuleType
from typing import Any

import pytest

from nirvana_deploy.base.progress import Progress
from nirvana_deploy.base.shown import progress as shown
from nirvana_deploy.base.shown.progress import ShownProgress


def work(progress: Progress) -> None:
    with progress.task("Scoring [bold]layers", 2) as outer:
        for _ in range(2):
            with progress.task("a window\x1b[2J", 3) as inner:
                inner(3)
            outer(1)
    progress.note("done")


def test_a_pipe_gets_a_line_for_each_task(capsys: pytest.CaptureFixture[str]) -> None:
    work(ShownProgress())
    printed = capsys.readouterr()
    inner, again, outer, note = printed.err.splitlines()
    assert printed.out == ""
    assert inner == again.replace(again.split(": ")[1], inner.split(": ")[1])
    assert inner.startswith("a window\\x1b[2J: ") and outer.startswith("Scoring [bold]layers: ")
    assert outer.endswith(" s")
    assert note == "done"


def test_a_heading_stands_before_the_lines_inside(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ShownProgress()
    with progress.within("3 of 11"), progress.within("pruned"):
        progress.note("half")
        progress.detail("few want this")
    progress.note("whole")
    assert capsys.readouterr().err.splitlines() == ["3 of 11, pruned: half", "whole"]


def test_a_terminal_draws_bars_one_below_the_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    progress = ShownProgress()
    assert progress._draws
    with progress.task("outer", 2), progress.task("inner", 1):
        assert progress._bars is not None
        assert [task.description for task in progress._bars.tasks] == ["outer", "inner"]
    assert progress._bars is None
    assert "inner: " in capsys.readouterr().err


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_shows_bars_where_widgets_are_and_lines_anyway(
    widgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class ZMQInteractiveShell:
        """What a notebook's shell is called."""

    display: Any = ModuleType("IPython.display")
    display.display = lambda shown: told.append(shown.text)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setattr(shown, "find_spec", lambda name: widgets or None)
    progress = ShownProgress()
    assert progress._draws is widgets
    progress.note("half")
    assert "half" in "".join(told)
