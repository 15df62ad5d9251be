from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nirvana_deploy.measure.roofline import ceilings as module
from nirvana_deploy.measure.roofline.ceilings import (
    Ceilings,
    best_seconds,
    machine_ceilings,
    measured_ceilings,
)

FOUND = Ceilings(1, 10.0, 8.0, {"float32": 100.0}, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """The thread counts that were measured, in place of measuring."""
    monkeypatch.setenv("NIRVANA_DEPLOY_CACHE", str(tmp_path / "cache"))
    asked: list[int] = []

    def measure(*, threads: int) -> Ceilings:
        asked.append(threads)
        return replace(FOUND, threads=threads, read_gb_per_s=float(len(asked)))

    monkeypatch.setattr(module, "measured_ceilings", measure)
    yield asked


def test_ceilings_are_measured_once_and_again_when_asked(measured: list[int]) -> None:
    first = machine_ceilings(threads=1)
    assert machine_ceilings(threads=1) == first and measured == [1]
    assert machine_ceilings(threads=2).threads == 2 and measured == [1, 2]
    anew = machine_ceilings(threads=1, fresh=True)
    assert measured == [1, 2, 1] and anew != first
    assert machine_ceilings(threads=1) == anew


def test_kept_ceilings_only_rise(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    machine_ceilings(threads=1)
    busy = replace(FOUND, read_gb_per_s=5.0, copy_gb_per_s=9.0, gop_per_s={"float32": 50.0, "integer": 7.0})
    monkeypatch.setattr(module, "measured_ceilings", lambda *, threads: busy)
    found = machine_ceilings(threads=1, fresh=True)
    assert (found.read_gb_per_s, found.copy_gb_per_s) == (5.0, 9.0)  # the first one read 1.0
    assert found.gop_per_s == {"float32": 100.0, "integer": 7.0}
    assert machine_ceilings(threads=1) == found


def test_other_versions_are_another_machine(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    machine_ceilings(threads=1)
    monkeypatch.setattr(module, "version", lambda package: "99")
    machine_ceilings(threads=1)
    assert measured == [1, 1]


@pytest.mark.parametrize("broken", ["{", '{"schema": 1}', '{"schema": 9}'])
def test_a_broken_file_of_the_cache_is_measured_anew(
    measured: list[int], tmp_path: Path, broken: str
) -> None:
    machine_ceilings(threads=1)
    (file,) = (tmp_path / "cache" / "ceilings").iterdir()
    whole = json.loads(file.read_text())
    file.write_text(broken)
    assert machine_ceilings(threads=1).read_gb_per_s == 2.0
    assert json.loads(file.read_text())["key"] == whole["key"]


def test_a_cache_that_cannot_be_written_is_done_without(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NIRVANA_DEPLOY_CACHE", str(tmp_path / "file"))
    assert machine_ceilings(threads=1).threads == 1


def test_a_cache_whose_folder_is_read_only_is_done_without(
    measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nirvana_deploy.base.artifact.temporary_beside", read_only)
    assert machine_ceilings(threads=1).threads == 1 and measured == [1]


def read_only(path: Path) -> Path:
    """As a folder that is there and cannot be written to answers, which root is never told."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_the_best_repetition_counts_and_not_the_first() -> None:
    took = iter([0.0, 9.0, 4.0, 6.0, 5.0, 5.0])
    now = 0.0

    def run() -> None:
        nonlocal now
        now += next(took)

    assert best_seconds(run, clock=lambda: now) == 4.0  # warm-up, then at least three


def test_this_machine_has_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SIDE", 128)
    monkeypatch.setattr(module, "_SECONDS", 0.01)
    found = measured_ceilings(threads=1)
    assert {"float32", "integer"} <= set(found.gop_per_s)
    assert min(found.read_gb_per_s, found.copy_gb_per_s, *found.gop_per_s.values()) > 0
