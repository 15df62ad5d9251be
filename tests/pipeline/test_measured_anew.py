"""A quantized model that another takes the place of: what was measured with it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.jobs import TINY_JOB

from nirvana_deploy.measure.recipe import Traffic, Workload
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.folder import benchmark_workloads, quantize_folder
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


def perplexity(out: Path) -> float:
    quality: dict[str, Any] = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    found: float = quality["variants"]["pruned-w4"]["perplexity"]
    return found
