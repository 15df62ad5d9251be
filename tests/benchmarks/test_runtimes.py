"""Our models in several runtimes: the forms that are made, what the table says, and who is faster."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from builders.extras import needs
from builders.plans import plan_for
from builders.scripts import ROOT
from builders.tiny import write_tiny

from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint

MODELS = ["dense", "pruned", "dense-w4"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import runtimes

    return runtimes


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """As much of an output folder as is asked of one."""
    dense = write_tiny(tmp_path / "dense", "llama-tied", head_dim=16)
    slice_checkpoint(Checkpoint.open(dense), plan_for(dense), tmp_path / "out" / "checkpoint")
    manifest = {
        "model": {"name": "tiny", "path": str(dense)},
        "options": {"flavor": "portable", "quantize_head": True, "sparsity": 0.3},
    }
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "out"


def row(model: str, runtime: str, ms: float, **changes: Any) -> dict[str, Any]:
    times = [ms, ms * 1.01, ms * 0.99, ms, ms, ms]
    found = {"model": model, "runtime": runtime, "made": "by hand", "reason": None, "about": {runtime: "1.0"}}
    return found | {
        "decode_ms": times,
        "prefill_ms": [10 * one for one in times],
        "weights_bytes": 2e6,
        "peak_rss_bytes": 3e8,
        **changes,
    }


RECORD = {
    "source": "tiny",
    "sparsity": 0.3,
    "environment": {"threads": 2, "cpu": "a CPU", "load_average_1min": 0.5},
    "watch": {"cautions": ["The machine was busy."]},
    "workload": {"prompt_tokens": 128, "new_tokens": 64, "rounds": 6},
    "models": [
        row("pruned", "ONNX Runtime", 10.0),
        row("pruned", "OpenVINO", 8.0, prefill_ms=[100.0] * 6),
        row("pruned", "llama.cpp", 12.0),
        {"model": "pruned", "runtime": "onnxruntime-genai", "made": "it", "reason": "no answer within 300 s"},
    ],
}


def test_the_table_says_who_is_faster_and_who_did_not_run(script: ModuleType) -> None:
    lines = script.section(RECORD).splitlines()
    assert "| pruned | ONNX Runtime | 2 | 10.00 | 1 | 100 | 1 | 300 |" in lines
    assert "| pruned | OpenVINO | 2 | 8.00 | 1.25 (1.25 to 1.25) | 100 | 1.00 (0.99 to 1.01) | 300 |" in lines
    assert "| pruned | onnxruntime-genai | not run: no answer within 300 s | | | | | |" in lines
    faster = "Faster than in ONNX Runtime beyond doubt: in decode pruned in OpenVINO 1.25 times; in prefill"
    assert f"{faster} nothing." in lines
    assert any("llama.cpp 1.0" in line and "load average before the rounds 0.5" in line for line in lines)
    assert lines[-1] == "The machine was busy."
    assert len({line.count("|") for line in script.table(RECORD).splitlines()}) == 1


@pytest.mark.integration
def test_every_runtime_is_given_its_form_and_one_that_fails_takes_no_other_with_it(
    script: ModuleType, out: Path, tmp_path: Path
) -> None:
    for module in ("gguf", "onnxruntime_genai", "openvino"):
        needs(module)
    options = argparse.Namespace(
        out=out,
        llama_cpp=None,
        model=MODELS,
        runtime=list(script.FORMS),
        prompt_tokens=6,
        new_tokens=3,
        rounds=2,
        threads=1,
        limit=100,
    )
    record = script.measured(options, tmp_path / "work")
    ran = {(one["model"], one["runtime"]) for one in record["models"] if one["reason"] is None}
    assert ran == {(model, name) for model in MODELS for name in script.FORMS if name != "llama.cpp"}
    reasons = [one["reason"] for one in record["models"] if one["runtime"] == "llama.cpp"]
    assert all("no merges" in reason for reason in reasons)  # the tiny tokenizer's
    made = {path.name for path in (tmp_path / "work").iterdir()}
    assert made >= {"dense-gqa", "dense-portable", "dense-w4-portable-tensorrt", "dense-w4-gqa-ort"}
    assert script.section(json.loads(json.dumps(record)))
