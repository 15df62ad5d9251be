"""A search played through on paper."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
from builders.scripts import ROOT

RECORD: dict[str, Any] = {
    "precision": "none,w4",
    "environment": {"logical_cores": 2},
    "cuts": [{"cpu_s": 1000.0, "bytes": 30}, {"cpu_s": 300.0, "bytes": 10}, {"cpu_s": 500.0, "bytes": 20}],
}


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scaling")


def test_cuts_begin_behind_the_first_one_on_the_core_that_is_free(scaling: ModuleType) -> None:
    """Two cores: 300 and 500 side by side, then 300 behind the 300."""
    found = scaling.played(RECORD, nodes=1, cuts=4)
    assert found.points == 10 and found.hours * 3600 == pytest.approx(1600)
    assert found.written_bytes_s * 1600 == pytest.approx(30 + 10 + 20 + 10)


def test_more_nodes_than_cuts_gain_nothing(scaling: ModuleType) -> None:
    few, many = (scaling.played(RECORD, nodes=nodes, cuts=3) for nodes in (1, 64))
    assert few == many and few.hours * 3600 == pytest.approx(1500)


def test_70b_is_the_ratio_that_the_page_says(scaling: ModuleType) -> None:
    rows = [line for line in scaling.tables().splitlines() if line.startswith(("| 8B", "| 70B"))]
    measured, ratio = ([float(cell.replace(",", "")) for cell in row.split("|")[2:5]] for row in rows)
    assert [large / small for large, small in zip(ratio, measured, strict=True)] == pytest.approx(
        [8, 8, 3.92], rel=0.01
    )
