"""A folder that is half made, partly failed or named by a stranger still gets a page that can be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from builders.browser import Chromium, chromium
from builders.pages import DESKTOP, PHONE, axes_without_unit, faults
from builders.reports import frozen_records, with_layers, with_models, write_records
from click.testing import CliRunner

from nirvana_deploy.base.errors import LaterVersionError, upgrade
from nirvana_deploy.cli.main import commands
from nirvana_deploy.output.records import Records
from nirvana_deploy.pipeline.folder import report_folder
from nirvana_deploy.report.report import write_report

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'|`$x_1$`\n# {{ 7*7 }} **bold** [a](js:x) "
    "\x1b[2J\x1b]0;t\x07\u202egnp.exe" + "long-" * 40
)


def killed_after(*stages: str) -> Records:
    records = frozen_records()
    assert records.manifest is not None
    made = records.manifest["stages"]
    records.manifest.update(complete=False, stages={name: made[name] for name in stages})
    return Records(records.manifest, records.plan if "plan" in stages else None, None)


def one_variant_failed() -> Records:
    records = with_models({"pruned": (1.4, 380, 0.06), "pruned-int8": (1.9, 120, 0.08)})
    assert records.manifest is not None
    result = records.manifest["stages"]["onnx-int8"]["result"]
    result |= {"passed": False, "problem": "208 of 210 linears run in integer kernels."}
    result["coverage"]["found"] = 208
    return records


def no_baseline() -> Records:
    records = with_models({"pruned": (1.4, 380, 0.06), "pruned-w4": (2.4, 80, 0.2)})
    assert records.manifest is not None and records.benchmark is not None
    records.manifest["options"]["baseline"] = False
    records.benchmark["variants"] = records.benchmark["variants"][1:]
    records.benchmark["comparisons"] = []
    stages = records.manifest["stages"]
    del stages["dense-onnx"], stages["verify"]["result"]["dense"]
    quality = stages["quality"]["result"]["variants"]
    del quality["dense"], stages["answers"]["result"]["variants"]["dense"]
    for variant in (*quality.values(), *(v["quality"] for v in records.benchmark["variants"])):
        for part in (variant, *variant.get("parts", {}).values()):
            part.pop("kl_vs_dense"), part.pop("kl_standard_error")
    return records


def hostile() -> Records:
    records = frozen_records()
    assert records.manifest is not None and records.plan is not None
    records.manifest["model"] |= {"name": HOSTILE, "origin": f"folder /home/me/{HOSTILE}", "licence": HOSTILE}
    records.manifest["command"] = f"nirvana-deploy prune-export '{HOSTILE}'"
    records.plan["model"]["name"] = HOSTILE
    answers = records.manifest["stages"]["answers"]["result"]
    answers["variants"]["pruned"] = [HOSTILE, HOSTILE]
    return records


NOT_FINISHED = ("No verdict", "The job is not finished: its last stage is", "--resume --out OUT")
FOLDERS: dict[str, tuple[Callable[[], Records], tuple[str, ...]]] = {
    "killed at the start": (lambda: killed_after("calibrate"), (*NOT_FINISHED, "is calibrate.")),
    "killed half way": (
        lambda: killed_after("calibrate", "score", "plan", "checkpoint", "onnx"),
        (*NOT_FINISHED, "is onnx."),
    ),
    "one variant failed": (
        one_variant_failed,
        ("Ship pruned", "Verified against torch, but not pruned-int8", "208 of 210 linears run"),
    ),
    "no baseline": (
        no_baseline,
        ("No verdict", "The dense model was not measured", "(--no-baseline was given)"),
    ),
    "a hostile name": (hostile, ("&lt;script&gt;alert(1)", r"\x1b[2J\x1b]0;t\x07\u202egnp.exe")),
    "one layer": (lambda: with_layers(frozen_records(), 1, groups=1), ("FFN: 1,536 of 1,536",)),
    "two hundred layers": (
        lambda: with_layers(frozen_records(), 200, groups=32),
        ("Kept width over 200 layers",),
    ),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.mark.parametrize("name", FOLDERS)
def test_both_pages_say_what_is_so(tmp_path: Path, name: str) -> None:
    records, said = FOLDERS[name]
    markdown, page = write_report(write_records(tmp_path, records()))
    html = re.sub("</?span[^>]*>", "", page.read_text(encoding="utf-8"))
    assert [words for words in said if words not in html] == []
    for text in (html, markdown.read_text(encoding="utf-8")):
        assert not re.search(r"(?<!\\)<(script|img)", text)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert axes_without_unit(html) == []
    assert page.stat().st_size < 1_000_000


@pytest.mark.parametrize("name", FOLDERS)
def test_the_page_can_be_read(browser: Chromium, tmp_path: Path, name: str) -> None:
    page = write_report(write_records(tmp_path, FOLDERS[name][0]()))[1]
    for size, dark in ((PHONE, True), (PHONE, False), (DESKTOP, True), (DESKTOP, False)):
        assert faults(browser, page, size, dark=dark) == [], (size, dark)


def test_a_job_that_measured_all_is_not_called_unfinished_while_its_report_is_written(tmp_path: Path) -> None:
    records = frozen_records()
    assert records.manifest is not None
    records.manifest["complete"] = False
    _, page = write_report(write_records(tmp_path, records))
    assert "not finished" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("record", ["manifest", "plan", "benchmark"])
def test_records_of_a_later_version_are_an_error_that_says_so(tmp_path: Path, record: str) -> None:
    records = frozen_records()
    out = write_records(tmp_path / "out", records)
    report_folder(out)
    verdict = (out / "report.html").read_text(encoding="utf-8")
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    later = manifest if record == "manifest" else getattr(records, record)
    (out / f"{record}.json").write_text(json.dumps(later | {"schema": 2}), encoding="utf-8")
    if record == "manifest":  # the page that it lists is its own version's
        assert CliRunner().invoke(commands, ["report", str(out)]).exit_code == 1
        assert (out / "report.html").read_text(encoding="utf-8") == verdict
        (out / "report.html").write_text("An earlier version's", encoding="utf-8")
    found = CliRunner().invoke(commands, ["report", str(out)])
    assert f"{record}.json has schema 2" in str(found.exception)
    assert upgrade() in str(getattr(found.exception, "hint", ""))
    for name in ("report.html", "report.md"):
        page = (out / name).read_text(encoding="utf-8")
        assert "No verdict: made by a later version of nirvana-deploy" in page and "has schema 2" in page


def test_a_page_of_somebody_else_stays_beside_records_of_a_later_version(tmp_path: Path) -> None:
    records = frozen_records()
    assert records.manifest is not None
    records.manifest["schema"] = 2
    out = write_records(tmp_path / "out", records)
    (out / "report.html").write_text("mine", encoding="utf-8")
    assert isinstance(CliRunner().invoke(commands, ["report", str(out)]).exception, LaterVersionError)
    assert (out / "report.html").read_text(encoding="utf-8") == "mine" and not (out / "report.md").exists()
