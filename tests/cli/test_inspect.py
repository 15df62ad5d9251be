"""``inspect`` tells what was kept and where, from the synthetic records in data/report/."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from builders.scripts import ROOT
from click.testing import CliRunner

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.cli.inspect import inspect
from nirvana_deploy.cli.report import report
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.output.inspection import inspect_path
from nirvana_deploy.prune.plan import make_plan
from nirvana_deploy.prune.plan_file import write_plan
from nirvana_deploy.prune.saliency.units import UnitScores
from nirvana_deploy.report.table import ABSENT

FROZEN = ROOT / "tests" / "report" / "data"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for name in ("manifest", "plan", "benchmark"):
        shutil.copy(FROZEN / f"{name}.json", tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(bytes(1000))
    (tmp_path / "onnx" / "model.onnx.data").write_bytes(bytes(5000))
    return tmp_path


def test_layers_repeat_the_plan_and_add_up_to_its_budget(out: Path) -> None:
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    layers = inspect_path(out).layers
    assert [layer.kept_groups for layer in layers] == [
        tuple(entry["kept_groups"]) for entry in plan["layers"]
    ]
    removed_neurons = sum(layer.of_neurons - layer.kept_neurons for layer in layers)
    assert removed_neurons == plan["budget"]["removed_neurons_after_rounding"]


def test_a_plan_alone_is_enough_and_has_no_folder_part(out: Path) -> None:
    inspection = inspect_path(out / "plan.json")
    assert inspection.model == "smollm2"
    assert len(inspection.layers) == 30
    assert (inspection.stages, inspection.folder_bytes, inspection.verification) == ({}, {}, ())


def test_a_folder_adds_sizes_stages_verification_and_missing_files(out: Path) -> None:
    inspection = inspect_path(out)
    assert inspection.folder_bytes["onnx"] == 6000
    assert inspection.stages["score"] == {"seconds": 38.4, "peak_rss_bytes": 1_720_000_000}
    assert [(v.model, v.passed, v.num_checks, v.greedy_equal) for v in inspection.verification] == [
        ("pruned", True, 6, True),
        ("dense", True, 6, True),
    ]
    assert inspection.verification[0].max_abs_diff == pytest.approx(3.1e-5)
    assert "checkpoint/model.safetensors" in inspection.missing_files
    assert "onnx/model.onnx" not in inspection.missing_files


def test_missing_and_foreign_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match="does not exist"):
        inspect_path(tmp_path / "nowhere")
    with pytest.raises(NirvanaError, match="not an output folder"):
        inspect_path(tmp_path)
    (tmp_path / "plan.json").write_text("{", encoding="utf-8")
    with pytest.raises(NirvanaError, match="not valid JSON"):
        inspect_path(tmp_path / "plan.json")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_command_prints_a_row_with_a_bar_for_every_layer(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = _Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    inspect.main([str(out)], standalone_mode=False)
    shown = screen.getvalue()
    rows = [line for line in shown.splitlines() if " of 1,536 " in line]
    assert len(rows) == 30 and max(map(len, rows)) <= 80
    assert all("\N{FULL BLOCK}" in row for row in rows)
    assert "40.0% of the linear weights removed" in shown
    assert "verification of pruned: passed, 6 checks" in shown


def test_a_pipe_gets_columns_and_no_pictures(out: Path) -> None:
    result = CliRunner().invoke(inspect, [str(out)], catch_exceptions=False)
    assert result.exit_code == 0 and "\N{FULL BLOCK}" not in result.output
    rows = [line.split("\t") for line in result.output.splitlines()]
    assert ["layer", "KV groups", "FFN neurons"] in rows and ["folder", "size"] in rows
    assert sum(len(row) == 3 and row[2].endswith(" of 1,536") for row in rows) == 30


def test_the_command_prints_json_for_machines(out: Path) -> None:
    result = CliRunner().invoke(inspect, [str(out), "--json"], catch_exceptions=False)
    record = json.loads(result.stdout)
    assert record["schema"] == 1
    assert record["plan"]["budget"]["of_groups"] == 90
    assert len(record["layers"]) == 30


def test_the_report_command_prints_where_it_wrote(out: Path) -> None:
    result = CliRunner().invoke(report, [str(out), "--json"], catch_exceptions=False)
    paths = json.loads(result.stdout)
    assert (paths["markdown"], paths["html"]) == (str(out / "report.md"), str(out / "report.html"))
    assert (out / "report.html").stat().st_size > 50_000


T5_CONFIG = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "vocab_size": 100,
}


def test_an_encoder_decoder_names_its_sites(tmp_path: Path) -> None:
    shape = shape_from_config(T5_CONFIG)
    scores = UnitScores(
        groups=tuple(np.arange(layer.kv_heads) + 1.0 * i for i, layer in enumerate(shape.layers)),
        neurons=tuple(np.arange(layer.ffn_width) + 1.0 * i for i, layer in enumerate(shape.layers)),
    )
    plan = make_plan(shape, scores, sparsity=0.3, gamma=1.0, saliency="random", model_name="t5")
    write_plan(plan, tmp_path / "plan.json")
    layers = inspect_path(tmp_path / "plan.json").layers
    sites = ["encoder"] * 3 + ["decoder"] * 2 + ["cross"] * 2
    assert [layer.site for layer in layers] == sites
    assert [layer.label for layer in layers[2:6]] == ["encoder 2", "decoder 0", "decoder 1", "cross 0"]
    printed = CliRunner().invoke(inspect, [str(tmp_path / "plan.json")], catch_exceptions=False).output
    assert "decoder 1" in printed and "of 64" in printed and "of 0" not in printed
    written = CliRunner().invoke(report, [str(tmp_path)], catch_exceptions=False)
    assert written.exit_code == 0
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"| cross 1 | 4 of 4 | {ABSENT} | {ABSENT} |  |" in markdown
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "over 7 layers" in page and "of 0" not in markdown
