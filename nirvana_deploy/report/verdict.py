"""The verdict: ship a model, ship it with care, or do not.

The rules stand in the map, nirvana_deploy/README.md. Of the models of the best level the fastest is
recommended; of equally fast ones the smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from nirvana_deploy.base.units import format_bytes, format_number
from nirvana_deploy.measure.gate import perplexity_ratios
from nirvana_deploy.output import stage
from nirvana_deploy.output.record_kinds import Quality, TasksRecord
from nirvana_deploy.output.records import Records, verifications
from nirvana_deploy.output.results import AnswersWritten, QualityMeasured
from nirvana_deploy.output.variants import DENSE, PRUNED
from nirvana_deploy.report.findings import unfinished
from nirvana_deploy.report.pages.deployed import kept_promises
from nirvana_deploy.report.pages.quality import repeats
from nirvana_deploy.report.table import Gain, baseline_of, challengers_of, format_times, gain

SHIP_RATIO, CARE_RATIO = 1.1, 1.3
"""Perplexity in times of dense's, on the worst kind of text."""
SHIP_KL, CARE_KL = 0.1, 0.3
"""Nats per token."""
SHIP_POINTS, CARE_POINTS = 1.0, 3.0
"""Of mean accuracy below dense."""
_SMALLER = 0.95
"""Share of dense's bytes at which a model counts as smaller."""
_LOOPS = 2
"""Answers that repeat themselves, beyond dense's."""

Level = Literal["ship", "care", "no", "open"]
_ORDER: tuple[Level, ...] = ("ship", "care", "no", "open")


@dataclass(frozen=True)
class Judged:
    """One model under the rules."""

    name: str
    level: Level
    facts: tuple[str, ...]
    """What it gains and what it costs."""
    against: tuple[str, ...]
    """What keeps it from a better level, or what is not known."""
    speedup: float
    size: float
    """Bytes."""
    ratio: float


@dataclass(frozen=True)
class Verdict:
    """What to do with the models of a folder."""

    level: Level
    recommended: str | None
    title: str
    why: str


def verdict(records: Records) -> Verdict:
    """Apply the rules to all models that were measured."""
    found = judged(records)
    best = best_of(found)
    if best is None:
        return Verdict("open", None, "No verdict", _unknown(records, found))
    if best.level == "no":
        why = f"The best of them, {best.name}: {'; '.join(best.against)}."
        return Verdict(best.level, None, "Do not ship", f"{why} {_instead(found)}".rstrip())
    title = f"Ship {best.name}" + (", with care" if best.level == "care" else "")
    why = f"{best.name} is {reasons(best)}"
    if best.name.startswith(DENSE) and any(one.name.startswith(PRUNED) for one in found):
        why += " Quantization alone is the better trade here: no cut gains more at this quality."
    return Verdict(best.level, best.name, title, why)


def judged(records: Records) -> tuple[Judged, ...]:
    """Every model beside the dense one under the rules; none without a dense one."""
    benchmark = records.benchmark or {}
    baseline = baseline_of(benchmark)
    if baseline is None:
        return ()
    return tuple(_judge(records, baseline, variant) for variant in challengers_of(benchmark))


def best_of(found: Sequence[Judged]) -> Judged | None:
    """Of the best level the fastest, then the smallest; of those that do not ship the nearest to dense.

    None if the quality of none was measured.
    """
    level = min((one.level for one in found), key=_ORDER.index, default="open")
    if level == "open":
        return None
    of_level = [one for one in found if one.level == level]
    if level == "no":
        return min(of_level, key=lambda one: one.ratio)
    return max(of_level, key=lambda one: (one.speedup, -one.size))


def reasons(one: Judged) -> str:
    """What it gains and costs, and what it needs care for, as the end of a sentence."""
    care = f" Care: {'; '.join(one.against)}." if one.level == "care" else ""
    return f"{', '.join(one.facts)}.{care}"


def _unknown(records: Records, found: Sequence[Judged]) -> str:
    """Why there is no verdict."""
    if (last := unfinished(records)) is not None:
        return f"The job is not finished: {last}."
    if records.benchmark is None:
        return "Speed and size were not measured."
    if baseline_of(records.benchmark) is None:
        return "The dense model was not measured, and the rules are about what a model loses against it."
    if not found:
        return "Nothing was measured beside the dense model."
    return "; ".join(f"{one.name}: {', '.join(one.against)}" for one in found) + "."


def _instead(found: Sequence[Judged]) -> str:
    if all(one.name.startswith(DENSE) for one in found):
        return ""
    return "Remove less, or train it: nirvana-deploy recover OUT --minutes 30."


