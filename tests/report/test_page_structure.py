"""How the page looks: in a browser where there is one, and from its markup in any case."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.browser import Chromium, chromium
from builders.pages import DESKTOP, PHONE, axes_without_unit, faults, pages_of
from builders.reports import MANY, frozen_records, with_layers, with_models, write_records
from builders.searches import OTHER, searched

from nirvana_deploy.base.units import format_bytes, format_ms, format_number
from nirvana_deploy.output.records import Records
from nirvana_deploy.report.pages.front import front_figure, search_page
from nirvana_deploy.report.report import write_report
from nirvana_deploy.report.table import format_times
from nirvana_deploy.search.ways import OWN

MOST_SHEETS = 6
FOLDERS: dict[str, Callable[[], Records]] = {
    "two models": frozen_records,
    "eight models": lambda: with_models(MANY),
    "one layer": lambda: with_layers(frozen_records(), 1, groups=2),
    "two hundred layers": lambda: with_layers(frozen_records(), 200),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


def page_of(records: Records, out: Path) -> Path:
    return write_report(write_records(out, records))[1]


@pytest.mark.parametrize("folder", FOLDERS)
def test_text_is_legible_and_lies_on_no_other_and_the_verdict_needs_no_scrolling(
    browser: Chromium, tmp_path: Path, folder: str
) -> None:
    page = page_of(FOLDERS[folder](), tmp_path)
    for size in (PHONE, DESKTOP):
        for dark in (False, True):
            assert faults(browser, page, size, dark=dark) == [], (size, dark)
    assert 1 <= pages_of(browser.pdf()) <= MOST_SHEETS


SEARCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "six sparsities": searched,
    "not timed": lambda: searched(timed=False),
    "two ways and accuracy": lambda: searched(ways=(OWN, OTHER), accuracy=True),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_page_of_a_search_is_legible_too(browser: Chromium, tmp_path: Path, name: str) -> None:
    page = tmp_path / "search.html"
    page.write_text(search_page(SEARCHES[name]()), encoding="utf-8")
    for size in (PHONE, DESKTOP):
        for dark in (False, True):
            assert faults(browser, page, size, dark=dark) == [], (size, dark)
    assert axes_without_unit(page.read_text(encoding="utf-8")) == []


def test_on_the_page_of_a_search_what_is_dominated_is_grey_and_the_legend_says_so() -> None:
    record = searched()
    for cost, flag in (("tpot_ms", "on_front"), ("weights_bytes", "on_size_front")):
        svg = front_figure(record, cost)
        assert svg is not None and ">dominated<" in svg
        marks = re.findall(r'<use[^>]* style="fill: var\(--(\w+)', svg)
        known = [one for one in record["points"] if one["kl"] is not None and one[cost] is not None]
        assert marks.count("baseline") >= sum(not one[flag] for one in known) > 3
        assert {mark for mark in marks if mark != "baseline"} == {"first", "second", "third"}


def test_what_is_looked_for_is_found(browser: Chromium, tmp_path: Path) -> None:
    page = page_of(frozen_records(), tmp_path)
    html = page.read_text(encoding="utf-8")
    over = '<h1><span style="position: absolute; color: #888; font-size: 8px">over</span>'
    wide = '<p style="width: 2000px">wide</p><section style="margin-top: 900px" class="verdict'
    html = html.replace("<h1>", over, 1).replace('<section class="verdict', wide, 1)
    html = re.sub(r"(<text[^>]*>)milliseconds</text>", r"\g<0>\1twice</text>", html, count=1)
    page.write_text(html, encoding="utf-8")
    said = faults(browser, page, PHONE, dark=False)
    for fault in (
        r"the page is 2\d{3} pixels wide",
        "P is cut at the right",
        "the verdict ends at .* of 844",
        "'over' has a contrast of 3",
        "'over' is 8.0 pixels high",
        "'over' lies on|lies on 'over'",
        "'twice' lies on|lies on 'twice'",
    ):
        assert any(re.search(fault, one) for one in said), (fault, said)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_axis_with_numbers_has_a_unit(tmp_path: Path, folder: str) -> None:
    html = page_of(FOLDERS[folder](), tmp_path).read_text(encoding="utf-8")
    assert html.count("matplotlib.axis_") > 8
    assert axes_without_unit(html) == []
    bare = html.replace(">milliseconds<", "><").replace(">layer, input on the left<", "><")
    assert len(axes_without_unit(bare)) == 4


def changed(records: Records, path: tuple[Any, ...], value: Any) -> Records:
    place: Any = records.benchmark
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return records


CUT = ("variants", 1)
FIELDS: dict[str, tuple[tuple[Any, ...], float, Callable[[float], str], str]] = {
    "speed-up": (("comparisons", 0, "tpot_speedup"), 1.37, format_times, "tiles table verdict"),
    "time": ((*CUT, "tpot_ms", "p50"), 17.3, format_ms, "tiles table"),
    "bytes": ((*CUT, "weights_bytes"), 321_000_000, format_bytes, "tiles table memory verdict"),
    "memory": ((*CUT, "peak_rss_bytes"), 543_000_000, format_bytes, "tiles table memory"),
    "perplexity": ((*CUT, "quality", "perplexity"), 20.4, format_number, "tiles table"),
    "KL": ((*CUT, "quality", "kl_vs_dense"), 0.0543, format_number, "tiles table picture verdict"),
}
"""A field of benchmark.json, another value of it, how that is written, and the places that show it."""


@pytest.mark.parametrize("name", FIELDS)
def test_a_number_is_the_same_field_wherever_it_stands(tmp_path: Path, name: str) -> None:
    path, value, write, places = FIELDS[name]
    records = frozen_records()
    assert records.manifest is not None and records.benchmark is not None
    del records.manifest["stages"]["quality"]
    records.benchmark["variants"][1]["quality"].update(perplexity=20.0, kl_vs_dense=0.05)
    html = page_of(changed(records, path, value), tmp_path).read_text(encoding="utf-8")
    parts = {
        "verdict": r'<section class="verdict.*?</section>',
        "tiles": r'<dl class="tiles">.*?</dl>',
        "table": r"<h2>Side by side</h2>.*?</table>",
        "picture": r'aria-label="decode, ms per token\. Front: [^"]*"',
        "memory": r'aria-label="Memory\. [^"]*"',
    }
    for place in places.split():
        found = re.search(parts[place], html, flags=re.DOTALL)
        assert found is not None and write(value) in found[0], place
