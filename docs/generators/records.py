"""``:::{recorded} kl``: tables of recorded numbers, from the same records as benchmarks/README.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from nirvana_deploy.report.table import format_bytes, format_ms, format_share, format_times

from .markdown import Generated, table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SEARCH = "search-smollm2-best.json"
BENCHMARK = "smollm2-s0.4.benchmark.json"
RECIPES = "recipes.jsonl"
AGREEMENT = {"SmolLM2 at 0.4": BENCHMARK, "Gemma 3 270M at 0.2": "gemma3-270m-s0.2.benchmark.json"}


def record(name: str) -> Any:
    """A record of benchmarks/results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def recorded_points() -> list[dict[str, Any]]:
    """The points of the recorded search whose KL is known."""
    return [one for one in record(SEARCH)["points"] if one["kl"] is not None]


def _kl() -> str:
    points = sorted(recorded_points(), key=lambda one: one["kl"])
    rows = [
        (
            f"`{one['name']}`",
            f"{one['kl']:.3f} ± {one['kl_standard_error']:.3f}",
            f"{math.exp(one['kl']):.2f}",
            format_times(one["perplexity_ratio"]),
            format_bytes(one["weights_bytes"]),
        )
        for one in points
    ]
    return table(["Model", "KL, nats per token", "e^KL", "Perplexity, times dense's", "Weight file"], rows)


def _agreement() -> str:
    rows = [
        (
            f"{model}, `{one['name']}`",
            f"{one['quality']['kl_vs_dense']:.3f}",
            format_share(one["quality"]["top1_agreement"]),
        )
        for model, name in AGREEMENT.items()
        for one in record(name)["variants"]
        if one["name"] != "dense"
    ]
    return table(["Model", "KL, nats per token", "Same top token as dense"], rows)


def _texts() -> str:
    lines = (RESULTS / RECIPES).read_text(encoding="utf-8").splitlines()
    found = next(one for one in map(json.loads, lines) if (one["recipe"], one["sparsity"]) == ("best", 0.2))
    rows = [
        (
            name,
            f"{one['kl']:.3f} ± {one['kl_standard_error']:.3f}",
            format_times(one["perplexity"] / one["dense_perplexity"]),
        )
        for name, one in found["texts"].items()
    ]
    headers = [f"Text; calibrated on {found['calib']}", "KL, nats per token", "Perplexity, times dense's"]
    return table(headers, rows)


def _bounds() -> str:
    found = record(BENCHMARK)
    compared = {one["variant"]: one for one in found["comparisons"]}
    rows = []
    for one in found["variants"]:
        against = compared.get(one["name"], {})
        flops = one.get("prefill_flops")
        rows.append(
            (
                f"`{one['name']}`",
                format_bytes(one["decode_bytes_per_step"]),
                format_ms(one["tpot_ms"]["p50"]),
                *_reached(against, "tpot"),
                f"{flops / 1e9:.1f} G" if flops and one["float_arithmetic"] else "—",
                format_ms(one["prefill_ms"]["p50"]),
                *_reached(against, "prefill"),
            )
        )
    headers = ["Model", "Bytes per token", "Decode, per token", "Bound", "Reached"]
    return table([*headers, "Operations", "Prefill", "Bound", "Reached"], rows)


def _reached(against: dict[str, Any], kind: str) -> tuple[str, str]:
    bound, share = against.get(f"bound_{kind}_speedup"), against.get(f"{kind}_share_of_bound")
    return (format_times(bound) if bound else "—", format_share(share) if share else "—")


_TABLES: dict[str, Callable[[], str]] = {
    "agreement": _agreement,
    "bounds": _bounds,
    "kl": _kl,
    "texts": _texts,
}


class Recorded(Generated):
    """One table."""

    def made(self, *arguments: str) -> str:
        """The table that the argument names."""
        (name,) = arguments
        if name not in _TABLES:
            raise ExtensionError(f"There is no table {name!r}; there are {', '.join(_TABLES)}.")
        return _TABLES[name]()


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("recorded", Recorded)
    return {"parallel_read_safe": True}