def _judge(records: Records, baseline: Mapping[str, Any], variant: Mapping[str, Any]) -> Judged:
    name = str(variant["name"])
    facts: list[str] = []
    care: list[str] = []
    no: list[str] = []
    decode = gain(records.benchmark or {}, variant, "tpot")
    speedup = decode.speedup if decode else 0.0
    size, dense_size = variant.get("weights_bytes"), baseline.get("weights_bytes")
    if decode:
        facts.append(_speed_said(decode))
    if size and dense_size:
        facts.append(f"{format_bytes(size)} instead of {format_bytes(dense_size)}")
    faster = decode is not None and speedup > 1 and decode.shows_difference
    smaller = bool(size and dense_size and size <= _SMALLER * dense_size)
    if not faster and not smaller:
        no.append("neither faster nor smaller than dense")
    kind, ratio, kl = _quality(records, variant, baseline)
    if ratio is None or kl is None:
        return Judged(name, "open", tuple(facts), ("quality was not measured",), speedup, size or 0, 0.0)
    _add(ratio > CARE_RATIO, ratio > SHIP_RATIO, no, care, f"{_times(ratio)} dense's perplexity on {kind}")
    _add(kl > CARE_KL, kl > SHIP_KL, no, care, f"KL to dense {format_number(kl)}")
    facts.append(f"at most {_times(ratio)} dense's perplexity ({kind}), KL {format_number(kl)}")
    if (points := _points_below(records, name)) is not None:
        said = f"{points:.1f} points of mean accuracy below dense"
        _add(points > CARE_POINTS, points > SHIP_POINTS, no, care, said)
        facts.append(said if points > 0 else "as accurate as dense on tasks")
    verified = _verified(records, name)
    if verified is False:
        no.append("its files do not compute what they should")
    elif verified is None:
        care.append("it was not verified")
    loops = _loops(records, name)
    if loops >= _LOOPS:
        care.append(f"it repeats itself on {loops} more prompts than dense")
    level: Level = "no" if no else "care" if care else "ship"
    return Judged(name, level, tuple(facts), tuple(no or care), speedup, size or 0, ratio)


def _add(is_no: bool, is_care: bool, no: list[str], care: list[str], said: str) -> None:
    if is_no:
        no.append(said)
    elif is_care:
        care.append(said)


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times"


def _speed_said(decode: Gain) -> str:
    low, high = decode.interval or (None, None)
    between = f" ({format_times(low)} to {format_times(high)})" if low and high else ""
    if not decode.shows_difference:
        return f"no difference in speed shown{between}"
    return f"{format_times(decode.speedup)} as fast as dense{between}"


def _quality(
    records: Records, variant: Mapping[str, Any], baseline: Mapping[str, Any]
) -> tuple[str, float | None, float | None]:
    """(the kind of text where it is worst, perplexity in times of dense's there, KL over all)."""
    record = records.result(stage.QUALITY, QualityMeasured)
    name = str(variant["name"])
    found, dense = (cast(Quality, one.get("quality") or {}) for one in (variant, baseline))
    if record is not None and name in record.variants and DENSE in record.variants:
        found, dense = {**found, **record.variants[name]}, {**dense, **record.variants[DENSE]}
    known = perplexity_ratios(found, dense)
    if not known:
        return "", None, None
    kind = max(known, key=lambda one: known[one])
    return kind, known[kind], found.get("kl_vs_dense")


def _points_below(records: Records, name: str) -> float | None:
    """Points of mean accuracy below the dense model; None where no local tasks were run on both."""
    record = records.result(stage.TASKS, TasksRecord)
    mean = record["means"]["variants"].get(name) if record is not None and "means" in record else None
    difference = None if mean is None else mean["difference"]
    return None if difference is None else -100 * difference


def _verified(records: Records, name: str) -> bool | None:
    """Whether the export, and the quantization if any, kept their promises; None where nobody looked."""
    of = DENSE if name.startswith(DENSE) else PRUNED
    exports = [one.passed for one in verifications(records) if one.model == of]
    quantized = [passed for one, passed in kept_promises(records) if one == name]
    return all([*exports, *quantized]) if exports else None


def _loops(records: Records, name: str) -> int:
    """On how many more prompts than dense a model repeats itself."""
    record = records.result(stage.ANSWERS, AnswersWritten)
    if record is None or record.skipped:
        return 0
    counts = {one: sum(map(repeats, texts)) for one, texts in record.variants.items()}
    return counts.get(name, 0) - counts.get(DENSE, 0)
