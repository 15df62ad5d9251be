"""What a newcomer's clock is read for: commands of the front page, a verdict above the fold, the table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.browser import PROGRAMS
from builders.reports import frozen_records, write_records
from builders.scripts import script

from nirvana_deploy.report.report import write_report

WHERE = {
    "environment": {"threads": 2, "cpu": "a CPU", "load_average_1min": 0.5},
    "load_average_1min_after": 1.5,
}


def own(count: int) -> dict[str, Any]:
    steps = [{"command": "git clone it", "seconds": None}]
    steps += [{"command": "nirvana-deploy verify out", "seconds": 61.0}] * (count - 1)
    return {"readings": {"own-model": {**WHERE, "model": "mine", "steps": steps}}}


def seen(why_ends_px: float | None) -> dict[str, Any]:
    one = {"width_px": 390, "height_px": 844, "verdict": "Ship it", "why": "It is fast.", "words": 40}
    ends = {"verdict_ends_px": why_ends_px, "why_ends_px": why_ends_px}
    return {"readings": {"decision": {**WHERE, "sizes": {"phone": {**one, **ends}}}}}


def test_the_front_page_brings_an_own_model_to_its_report_in_few_commands() -> None:
    newcomer = script("newcomer")
    clone, install, *own = newcomer.commands_for("./my model")
    assert clone.startswith("git clone ") and install.startswith("pip install -e ")
    assert own[0] == "nirvana-deploy prune-export './my model' --sparsity 0.4 --quantize w4"
    assert own[1].startswith("nirvana-deploy generate 'my model-s0.4/dense/onnx-w4' ")
    assert 2 <= len(own) <= newcomer.MOST_COMMANDS - 2 and not any("smollm2" in line for line in own)


@pytest.mark.parametrize("record, missed", [(own(10), 0), (own(11), 1), (seen(844.0), 0), (seen(845.0), 2)])
def test_what_is_wanted_is_asked_of_the_record(record: dict[str, Any], missed: int) -> None:
    assert len(script("newcomer").missed_by(record)) == missed


def test_a_page_without_a_verdict_is_no_decision() -> None:
    newcomer = script("newcomer")
    assert len(newcomer.missed_by(seen(None))) == 2
    assert "no verdict" in newcomer.section(seen(None))


def test_the_table_has_the_readings_that_were_taken() -> None:
    newcomer = script("newcomer")
    seconds = {"clone_seconds": 1.0, "set_up_seconds": 60.0, "demo_seconds": 120.0}
    record = {
        "readings": {**own(6)["readings"], **seen(500.0)["readings"], "first-report": {**WHERE, **seconds}}
    }
    first, mine, phone, _, *places = newcomer.section(record).splitlines()[2:]
    assert first.startswith("| Clone to first report | ") and "set-up" in first
    assert mine.startswith("| README to own model (mine) | 6 commands ") and mine.endswith(
        "| at most 10 commands |"
    )
    assert "390 x 844 | the reason ends at 500 pixels, after 40 words: “Ship it” |" in phone
    assert len(places) == 3 and "load before and after 0.5 and 1.5." in places[0]


@pytest.mark.integration
def test_a_report_is_decided_without_scrolling(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not any(map(shutil.which, PROGRAMS)):
        pytest.skip("needs Chromium: apt-get install chromium")
    newcomer = script("newcomer")
    page = write_report(write_records(tmp_path, frozen_records()))[1]
    found = newcomer.decision(page, tmp_path_factory.mktemp("home"))
    assert newcomer.missed_by({"readings": {"decision": found}}) == []
    for one in found["sizes"].values():
        assert one["why"] and len(f"{one['verdict']} {one['why']}".split()) < one["words"] < 200
