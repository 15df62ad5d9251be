"""Headline numbers, cautions and gaps of a report.

Pure functions from parsed records to small values that both templates render. A caution is part of the
headline: speed and its cost stand on the same screen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nirvana_deploy.base.units import format_count, format_ms, format_number, format_share
from nirvana_deploy.output import stage
from nirvana_deploy.output.records import Records, model_name, verifications
from nirvana_deploy.output.variants import DENSE
from nirvana_deploy.report.pages.deployed import low_bit_source_caution, quantization_caution
from nirvana_deploy.report.table import baseline_of, challengers_of, format_times, median_of

PERPLEXITY_ALARM = 1.5
"""Perplexity ratio to dense above which the report warns."""
BOUND_SHARE_ALARM = 0.9
"""Share of its bound below which a speed-up gets a caution."""


@dataclass(frozen=True)
class Gain:
    """Median latency of a variant relative to the baseline."""

    before_ms: float
    after_ms: float
    speedup: float
    bound: float | None
    """Speed-up allowed by fewer bytes (decode) or operations (prefill); None if not recorded."""

    @property
    def share_of_bound(self) -> float | None:
        """Speed-up as a share of its bound."""
        return self.speedup / self.bound if self.bound else None


def gain(
    benchmark: Mapping[str, Any], variant: Mapping[str, Any], metric: Literal["tpot", "prefill"]
) -> Gain | None:
    """Speed-up of ``variant`` over the baseline; None if either wasn't measured."""
    baseline = baseline_of(benchmark)
    before, after = (median_of(v, f"{metric}_ms") if v else None for v in (baseline, variant))
    if not before or not after:
        return None
    comparisons = benchmark.get("comparisons") or ()
    recorded: Mapping[str, Any] = next((c for c in comparisons if c.get("variant") == variant["name"]), {})
    return Gain(
        before_ms=before,
        after_ms=after,
        speedup=recorded.get(f"{metric}_speedup") or before / after,
        bound=recorded.get(f"bound_{metric}_speedup"),
    )


@dataclass(frozen=True)
class Badge:
    """Whether the exports equal the models they were made from."""

    state: Literal["passed", "failed", "absent"]
    text: str
    detail: str


def verification_badge(records: Records) -> Badge:
    """Verification of all models in one line."""
    found = verifications(records)
    if not found:
        return Badge("absent", "Not verified", "The exported files were not compared with the torch model.")
    failed = [v.model for v in found if not v.passed]
    largest = max((v.max_abs_diff for v in found if v.max_abs_diff is not None), default=None)
    parts = [f"{sum(v.num_checks for v in found)} checks of {' and '.join(v.model for v in found)}"]
    if largest is not None:
        parts.append(f"largest logit difference {format_number(largest, digits=2)}")
    compared = [v.greedy_equal for v in found if v.greedy_equal is not None]
    if compared:
        parts.append("greedy tokens equal" if all(compared) else "greedy tokens differ")
    text = f"Verification failed: {', '.join(failed)}" if failed else "Verified against torch"
    return Badge("failed" if failed else "passed", text, ", ".join(parts))


def headline(records: Records) -> str:
    """One sentence: which model, and what was taken out of it."""
    budget = (records.plan or {}).get("budget")
    if not budget:
        return "What was removed is not recorded here."
    neurons = budget.get("removed_neurons_after_rounding", budget["removed_neurons"])
    return (
        f"{budget['removed_groups']:,} of {budget['of_groups']:,} KV groups and {neurons:,} of "
        f"{budget['of_neurons']:,} FFN neurons were removed: {format_count(budget['parameters_dense'])} "
        f"parameters became {format_count(budget['parameters_kept'])}."
    )


def _verification_caution(records: Records) -> str | None:
    failed = [
        f"{v.model} (first at: {v.first_departure})" if v.first_departure else v.model
        for v in verifications(records)
        if not v.passed
    ]
    if not failed:
        return None
    return (
        f"Verification failed for {' and '.join(failed)}: the exported files do not compute what the "
        "checkpoint computes. Do not deploy them."
    )


def _quality_caution(benchmark: Mapping[str, Any]) -> str | None:
    before = ((baseline_of(benchmark) or {}).get("quality") or {}).get("perplexity")
    if not before:
        return None
    rises = {v["name"]: (v.get("quality") or {}).get("perplexity") for v in challengers_of(benchmark)}
    dropped = [
        f"{format_number(after)} in {name} ({format_times(after / before)})"
        for name, after in rises.items()
        if after and after > PERPLEXITY_ALARM * before
    ]
    if not dropped:
        return None
    return (
        f"Quality dropped: perplexity was {format_number(before)} and became {', '.join(dropped)}. "
        "Remove less, or train further, before relying on the result."
    )


