"""What the report says of quantized models and engines: what runs in integers, what was built for which GPUs.

Reads the manifest's stages and benchmark.json alone; opens no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nirvana_deploy.output.records import Records, complete
from nirvana_deploy.report.table import ABSENT, format_bytes, format_number, format_seconds

QUANTIZED_HEADERS = ("Scheme", "Linears in integer kernels", "Weight file", "KL to its float model")
ENGINE_HEADERS = ("Engine", "For", "Size", "Weights", "Fused attentions", "Built in", "GPUs")
_LOW_BIT_FILE = re.compile(r"[^\s/()]*\bI?Q[1-6]_\w*\.gguf", re.IGNORECASE)
_STAGE = "onnx-"
_ENGINE_STAGE = "engine-"


def quantized_rows(records: Records) -> tuple[tuple[str, ...], ...]:
    """One row for each quantized model of the folder; see QUANTIZED_HEADERS."""
    return tuple(
        (
            scheme,
            f"{coverage['found']:,} of {coverage['promised']:,}",
            format_bytes(result["weights_bytes"]),
            ABSENT if (kl := _kl_vs_parent(records, scheme)) is None else format_number(kl),
        )
        for scheme, result in _quantized(records)
        for coverage in (result["coverage"],)
    )


def engine_rows(records: Records) -> tuple[tuple[str, ...], ...]:
    """One row for each engine of the folder; see ENGINE_HEADERS."""
    rows = []
    for name, stage in ((records.manifest or {}).get("stages") or {}).items():
        if not name.startswith(_ENGINE_STAGE):
            continue
        with complete(f"manifest.json: the result of stage {name!r}"):
            rows += [
                (
                    f"{engine['name']} ({engine['dtype']}, cache {engine['kv']})",
                    engine["runtime"],
                    format_bytes(engine["engine_bytes"]),
                    format_bytes(engine["weights_bytes"]),
                    f"{engine['fused_attentions']:,}",
                    format_seconds(engine["build_seconds"]),
                    ", ".join(engine["targets"]),
                )
                for engine in stage["result"]["engines"]
            ]
    return tuple(rows)


def quantization_caution(records: Records) -> str | None:
    """Which quantized models do not run as promised; None when all do."""
    broken = [
        f"{scheme}: {result['problem']}" for scheme, result in _quantized(records) if not result["passed"]
    ]
    return f"Quantization did not hold its promise. {' '.join(broken)}" if broken else None


def low_bit_source_caution(records: Records) -> str | None:
    """That w4 was measured on weights which were low-bit before; None where they were not."""
    origin = str(((records.manifest or {}).get("model") or {}).get("origin") or "")
    file = _LOW_BIT_FILE.search(origin)
    if file is None or "w4" not in (scheme for scheme, _ in _quantized(records)):
        return None
    return (
        f"The loss of w4 says little about other models: these weights came from {file[0]}, so they lay on "
        "the grid of a few bits before they were rounded here."
    )


def _quantized(records: Records) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, stage in ((records.manifest or {}).get("stages") or {}).items():
        result = stage.get("result") or {}
        if name.startswith(_STAGE) and "scheme" in result:
            with complete(f"manifest.json: the result of stage {name!r}"):
                yield str(result["scheme"]), result


def _kl_vs_parent(records: Records, scheme: str) -> float | None:
    """As the quality stage measured it, or as benchmark.json has it."""
    measured = (records.stage("quality").get("result") or {}).get("variants") or {}
    of_benchmark = {v["name"]: v.get("quality") for v in (records.benchmark or {}).get("variants") or ()}
    for name, quality in {**of_benchmark, **measured}.items():
        if str(name).endswith(f"-{scheme}"):
            value: float | None = (quality or {}).get("kl_vs_parent")
            return value
    return None
