"""What the report says of quantized models: how many linears run in integers, what it saved and cost.

Reads the manifest's stages and benchmark.json alone; opens no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nirvana_deploy.measure.inspection import Records, complete
from nirvana_deploy.measure.table import ABSENT, format_bytes, format_number

QUANTIZED_HEADERS = ("Scheme", "Linears in integer kernels", "Weight file", "KL to its float model")
_STAGE = "onnx-"


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


def quantization_caution(records: Records) -> str | None:
    """Which quantized models do not run as promised; None when all do."""
    broken = [
        f"{scheme}: {result['problem']}" for scheme, result in _quantized(records) if not result["passed"]
    ]
    return f"Quantization did not hold its promise. {' '.join(broken)}" if broken else None


def _quantized(records: Records) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, stage in ((records.manifest or {}).get("stages") or {}).items():
        result = stage.get("result") or {}
        if name.startswith(_STAGE) and "scheme" in result:
            with complete(f"manifest.json: the result of stage {name!r}"):
                yield str(result["scheme"]), result


def _kl_vs_parent(records: Records, scheme: str) -> float | None:
    for variant in (records.benchmark or {}).get("variants") or ():
        if str(variant["name"]).endswith(f"-{scheme}"):
            value: float | None = (variant.get("quality") or {}).get("kl_vs_parent")
            return value
    return None
