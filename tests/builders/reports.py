"""Records of invented output folders: those of tests/report/data, changed in ways that pages must bear."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builders.scripts import ROOT
from nirvana_deploy.output.layout import SPECULATIVE
from nirvana_deploy.output.records import Records

FROZEN = ROOT / "tests/report/data"
RECORDS = ("manifest", "plan", "benchmark", "workloads", "speculative")


def frozen(name: str) -> dict[str, Any]:
    """One record as it lies on disk, free to change."""
    return dict(json.loads((FROZEN / f"{name}.json").read_text(encoding="utf-8")))


def frozen_records() -> Records:
    """All records of the frozen folder."""
    return Records(*(frozen(name) for name in RECORDS))


def write_records(out: Path, records: Records) -> Path:
    """Make ``out`` the folder of ``records``."""
    out.mkdir(exist_ok=True)
    for name in RECORDS:
        record = getattr(records, name)
        if record is not None:
            folder = out / SPECULATIVE if name == SPECULATIVE else out
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    return out


def with_models(models: Mapping[str, tuple[float, float, float]], records: Records | None = None) -> Records:
    """Records with these models beside the dense one: name -> (speed-up, size in MB, KL in nats).

    Perplexity rises with the KL; each model is verified, answers the prompts and, if quantized, keeps its
    promise.
    """
    records = records or frozen_records()
    assert records.manifest is not None and records.benchmark is not None
    dense, cut = records.benchmark["variants"]
    stages = records.manifest["stages"]
    quality, answers = stages["quality"]["result"], stages["answers"]["result"]
    records.benchmark["variants"] = [dense]
    records.benchmark["comparisons"] = []
    quality["variants"] = {"dense": quality["variants"]["dense"]}
    answers["variants"] = {"dense": answers["variants"]["dense"]}
    for name, (speedup, megabytes, kl) in models.items():
        of, _, scheme = name.partition("-")
        variant = {**copy.deepcopy(cut), "name": name, "weights_bytes": int(megabytes * 1e6)}
        for metric in ("tpot_ms", "itl_ms", "prefill_ms", "ttft_ms"):
            variant[metric] = _scaled(dense[metric], 1 / speedup)
        for phase in variant["roofline"].values():
            for key in ("gop_per_s", "gb_per_s", "share_of_bound"):
                phase[key] *= speedup
            phase["operations_per_byte"] *= cut["weights_bytes"] / (megabytes * 1e6)
        perplexity = dense["quality"]["perplexity"] * (1 + kl)
        measured = {"perplexity": perplexity, "kl_vs_dense": kl, "kl_standard_error": kl / 40}
        variant["quality"] = {**cut["quality"], **measured}
        records.benchmark["variants"].append(variant)
        records.benchmark["comparisons"].append(_comparison(name, speedup))
        parts = {kind: {**part, **measured} for kind, part in _parts(quality).items()}
        quality["variants"][name] = {**measured, "parts": parts}
        answers["variants"][name] = [f"{text} ({name})" for text in answers["variants"]["dense"]]
        if scheme:
            prefix = "dense-onnx-" if of == "dense" else "onnx-"
            result = quantized(scheme, megabytes)
            stages[f"{prefix}{scheme}"] = {"run": stages["plan"]["run"], "files": {}, "result": result}
    return records


def quantized(scheme: str, megabytes: float, **changes: Any) -> dict[str, Any]:
    """What a stage of quantization records."""
    coverage = {"promised": 210, "found": 210, "operators": {}, "missing": []}
    result = {"scheme": scheme, "coverage": coverage, "passed": True, "problem": None}
    return {**result, "weights_bytes": int(megabytes * 1e6), **changes}


def with_layers(records: Records, count: int, *, groups: int = 8, neurons: int = 1536) -> Records:
    """Records of a model of ``count`` layers, of which the deeper ones keep less."""
    assert records.plan is not None
    records.plan["layers"] = [
        {
            "layer": number,
            "of_groups": groups,
            "kept_groups": list(range(max(1, groups - 4 * number // max(count, 1)))),
            "of_neurons": neurons,
            "kept_neurons": list(range(neurons - (neurons // 2) * number // count)),
        }
        for number in range(count)
    ]
    return records


def _parts(quality: Mapping[str, Any]) -> dict[str, Any]:
    return dict(quality["variants"]["dense"]["parts"])


def _scaled(latency: Mapping[str, Any], factor: float) -> dict[str, Any]:
    scaled: dict[str, Any] = {key: latency[key] * factor for key in ("p50", "p90", "p99")}
    samples: Sequence[float] = latency["samples"]
    return {**scaled, "samples": [factor * one for one in samples]}


def _interval(speedup: float, side: float) -> dict[str, float]:
    low, high = (1 - side) * speedup, (1 + side) * speedup
    return {"p50": speedup, "low": low, "high": high, "confidence": 0.98}


def _comparison(name: str, speedup: float) -> dict[str, Any]:
    return {
        "variant": name,
        "baseline": "dense",
        "tpot_speedup": speedup,
        "prefill_speedup": speedup,
        "tpot_speedup_interval": _interval(speedup, 0.03),
        "prefill_speedup_interval": _interval(speedup, 0.05),
        "bound_tpot_speedup": 1.2 * speedup,
        "bound_prefill_speedup": 1.1 * speedup,
    }


MANY: dict[str, tuple[float, float, float]] = {
    "pruned": (1.21, 452, 0.081),
    "dense-int8": (1.62, 163, 0.012),
    "pruned-int8": (1.9, 138, 0.094),
    "dense-w8": (1.55, 163, 0.0021),
    "pruned-w8": (1.79, 139, 0.082),
    "dense-w4": (2.41, 93, 0.062),
    "pruned-w4": (2.72, 80, 0.14),
}
"""The dense model and a cut in four precisions."""
