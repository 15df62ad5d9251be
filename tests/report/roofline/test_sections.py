"""The roofline and the profile of a benchmark, as figures, tables and words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from builders.reports import MANY, frozen_records, with_models

from nirvana_deploy.base.units import format_share
from nirvana_deploy.report.report import report_context
from nirvana_deploy.report.roofline.bounds import HEADERS, roofline_figure, rows, says
from nirvana_deploy.report.roofline.operators import layer_table, operator_table, section, time_figure
from nirvana_deploy.report.table import summary_table


@pytest.fixture
def benchmark() -> dict[str, Any]:
    found = frozen_records().benchmark
    assert found is not None
    return found


def test_a_share_is_the_same_field_in_table_picture_and_summary(benchmark: dict[str, Any]) -> None:
    benchmark["variants"][1]["roofline"]["decode"]["share_of_bound"] = 0.4321
    figure = roofline_figure(benchmark)
    assert figure is not None and "pruned decode step 43.2%" in figure.svg
    assert ("pruned", "decode step", "43.2%") in [(row[0], row[1], row[-1]) for row in rows(benchmark)]
    summary = {row[0]: row for row in summary_table(benchmark).rows}
    assert summary["Decode, share of its bound here"][2] == format_share(0.4321)
    assert all(len(row) == len(HEADERS) for row in rows(benchmark))


def test_only_ceilings_of_what_is_multiplied_are_told(benchmark: dict[str, Any]) -> None:
    assert "118 Gop/s of float32 products" in says(benchmark) and "integer" not in says(benchmark)
    benchmark["variants"][1]["roofline"]["prefill"]["operations"] = {"integer": 9.0}
    assert "402 Gop/s of integer" in says(benchmark)
    figure = roofline_figure(benchmark)
    assert figure is not None and "integer products, 402 Gop/s" in figure.svg


def test_records_of_earlier_versions_have_neither(benchmark: dict[str, Any]) -> None:
    del benchmark["ceilings"]
    for variant in benchmark["variants"]:
        del variant["roofline"], variant["profile"]
    assert rows(benchmark) == () and section(benchmark) is None
    assert roofline_figure(benchmark) is None and time_figure(benchmark) is None
    assert not any("bound here" in row[0] for row in summary_table(benchmark).rows)
    records = frozen_records()
    assert report_context(type(records)(records.manifest, records.plan, benchmark))["bounds"] is None


def test_a_bound_that_is_not_known_is_no_number(benchmark: dict[str, Any]) -> None:
    benchmark["variants"][1]["roofline"]["decode"] |= {"share_of_bound": None, "products_ms": None}
    (row,) = [row for row in rows(benchmark) if row[:2] == ("pruned", "decode step")]
    assert row[6] == row[8] == "\N{EM DASH}"


def test_operators_of_all_models_stand_in_one_table(benchmark: dict[str, Any]) -> None:
    pruned = benchmark["variants"][1]["profile"]["decode"]
    pruned["operators"].append({"operator": "MatMulNBits", "kind": "products", "nodes": 3, "ms": 1.5})
    cells = {row[0]: row[1:] for row in operator_table(benchmark, "decode").rows}
    assert cells["MatMulNBits"] == ("\N{EM DASH}", "1.50 (3)")
    assert cells["2 other operators"][0].endswith("(60)")
    assert list(cells)[-4:] == [
        "Between operators",
        "Outside the session",
        "Whole decode step, profiled",
        "Whole decode step, timed",
    ]
    assert [row[0] for row in layer_table(benchmark).rows][-3:] == ["29", "elsewhere", "head"]


def test_parts_of_a_bar_add_up_to_the_pass(benchmark: dict[str, Any]) -> None:
    from nirvana_deploy.report.roofline.operators import _parts

    one = copy.deepcopy(benchmark["variants"][0]["profile"]["decode"])
    assert sum(_parts(one).values()) == pytest.approx(one["pass_ms"])
    figure = time_figure(benchmark)
    assert figure is not None and "between operators" in figure.svg


def test_many_models_are_drawn() -> None:
    records = with_models(MANY)
    assert records.benchmark is not None
    figure = roofline_figure(records.benchmark)
    assert figure is not None and figure.svg.count("%") >= 2 * len(MANY)
