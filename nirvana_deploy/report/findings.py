"""Headline numbers, cautions and gaps of a report.

Pure functions from parsed records to small values that both templates render. A caution is part of the
headline: speed and its cost stand on the same screen.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from nirvana_deploy.base.units import format_count, format_ms, format_number, format_share
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import RECIPE_FILE
from nirvana_deploy.output.records import Records, model_name, verifications
from nirvana_deploy.output.variants import DENSE
from nirvana_deploy.report.pages.deployed import (
    kept_promises,
    low_bit_source_caution,
    quantization_caution,
)
from nirvana_deploy.report.table import (
    Gain,
    Metric,
    baseline_of,
    challengers_of,
    format_times,
    gain,
    median_of,
    short,
)

_LONGEST_TITLE = 60
"""Characters of a model's name; Details has the whole of it."""
PERPLEXITY_ALARM = 1.5
"""Perplexity ratio to dense above which the report warns."""
BOUND_SHARE_ALARM = 0.9
"""Share of its bound below which a speed-up gets a caution."""


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
    broken = [name for name, kept in kept_promises(records) if not kept]
    text = "Verified against torch" + (f", but not {', '.join(broken)}" if broken else "")
    if failed:
        text = f"Verification failed: {', '.join([*failed, *broken])}"
    return Badge("failed" if failed or broken else "passed", text, ", ".join(parts))


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
    False: "That counts bytes read. As weights shrink, what reads none of them (attention, norms, "
    "rounding activations, starting each operator) becomes most of the time.",
}
"""The usual reason, by whether the variant computes in float."""


def _speed_cautions(benchmark: Mapping[str, Any], what: str, metric: Metric) -> Iterator[str]:
    """At most two sentences: on models that compute in float, and on those that do not."""
    gains = [(variant, gain(benchmark, variant, metric)) for variant in challengers_of(benchmark)]
    for in_float, reason in _SHORT_OF_BOUND.items():
        short = {
            str(variant["name"]): speed
            for variant, speed in gains
            if variant.get("float_arithmetic", True) == in_float and speed and _is_short(speed)
        }
        shares = {name: format_share(speed.share_of_bound or 0.0) for name, speed in short.items()}
        if len(short) == 1:
            ((name, speed),) = short.items()
            possible = f"{format_times(speed.speedup)} where {format_times(speed.bound or 0.0)} is possible"
            yield f"{what} of {name} reached {shares[name]} of the possible speed-up: {possible}. {reason}"
        elif short:
            found = ", ".join(f"{name} {share}" for name, share in shares.items())
            alarm = f"{BOUND_SHARE_ALARM:.0%} of the possible speed-up over dense"
            yield f"{what} stayed below {alarm}: {found}. {reason}"


def _is_short(speed: Gain) -> bool:
    return speed.share_of_bound is not None and speed.share_of_bound < BOUND_SHARE_ALARM


def cautions(records: Records) -> tuple[str, ...]:
    """Return the caveats to the headline, if any: broken promises first, the others by length."""
    benchmark = records.benchmark or {}
    found = [
        _worth_caution(benchmark),
        _quality_caution(benchmark),
        low_bit_source_caution(records),
        *_speed_cautions(benchmark, "Decode", "tpot"),
        *_speed_cautions(benchmark, "Prefill", "prefill"),
    ]
    broken = [_verification_caution(records), quantization_caution(records)]
    return tuple(one for one in (*broken, *sorted(filter(None, found), key=len)) if one)


def machine_cautions(records: Records) -> tuple[str, ...]:
    """What makes the timings doubtful: a busy or drifting machine, too few rounds, a model that failed."""
    benchmark = records.benchmark or {}
    watched = (benchmark.get("watch") or {}).get("cautions") or ()
    return (*watched, *failed(benchmark))


def failed(timed: Mapping[str, Any]) -> Iterator[str]:
    """A sentence on each model of a benchmark or workload that could not be timed."""
    for one in timed.get("failed") or ():
        yield f"{one['name']} was not timed: {one['reason'].strip().splitlines()[0]}"


@dataclass(frozen=True)
class Gap:
    """A missing part of the report: the reason, and the command that makes it."""

    what: str
    command: str


def gaps(records: Records) -> tuple[Gap, ...]:
    """Return the missing parts; their commands run inside the output folder."""
    options = (records.manifest or {}).get("options") or {}
    benchmark = records.benchmark
    again = _again(records)
    if (last := unfinished(records)) is not None:
        return (Gap(f"The job is not finished: {last}.", again),)
    found = []
    if records.plan is None:
        found.append(Gap("What was removed: plan.json is not here.", again))
    if records.manifest is None:
        found.append(Gap("Origin and time of each stage: manifest.json is not here.", again))
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
                again if records.manifest is None else f"{again} --baseline",
            )
        )
    judged = any(variant.get("quality") for variant in (benchmark or {}).get("variants") or ())
    if not judged and stage.QUALITY not in records.stages():
        found.append(Gap("Quality: perplexity and KL were not measured.", "nirvana-deploy evaluate ."))
    return tuple(found)


def _again(records: Records) -> str:
    """The command that goes on with the job, from where it was typed, since its recipe's paths hold there."""
    if records.manifest is None:
        return "nirvana-deploy prune-export MODEL --sparsity 0.4 --out DIR"
    out = PurePosixPath(records.manifest.get("out") or "OUT")
    where = "/".join([".."] * len(out.parts)) if "out" in records.manifest else "WHERE_IT_BEGAN"
    recipe, folder = shlex.quote(f"{out}/{RECIPE_FILE}"), shlex.quote(f"{out}")
    return f"cd {where} && nirvana-deploy prune-export --recipe {recipe} --resume --out {folder}"


def unfinished(records: Records) -> str | None:
    """How far a job came that was killed, has failed or still runs; None for a finished one.

    A job that has measured all it was to measure is finished but for its report.
    """
    manifest = records.manifest or {}
    if manifest.get("complete") is not False:
        return None
    wanted = [stage.ONNX]
    if (manifest.get("options") or {}).get("benchmark") is not False:
        wanted.append(stage.BENCHMARK)
    if all(records.stage(one) for one in wanted):
        return None
    made = [one for one in records.stages() if one != stage.REPORT]
    return f"its last stage is {made[-1]}" if made else "none of its stages is"


def title(records: Records) -> str:
    """Title of the report: the model and the share removed."""
    name = short(model_name(records) or "Unnamed model", _LONGEST_TITLE)
    share = ((records.plan or {}).get("budget") or {}).get("met_removed_share")
    return f"{name} pruned by {share:.0%}" if share is not None else name
