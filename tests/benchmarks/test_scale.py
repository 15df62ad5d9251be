"""The benchmark of scale: a tiny model always, the exact shape of Llama-3.2-1B in the slow tier."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.scripts import ROOT

SCRIPT = ROOT / "benchmarks" / "scale.py"


def record_of(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the script writes; its exit code says whether the promises held, its time ratio is noise here."""
    command = [sys.executable, str(SCRIPT), *arguments, "--folder", str(tmp_path)]
    run = subprocess.run(
        [*command, "--json", str(tmp_path / "record.json")], capture_output=True, text=True, check=False
    )
    assert run.returncode in (0, 1) and not run.stderr, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]  # the checkpoints are gone
    record: dict[str, Any] = json.loads((tmp_path / "record.json").read_text())
    return record


@pytest.mark.integration
@pytest.mark.slow
def test_a_tiny_model_is_measured(tmp_path: Path) -> None:
    options = ("--sequences", "2", "--seq-len", "16", "--in-memory", "--reconstruct", "32")
    record = record_of(tmp_path, "tiny", *options)
    assert list(record["streamed"]["stages"]) == ["score", "plan", "reconstruct", "slice"]
    assert record["promise"]["kept"]["peak"] and record["promise"]["kept"]["plan"]
    assert record["comparison"]["max_relative_score_difference"] < 1e-5
    assert record["result"]["planned_shapes"]
    parts, score = record["streamed"]["score_parts_s"], record["streamed"]["stages"]["score"]
    assert parts.keys() >= {"head", "layers, backward"} and all(s >= 0 for s in parts.values())
    assert 0 < sum(parts.values()) <= 1.1 * score["seconds"]  # a busy machine: more lies between the parts


@pytest.mark.slow
@pytest.mark.integration
def test_the_default_recipe_is_measured(tmp_path: Path) -> None:
    record = record_of(tmp_path, "tiny", "--layers", "2", "--best", "48", "--seq-len", "16")
    assert list(record["streamed"]["stages"]) == ["curves", "refit", "slice"]
    assert record["promise"]["kept"]["peak"] and record["result"]["met_removed_share"] >= 0.4


@pytest.mark.slow
def test_a_billion_parameters_need_no_more_than_a_layer_and_a_shard(tmp_path: Path) -> None:
    record = record_of(tmp_path, "1b", "--sequences", "1", "--seq-len", "32")
    assert record["parameters"] > 1.2e9 and record["result"]["planned_shapes"]
    assert record["streamed"]["peak_rss_bytes"] < 3e9  # in float32 the whole model takes 5 GB
    assert record["streamed"]["stages"]["score"]["peak_rss_bytes_so_far"] < 2.5e9


@pytest.mark.slow
def test_the_peak_of_an_export_is_measured(tmp_path: Path) -> None:
    script = SCRIPT.with_name("export_scale.py")
    command = [sys.executable, str(script), "tiny", "--layers", "1", "3", "--folder", str(tmp_path)]
    run = subprocess.run([*command, "--json", str(tmp_path / "record.json")], check=False)
    record = json.loads((tmp_path / "record.json").read_text())
    assert run.returncode == 0 and all(record["promise"]["kept"].values()), record
    assert [run["layers"] for run in record["runs"]] == [1, 3]
    assert all(run["imported_rss_bytes"] <= run["peak_rss_bytes"] for run in record["runs"])
