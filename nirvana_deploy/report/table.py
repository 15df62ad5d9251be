"""Comparisons formatted for people, and the table of variants.

Small pure functions, shared by the report, the figures and the command line's closing summary. Numbers with
units are those of ``base/units.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from nirvana_deploy.base.terminal import harmless
from nirvana_deploy.base.units import format_bytes, format_count, format_ms, format_number, format_share
from nirvana_deploy.measure.rounds.ratios import CONFIDENCE, ratio_of

NO_DIFFERENCE = "no difference shown"
"""Of a ratio whose interval holds 1, or that too few rounds were measured for."""
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


Metric = Literal["tpot", "prefill", "ttft"]


@dataclass(frozen=True)
class Gain:
    """Latency of a variant relative to the baseline."""

    before_ms: float
    after_ms: float
    speedup: float
    """The median of the ratios within each round."""
    bound: float | None
    """Speed-up allowed by fewer bytes (decode) or operations (prefill); None if not recorded."""
    interval: tuple[float, float] | None = None
    """Where the true median is (``measure/rounds/ratios.py``); None where the rounds are not known."""
    confidence: float = 0.0
    """Of ``interval``."""

    @property
    def shows_difference(self) -> bool:
        """Whether 1 is not in the interval, which enough rounds gave."""
        if self.interval is None or self.confidence < CONFIDENCE:
            return False
        return not self.interval[0] <= 1 <= self.interval[1]

    @property
    def share_of_bound(self) -> float | None:
        """Speed-up as a share of its bound."""
        return self.speedup / self.bound if self.bound else None

    @property
    def of_bytes(self) -> Gain | None:
        """The same of bytes read per second: fewer of them in less time; None without a bound."""
        if not self.bound:
            return None
        between = self.interval and (self.interval[0] / self.bound, self.interval[1] / self.bound)
        return replace(self, speedup=self.speedup / self.bound, interval=between)


def gain(benchmark: Mapping[str, Any], variant: Mapping[str, Any], metric: Metric) -> Gain | None:
    """Speed-up of ``variant`` over the baseline; None if either wasn't measured.

    As recorded; else from the rounds of both, and where these are gone the ratio of medians.
    """
    comparisons = benchmark.get("comparisons") or ()
    recorded: Mapping[str, Any] = next((c for c in comparisons if c.get("variant") == variant["name"]), {})
    baseline = baseline_of(benchmark)
    before, after = (median_of(v, f"{metric}_ms") if v else None for v in (baseline, variant))
    if baseline is None or not before or not after:
        return None
    found = recorded.get(f"{metric}_speedup_interval") or _of_rounds(baseline, variant, f"{metric}_ms")
    return Gain(
        before_ms=before,
        after_ms=after,
        speedup=recorded.get(f"{metric}_speedup") or (found["p50"] if found else before / after),
        bound=recorded.get(f"bound_{metric}_speedup"),
        interval=(found["low"], found["high"]) if found else None,
        confidence=found["confidence"] if found else 0.0,
    )


def _of_rounds(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> dict[str, float] | None:
    """The ratio of two models whose rounds pair."""
    samples = [one[key].get("samples") or () for one in (before, after)]
    if not samples[0] or len(samples[0]) != len(samples[1]) or min(map(min, samples)) <= 0:
        return None
    return asdict(ratio_of(*samples))


@dataclass(frozen=True)
class Table:
    """Headers and rows of strings, with one cell per header."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _faster(one: Gain) -> str:
    """Change of a latency over paired rounds, and where the true one is: 1.43 times faster, 1.41 to 1.45."""
    if not one.shows_difference:
        return f"{NO_DIFFERENCE}{_between(one.interval)}"
    low, high = one.interval or (0.0, 0.0)
    said = format_faster(one.speedup, 1.0)
    return f"{said}{_between((low, high) if one.speedup >= 1 else (1 / high, 1 / low))}"


def _between(interval: tuple[float, float] | None) -> str:
    if interval is None or interval[0] == interval[1]:
        return ""
    return f", {format_number(interval[0])} to {format_number(interval[1])}"


def _more(one: Gain) -> str:
    """Change of a rate over paired rounds."""
    return format_change(1.0, one.speedup) if one.shows_difference else NO_DIFFERENCE


@dataclass(frozen=True)
class _Measure:
    """One row of the summary: how to read, format and compare its value."""

    label: str
    read: Callable[[Mapping[str, Any]], float | None]
    write: Callable[[float], str]
    change: Callable[[float, float], str]
    metric: Metric | None = None
    """The latency whose ratio over paired rounds is the change, in the place of the cells'."""
    write_gain: Callable[[Gain], str] = _faster


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
        _Measure("Decode, per token", lambda v: median_of(v, "tpot_ms"), format_ms, format_faster, "tpot"),
        _Measure(
            "Decode, tokens per second",
            lambda v: v.get("decode_tokens_per_s"),
            format_number,
            format_change,
            "tpot",
            _more,
        ),
        _Measure(
            "Decode, GB read per second",
            lambda v: v.get("achieved_gb_per_s"),
            format_number,
            format_change,
            "tpot",
            lambda one: "" if one.of_bytes is None else _more(one.of_bytes),
        ),
        _Measure(
            f"Prefill, {prompt}",
            lambda v: median_of(v, "prefill_ms"),
            format_ms,
            format_faster,
            "prefill",
        ),
        _Measure("Time to first token", lambda v: median_of(v, "ttft_ms"), format_ms, format_faster, "ttft"),
        _Measure(
            "Decode on the GPU alone", lambda v: median_of(v, "decode_device_ms"), format_ms, lambda a, b: ""
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

    ``benchmark`` is a parsed benchmark.json. Latencies are medians; a change of speed is the median over
    paired rounds with its interval, so it need not be the ratio of the cells beside it. With one variant
    the change has its own column, with several it stands in brackets. Rows without values are left out.
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
    found = None if measure.metric is None else gain(benchmark, variant, measure.metric)
    return measure.change(before, after) if found is None else measure.write_gain(found)


def quality_table(record: Mapping[str, Any]) -> Table:
    """Perplexity and KL of each model in a parsed quality.json."""
    rows = []
    for name, found in (record.get("variants") or {}).items():
        kl, error = found["kl_vs_dense"], found["kl_standard_error"] or 0
        written = "-" if kl is None else f"{kl:.3f} \N{PLUS-MINUS SIGN} {error:.3f}"
        rows.append((name, format_number(found["perplexity"]), written, f"{found['tokens']:,}"))
    return Table(("Variant", "Perplexity", "KL vs dense, nats", "Tokens"), tuple(rows))
