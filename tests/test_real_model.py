"""The main job on a real model, SmolLM2-135M, as a user runs it (without timing anything)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The finished output folder and what was printed."""
    out = tmp_path_factory.mktemp("job") / "smollm2-s0.4"
    command = [sys.executable, "-m", "nirvana_deploy", "prune-export", "smollm2", "--sparsity", "0.4"]
    options = ["--num-sequences", "8", "--no-benchmark", "--out", str(out), "--json"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out, result


def test_runtimes_generate_the_tokens_of_the_checkpoint(job: tuple[Path, object]) -> None:
    verified = json.loads((job[0] / "manifest.json").read_text())["stages"]["verify"]["result"]
    for name in ("dense", "pruned"):
        assert verified[name]["passed"] and all(check["passed"] for check in verified[name]["checks"])
        runtimes = {check["runtime"]: check for check in verified[name]["greedy"]}
        for runtime in ("onnxruntime", "onnxruntime-genai"):
            check = runtimes[runtime]
            assert check["not_run"] is None
            assert (check["prompts"], check["new_tokens"]) == (5, 32)
            assert check["equal_prompts"] + check["ties"] == 5


def test_layers_differ_and_the_budget_is_met(job: tuple[Path, object]) -> None:
    plan = json.loads((job[0] / "plan.json").read_text())
    assert (plan["budget"]["removed_groups"], plan["budget"]["of_groups"]) == (14, 90)
    assert (plan["budget"]["removed_neurons"], plan["budget"]["of_neurons"]) == (22118, 46080)
    assert 0.39 < plan["budget"]["met_removed_share"] <= 0.4
    assert len({len(layer["kept_groups"]) for layer in plan["layers"]}) > 1
    assert len({len(layer["kept_neurons"]) for layer in plan["layers"]}) > 10
    assert all(len(layer["kept_neurons"]) % 8 == 0 for layer in plan["layers"])


def test_quality_stands_beside(job: tuple[Path, object]) -> None:
    quality = json.loads((job[0] / "quality.json").read_text())["variants"]
    assert 5 < quality["dense"]["perplexity"] < 40 < quality["pruned"]["perplexity"] < 500
    assert 0.5 < quality["pruned"]["kl_vs_dense"] < 4


def test_the_result_is_on_stdout_and_the_log_on_stderr(
    job: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, result = job
    assert json.loads(result.stdout)["out"] == str(out)
    assert "Scoring 8 x 128 tokens" in result.stderr and "Error" not in result.stderr
    assert (out / "report.html").is_file()
