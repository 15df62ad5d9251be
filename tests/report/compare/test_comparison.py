"""Folders side by side: the rules of the verdict choose, and what does not compare is said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from builders.browser import Chromium, chromium
from builders.pages import DESKTOP, PHONE, axes_without_unit, faults, pages_of
from builders.reports import MANY, frozen_records, with_models

from nirvana_deploy.output.records import Records
from nirvana_deploy.report.compare.alike import Folder
from nirvana_deploy.report.compare.comparison import Comparison, compare
from nirvana_deploy.report.compare.page import (
    BRIEF,
    brief_rows,
    comparison_html,
    comparison_markdown,
    table,
)

SLOW: dict[str, tuple[float, float, float]] = {"pruned": (1.3, 400, 0.05), "pruned-w4": (2.0, 90, 0.2)}
FAST: dict[str, tuple[float, float, float]] = {"pruned": (1.5, 380, 0.09), "dense-w4": (1.8, 99, 0.08)}


def folders(*models: dict[str, tuple[float, float, float]]) -> list[Folder]:
    return [Folder(f"out-{at}", with_models(one)) for at, one in enumerate(models, start=1)]


def found_of(*models: dict[str, tuple[float, float, float]]) -> Comparison:
    return compare(folders(*models))


def manifest_of(folder: Folder) -> dict[str, Any]:
    assert folder.records.manifest is not None
    return folder.records.manifest


def benchmark_of(folder: Folder) -> dict[str, Any]:
    assert folder.records.benchmark is not None
    return folder.records.benchmark


def test_a_row_for_each_model_and_the_one_to_take_by_the_rules_of_the_verdict() -> None:
    found = found_of(SLOW, FAST)
    assert [one.name for one in found.rows] == [
        *("out-1: dense", "out-1: pruned", "out-1: pruned-w4"),
        *("out-2: dense", "out-2: pruned", "out-2: dense-w4"),
    ]
    assert [one.level for one in found.rows] == [None, "ship", "care", None, "ship", "ship"]
    assert [one.name for one in found.rows if one.take] == [
        "out-2: dense-w4"
    ]  # of those that ship the fastest
    assert (found.level, found.title) == ("ship", "Take out-2: dense-w4")
    assert "1.80\N{MULTIPLICATION SIGN} as fast as dense" in found.why
    assert found.alike.cautions == () and found.alike.times and found.alike.quality
    last = found.rows[-1]
    assert (last.speedup, last.weights_bytes, last.kl) == (1.8, 99_000_000, 0.08)
    assert last.interval == pytest.approx((1.746, 1.854))
    assert last.perplexity_ratios == pytest.approx(
        {"held-out text": 1.08, "pydoc": 1.08, "code": 0.72}, rel=1e-3
    )
    assert (last.sparsity, found.rows[1].sparsity) == (0.0, pytest.approx(0.4, abs=0.01))


def test_where_none_ships_the_nearest_is_named_and_none_taken() -> None:
    found = found_of({"pruned": (1.5, 300, 0.9)}, {"pruned": (1.4, 300, 0.5)})
    assert (found.level, found.title) == ("no", "Take none")
    assert found.why.startswith("The best of them, out-2: pruned: 1.50 times dense's perplexity")
    assert not any(one.take for one in found.rows)


def test_what_was_not_measured_is_open() -> None:
    asked = folders(SLOW, FAST)
    for one in asked:
        del manifest_of(one)["stages"]["quality"]
        for variant in benchmark_of(one)["variants"]:
            del variant["quality"]
    found = compare(asked)
    assert (found.level, found.title) == ("open", "No verdict")
    assert "Quality was measured in none" in found.why
    assert "\N{EM DASH}" in comparison_markdown(found)


def test_the_options_that_differ_are_listed_alone() -> None:
    asked = folders(SLOW, FAST)
    manifest_of(asked[0])["options"] = {"sparsity": 0.4, "quantize": ["w4"], "baseline": True, "gamma": None}
    manifest_of(asked[1])["options"] = {"sparsity": 0.4, "quantize": [], "baseline": False, "gamma": 1 / 3}
    found = compare(asked).recipe
    assert found.headers == ("Option", "out-1", "out-2")
    assert found.rows == (
        ("quantize", "w4", "\N{EM DASH}"),
        ("baseline", "yes", "no"),
        ("gamma", "\N{EM DASH}", "0.3333"),
    )


def other_machine(folder: Folder) -> None:
    benchmark_of(folder)["environment"]["cpu"] = "Another CPU"


def other_workload(folder: Folder) -> None:
    benchmark_of(folder)["workload"]["prompt_tokens"] = 512


def other_repeats(folder: Folder) -> None:
    benchmark_of(folder)["workload"] |= {
        "repeats": 99,
        "precision": 0.01,
        "wait_until_idle": True,
        "warmup": 9,
        "max_minutes": 3.0,
        "seed": 5,
    }


def other_runtime(folder: Folder) -> None:
    for variant in benchmark_of(folder)["variants"]:
        variant["runtime"] = "openvino"


def busier(folder: Folder) -> None:
    benchmark_of(folder)["variants"][0]["tpot_ms"]["p50"] *= 1.2


def other_text(folder: Folder) -> None:
    benchmark_of(folder)["evaluation"]["source"] = "c4"


def other_windows(folder: Folder) -> None:
    manifest_of(folder)["stages"]["quality"]["result"]["variants"]["dense"]["perplexity"] = 12.3


def other_model(folder: Folder) -> None:
    manifest_of(folder)["model"]["files"]["model.safetensors"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "times", "quality", "said"),
    [
        (other_machine, False, True, "the machine is Example CPU"),
        (other_workload, False, True, "prompt tokens is 128 in out-1, 512 in out-2"),
        (other_runtime, False, True, "runtime is onnxruntime-cpu in out-1, openvino in out-2"),
        (busier, False, True, "a token of the dense model itself took 24."),
        (
            other_text,
            True,
            False,
            "the text of evaluation is pydoc, held-out windows (perplexity of dense 19.4)",
        ),
        (other_windows, True, False, "(perplexity of dense 12.3) in out-2"),
        (other_model, True, False, "the model is smollm2 ("),
    ],
)
def test_what_does_not_compare_is_said(change: Any, times: bool, quality: bool, said: str) -> None:
    asked = folders(SLOW, FAST)
    change(asked[1])
    found = compare(asked)
    assert (found.alike.times, found.alike.quality) == (times, quality)
    (caution,) = found.alike.cautions
    assert said in caution
    for page in (comparison_html(found), comparison_markdown(found)):
        assert "does not compare" in page or "do not compare" in page
    assert ("decode, ms per token" in comparison_html(found)) == times
    assert ("weight file, MB" in comparison_html(found)) == (not times)


def test_more_rounds_of_the_same_request_compare() -> None:
    asked = folders(SLOW, FAST)
    other_repeats(asked[1])
    found = compare(asked)
    assert found.alike.times and found.alike.cautions == ()


def test_of_two_models_one_of_each_is_taken() -> None:
    asked = folders(SLOW, FAST)
    other_model(asked[1])
    found = compare(asked)
    assert found.title == "Take out-1: pruned or out-2: dense-w4"
    assert "run the same tasks on both" in found.why
    assert [one.name for one in found.rows if one.take] == ["out-1: pruned", "out-2: dense-w4"]
    assert found.answers is not None  # each dense model beside its own
    assert found.answers.headers == (
        *("Prompt", "out-1: dense", "out-1: pruned", "out-2: dense", "out-2: dense-w4"),
    )


def test_answers_stand_side_by_side_with_what_they_share_with_dense() -> None:
    asked = folders(SLOW, FAST)
    answers = manifest_of(asked[0])["stages"]["answers"]["result"]
    answers["variants"]["pruned"] = list(answers["variants"]["dense"])
    found = compare(asked).answers
    assert found is not None
    assert found.headers == ("Prompt", "out-1: dense", "out-1: pruned", "out-2: dense-w4")
    assert found.rates[1:] == (("out-1: pruned", "2 of 2", "0 of 2"), ("out-2: dense-w4", "0 of 2", "0 of 2"))
    assert found.rows[0][3].endswith("(dense-w4)")


def test_both_pages_hold_every_row_and_end_or_begin_with_the_one_to_take() -> None:
    found = found_of(SLOW, FAST)
    html, markdown = comparison_html(found), comparison_markdown(found)
    rows = table(found).rows
    assert len(rows) == 6
    for row in rows:
        assert f"| {' | '.join(row)} |" in markdown
        assert row[0] in html
    assert markdown.rstrip().endswith(found.why)
    assert html.index("Take out-2: dense-w4") < html.index("<h2>Every model")
    (figure,) = [html[html.index("<svg") : html.index("</svg>") + 6]]
    ElementTree.fromstring(figure)
    assert "out-2: dense-w4 13.48 and KL 0.08" in figure or "out-2: dense-w4" in figure
    assert {len(row) for row in brief_rows(found)} == {len(BRIEF)}
    assert ("out-2", "dense-w4", "take") in {(*row[:2], row[-1]) for row in brief_rows(found)}


def test_hostile_names_are_shown_and_not_obeyed() -> None:
    asked = folders(SLOW, FAST)
    hostile = "<script>alert(1)</script>|`*x*`\x1b[2J"
    manifest_of(asked[0])["model"]["name"] = hostile
    other_model(asked[0])
    found = compare([Folder("a<b>|\x1b[31m", asked[0].records), asked[1]])
    html, markdown = comparison_html(found), comparison_markdown(found)
    assert "<script" not in html and "a<b>" not in html and "\x1b" not in html
    assert not re.search(r"(?<!\\)<(script|b>)", markdown) and "\x1b" not in markdown
    assert "&lt;script&gt;" in html and r"\<script\>" in markdown


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.mark.parametrize("records", [[with_models(SLOW), with_models(FAST)], [with_models(MANY)] * 4])
def test_the_page_is_legible(browser: Chromium, tmp_path: Path, records: list[Records]) -> None:
    found = compare([Folder(f"smollm2-s0.{at}", one) for at, one in enumerate(records)])
    html = comparison_html(found)
    assert axes_without_unit(html) == []
    page = tmp_path / "compared.html"
    page.write_text(html, encoding="utf-8")
    for size in (PHONE, DESKTOP):
        for dark in (False, True):
            assert faults(browser, page, size, dark=dark) == [], (size, dark)
    assert 1 <= pages_of(browser.pdf()) <= 6


def test_the_frozen_folder_compares_with_itself() -> None:
    found = compare([Folder("a", frozen_records()), Folder("b", frozen_records())])
    assert found.recipe.rows == () and found.alike.cautions == ()
    assert "Nothing." in comparison_html(found) and "Nothing." in comparison_markdown(found)
