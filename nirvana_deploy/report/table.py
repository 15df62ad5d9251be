"""Comparisons formatted for people, and the table of variants.

Small pure functions, shared by the report, the figures and the command line's closing summary. Numbers with
units are those of ``base/units.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nirvana_deploy.base.terminal import harmless
from nirvana_deploy.base.units import format_bytes, format_count, format_ms, format_number, format_share

TIMES = "\N{MULTIPLICATION SIGN}"
ABSENT = "\N{EM DASH}"
"""Table cell of an unmeasured value."""


def short(name: str, longest: int = 22) -> str:
    """A name as it fits into a figure or a title: at most ``longest`` characters, none of them a command."""
    name = harmless(name)
    return name if len(name) <= longest else f"{name[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"


def format_times(factor: float) -> str:
    """A factor: ``1.43×``."""
    return f"{format_number(factor)}{TIMES}"


def format_change(before: float, after: float) -> str:
    """The signed relative change: +4.0% or −31.6%; empty when ``before`` is zero."""
    if before == 0:
        return ""
    share = after / before - 1
    return f"{'+' if share >= 0 else ''}{format_share(share)}"


def format_faster(before: float, after: float) -> str:
    """Change of a latency: 1.43× faster, 1.05× slower."""
    if before <= 0 or after <= 0:
        return ""
    return (
        f"{format_times(before / after)} faster"
        if after <= before
        else f"{format_times(after / before)} slower"
    )


def text_bar(part: float, whole: float, *, width: int) -> str:
    """Bar of ``width`` characters: full blocks for ``part`` of ``whole``, light shade for the rest."""
    filled = round(width * part / whole) if whole else 0
    return "\N{FULL BLOCK}" * filled + "\N{LIGHT SHADE}" * (width - filled)


def median_of(variant: Mapping[str, Any], metric: str) -> float | None:
    """Median of a latency such as ``tpot_ms``; None if not measured."""
    summary = variant.get(metric)
    return summary.get("p50") if summary else None


def baseline_of(benchmark: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The variant that comparisons name as baseline, else the one called "dense"; None without either."""
    names = [comparison.get("baseline") for comparison in benchmark.get("comparisons") or ()]
    wanted = names[0] if names else "dense"
    return next((v for v in benchmark.get("variants") or () if v["name"] == wanted), None)


