"""What was measured on a model that another replaced, or with another request, is measured anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.jobs import TINY_JOB

from nirvana_deploy.measure.recipe import Traffic, Workload
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.folder import benchmark_workloads, quantize_folder
from nirvana_deploy.pipeline.forecast.forecast import forecast
from nirvana_deploy.pipeline.job import job_of
from nirvana_deploy.pipeline.prune_export import prune_export
from nirvana_deploy.quantize.recipe import Quantization

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the genai bindings while they load
]
RECORDS = ("quality.json", "answers.json", "benchmark.json", "workloads.json")


def test_its_numbers_go_with_it_and_the_next_run_measures_anew(tiny_llama: Path, tmp_path: Path) -> None:
    out, job = tmp_path / "out", {**TINY_JOB, "quantize": ("w4",), "baseline_quantized": False}
    prune_export(str(tiny_llama), out=out, **job)
    short = Workload(prompt_tokens=6, new_tokens=3, repeats=2, threads=1)
    benchmark_workloads(out, Traffic(sweeps=("batch=1,2",)), short)
    before = perplexity(out)

    quantize_folder(out, Quantization(scheme="w4"))  # the same bytes
    assert all((out / name).is_file() for name in RECORDS)
    quantize_folder(out, Quantization(scheme="w4", block_size=16, rounding="plain"))
    assert not [name for name in RECORDS if (out / name).exists()]
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "nirvana-deploy benchmark" in page and "nirvana-deploy evaluate" in page
    run = Run.open(out)
    assert not run.damaged() and {"quality", "benchmark"}.isdisjoint(run.manifest["stages"])

    prune_export(str(tiny_llama), out=out, resume=True, **job)
    assert perplexity(out) != before


def test_a_resumed_job_times_the_request_that_it_asks_for(tiny_llama: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", str(tiny_llama)
    prune_export(model, out=out, **TINY_JOB)
    before = Run.open(out).manifest["stages"]
    shorter = {**TINY_JOB, "prompt_tokens": 5}
    planned = forecast(job_of(model, shorter), out=out, resume=True)
    assert [one.name for one in planned.forecast.left] == ["benchmark", "report"]
    prune_export(model, out=out, resume=True, **shorter)
    after = Run.open(out).manifest["stages"]
    record = json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    assert record["workload"]["prompt_tokens"] == 5
    assert after["quality"] == before["quality"] and after["benchmark"] != before["benchmark"]
    prune_export(model, out=out, resume=True, **shorter)
    assert Run.open(out).manifest["stages"]["benchmark"] == after["benchmark"]


def perplexity(out: Path) -> float:
    quality: dict[str, Any] = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    found: float = quality["variants"]["pruned-w4"]["perplexity"]
    return found