def _worth_caution(benchmark: Mapping[str, Any]) -> str | None:
    """Where quantizing the dense model is the better trade: as fast, and nearer to it."""
    beaten: dict[str, list[str]] = {}
    trades = {v["name"]: trade for v in challengers_of(benchmark) if (trade := _trade(v)) is not None}
    alone = {name: trade for name, trade in trades.items() if str(name).startswith(f"{DENSE}-")}
    for name, (tpot_ms, kl) in trades.items():
        if name not in alone:
            better = [one for one, (ms, its_kl) in alone.items() if ms <= tpot_ms and its_kl <= kl]
            if better:
                beaten.setdefault(min(better, key=lambda one: alone[one]), []).append(str(name))
    if not beaten:
        return None
    sentences = [
        f"{name} is as fast as {' and '.join(others)} or faster ({format_ms(alone[name][0])} a token), and "
        f"nearer to the dense model (KL {format_number(alone[name][1])})"
        for name, others in beaten.items()
    ]
    return f"Quantization alone is the better trade here: {'; '.join(sentences)}."


def _trade(variant: Mapping[str, Any]) -> tuple[float, float] | None:
    """Median decode time in ms and KL to dense; None if either was not measured."""
    tpot_ms, kl = median_of(variant, "tpot_ms"), (variant.get("quality") or {}).get("kl_vs_dense")
    return None if tpot_ms is None or kl is None else (tpot_ms, kl)


_SHORT_OF_BOUND = {
    True: "Usual reasons: a busy machine, or time spent outside the weights.",
    False: "The bound counts bytes read. As weights shrink, what reads none of them (attention, norms, "
    "rounding activations, starting each operator) becomes most of the time.",
}
"""The usual reason, by whether the variant computes in float."""


def _speed_caution(what: str, name: str, speed: Gain | None, *, in_float: bool) -> str | None:
    if speed is None or not speed.bound or speed.speedup >= BOUND_SHARE_ALARM * speed.bound:
        return None
    return (
        f"{what} of {name} reached {format_share(speed.speedup / speed.bound)} of its bound: "
        f"{format_times(speed.speedup)} where {format_times(speed.bound)} is possible. "
        f"{_SHORT_OF_BOUND[in_float]}"
    )


def cautions(records: Records) -> tuple[str, ...]:
    """Return the caveats to the headline, if any: broken promises, then the others, the shortest first."""
    benchmark = records.benchmark or {}
    found = [
        _worth_caution(benchmark),
        _quality_caution(benchmark),
        low_bit_source_caution(records),
    ]
    for variant in challengers_of(benchmark):
        name = str(variant["name"])
        in_float = variant.get("float_arithmetic", True)
        decode, prefill = (gain(benchmark, variant, "tpot"), gain(benchmark, variant, "prefill"))
        found.append(_speed_caution("Decode", name, decode, in_float=in_float))
        found.append(_speed_caution("Prefill", name, prefill, in_float=in_float))
    broken = [_verification_caution(records), quantization_caution(records)]
    return tuple(one for one in (*broken, *sorted(filter(None, found), key=len)) if one)


@dataclass(frozen=True)
class Gap:
    """A missing part of the report: the reason, and the command that makes it."""

    what: str
    command: str


def gaps(records: Records) -> tuple[Gap, ...]:
    """Return the missing parts; their commands run inside the output folder."""
    options = (records.manifest or {}).get("options") or {}
    benchmark = records.benchmark
    found = []
    if records.plan is None:
        found.append(
            Gap("What was removed: plan.json is not here.", "nirvana-deploy prune-export MODEL --out .")
        )
    if records.manifest is None:
        found.append(
            Gap(
                "Origin and time of each stage: manifest.json is not here.",
                "nirvana-deploy prune-export MODEL --out .",
            )
        )
    if not verifications(records):
        found.append(Gap("Verification: it has not run.", "nirvana-deploy verify ."))
    if benchmark is None:
        asked = " (--no-benchmark was given)" if options.get("benchmark") is False else ""
        found.append(Gap(f"Speed and memory: not measured{asked}.", "nirvana-deploy benchmark ."))
    elif baseline_of(benchmark) is None:
        asked = " (--no-baseline was given)" if options.get("baseline") is False else ""
        found.append(
            Gap(
                f"Speed-ups: the dense baseline was not measured{asked}.",
                "nirvana-deploy prune-export MODEL --baseline --resume --out .",
            )
        )
    judged = any(variant.get("quality") for variant in (benchmark or {}).get("variants") or ())
    if not judged and stage.QUALITY not in records.stages():
        found.append(Gap("Quality: perplexity and KL were not measured.", "nirvana-deploy evaluate ."))
    return tuple(found)


def title(records: Records) -> str:
    """Title of the report: the model and the share removed."""
    name = model_name(records) or "Unnamed model"
    share = ((records.plan or {}).get("budget") or {}).get("met_removed_share")
    return f"{name} pruned by {share:.0%}" if share is not None else name