def challengers_of(benchmark: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Variants besides the baseline, in measured order."""
    baseline = baseline_of(benchmark)
    return [v for v in benchmark.get("variants") or () if baseline is None or v["name"] != baseline["name"]]


@dataclass(frozen=True)
class Table:
    """Headers and rows of strings, with one cell per header."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Measure:
    """One row of the summary: how to read, format and compare its value."""

    label: str
    read: Callable[[Mapping[str, Any]], float | None]
    write: Callable[[float], str]
    change: Callable[[float, float], str]
    speedup: str | None = None
    """Key of the comparison that holds the speed-up over paired rounds."""


def _quality(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda variant: (variant.get("quality") or {}).get(key)


def _of_bound(phase: str) -> Callable[[Mapping[str, Any]], float | None]:
    """The share of the bound on this machine that a phase reached."""
    return lambda variant: ((variant.get("roofline") or {}).get(phase) or {}).get("share_of_bound")


def _measures(prompt_tokens: int | None) -> tuple[_Measure, ...]:
    prompt = f"prompt of {prompt_tokens:,}" if prompt_tokens else "the prompt"
    return (
        _Measure("Parameters", lambda v: v.get("parameters"), format_count, format_change),
        _Measure("Weight file", lambda v: v.get("weights_bytes"), format_bytes, format_change),
        _Measure(
            "Decode, per token", lambda v: median_of(v, "tpot_ms"), format_ms, format_faster, "tpot_speedup"
        ),
        _Measure(
            "Decode, tokens per second", lambda v: v.get("decode_tokens_per_s"), format_number, format_change
        ),
        _Measure(
            "Decode, GB read per second", lambda v: v.get("achieved_gb_per_s"), format_number, format_change
        ),
        _Measure(
            f"Prefill, {prompt}",
            lambda v: median_of(v, "prefill_ms"),
            format_ms,
            format_faster,
            "prefill_speedup",
        ),
        _Measure(
            "Time to first token", lambda v: median_of(v, "ttft_ms"), format_ms, format_faster, "ttft_speedup"
        ),
        _Measure(
            "Decode on the GPU alone", lambda v: median_of(v, "decode_device_ms"), format_ms, format_faster
        ),
        _Measure("Decode, share of its bound here", _of_bound("decode"), format_share, lambda a, b: ""),
        _Measure("Prefill, share of its bound here", _of_bound("prefill"), format_share, lambda a, b: ""),
        _Measure("Peak memory (RSS)", lambda v: v.get("peak_rss_bytes"), format_bytes, format_change),
        _Measure("Peak device memory", lambda v: v.get("peak_device_bytes"), format_bytes, format_change),
        _Measure(
            "KV cache per token", lambda v: v.get("kv_cache_bytes_per_token"), format_bytes, format_change
        ),
        _Measure("Perplexity", _quality("perplexity"), format_number, lambda a, b: format_times(b / a)),
        _Measure("KL to dense, nats per token", _quality("kl_vs_dense"), format_number, lambda a, b: ""),
        _Measure("KL to its float model", _quality("kl_vs_parent"), format_number, lambda a, b: ""),
        _Measure("Same top token as dense", _quality("top1_agreement"), format_share, lambda a, b: ""),
    )


def summary_table(benchmark: Mapping[str, Any]) -> Table:
    """Compare the measured variants: the baseline, then each other variant with its change.

    ``benchmark`` is a parsed benchmark.json. Latencies are medians; a speed-up is the median over paired
    rounds, so it need not be the ratio of the cells beside it. With one variant the change has its own
    column, with several it stands in brackets. Rows without values are left out.
    """
    baseline, challengers = baseline_of(benchmark), challengers_of(benchmark)
    apart = baseline is not None and len(challengers) == 1
    headers = ["Measure", *([str(baseline["name"])] if baseline else [])]
    for variant in challengers:
        headers += [str(variant["name"]), *(["change"] if apart else [])]
    rows = []
    for measure in _measures((benchmark.get("workload") or {}).get("prompt_tokens")):
        before = measure.read(baseline) if baseline else None
        values = [measure.read(variant) for variant in challengers]
        if before is None and all(value is None for value in values):
            continue
        cells = [measure.label]
        if baseline:
            cells.append(ABSENT if before is None else measure.write(before))
        for variant, value in zip(challengers, values, strict=True):
            written = ABSENT if value is None else measure.write(value)
            change = _change(benchmark, variant, measure, before, value)
            if apart:
                cells += [written, change]
            else:
                cells.append(f"{written} ({change})" if change else written)
        rows.append(tuple(cells))
    return Table(headers=tuple(headers), rows=tuple(rows))


def _change(
    benchmark: Mapping[str, Any],
    variant: Mapping[str, Any],
    measure: _Measure,
    before: float | None,
    after: float | None,
) -> str:
    """Change of one measure; empty if either side is missing."""
    if before is None or after is None:
        return ""
    comparisons = benchmark.get("comparisons") or ()
    recorded: Mapping[str, Any] = next((c for c in comparisons if c.get("variant") == variant["name"]), {})
    if measure.speedup is not None and measure.speedup in recorded:
        return format_faster(recorded[measure.speedup], 1.0)
    return measure.change(before, after)


def quality_table(record: Mapping[str, Any]) -> Table:
    """Perplexity and KL of each model in a parsed quality.json."""
    rows = []
    for name, found in (record.get("variants") or {}).items():
        kl, error = found["kl_vs_dense"], found["kl_standard_error"] or 0
        written = "-" if kl is None else f"{kl:.3f} \N{PLUS-MINUS SIGN} {error:.3f}"
        rows.append((name, format_number(found["perplexity"]), written, f"{found['tokens']:,}"))
    return Table(("Variant", "Perplexity", "KL vs dense, nats", "Tokens"), tuple(rows))
