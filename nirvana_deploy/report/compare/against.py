"""One benchmark against an earlier one: what got slower or worse beyond noise.

Times are ratios of medians over each run's own rounds, those of a workload ratios within the same requests;
quality is the mean log ratio over windows of the same text. A ratio counts when the whole of its interval
(``measure/rounds/ratios.py``) lies beyond the tolerance, and for a time when that over the baseline of the
same rounds does, too: a busier machine slows both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import log
from statistics import fmean, median
from typing import Any, Literal

from nirvana_deploy.base.errors import NirvanaError, RegressionError
from nirvana_deploy.base.shown.html import html_table
from nirvana_deploy.base.units import format_bytes, format_ms, format_number
from nirvana_deploy.measure.rounds.ratios import Ratio, ratio_of, ratio_of_means, ratio_of_runs
from nirvana_deploy.output.record_kinds import Quality
from nirvana_deploy.report.compare.alike import Folder
from nirvana_deploy.report.compare.comparison import quality_of
from nirvana_deploy.report.compare.earlier import differences, other_text, require_same_model, times_apart
from nirvana_deploy.report.findings import failed
from nirvana_deploy.report.table import TIMES, Table, baseline_of

SCHEMA = 1
Verdict = Literal[
    "worse",
    "better",
    "as the baseline",
    "within tolerance",
    "no difference shown",
    "unchanged",
    "not compared",
]
_TIMES = (("prefill_ms", "Prefill"), ("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"))
_ANSWERS = (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "E2E"))
_ANSWERED: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "ttft": lambda one: float(one["ttft_ms"]),
    "tpot": lambda one: fmean(one["itl_ms"]),
    "e2e": lambda one: float(one["ttft_ms"] + sum(one["itl_ms"])),
}
_MEMORIES = (("peak_rss_bytes", "Peak memory"), ("peak_device_bytes", "Peak device memory"))
_MEMORY_TOLERANCE = 0.05
"""At least: the same process takes some per cent more or less of it."""
_QUALITIES = (
    ("Perplexity", "perplexity", "nll_by_window", float),
    ("KL to dense", "kl_vs_dense", "kl_by_window", log),
)
"""Measure, its key, that of its samples, and what makes a sample the measure's logarithm."""


@dataclass(frozen=True)
class Change:
    """One measure of one model, then and now; a larger value is a worse one."""

    variant: str
    measure: str
    before: float
    now: float
    verdict: Verdict
    ratio: float | None = None
    """Now over before; the interval that holds its true value is from ``low`` to ``high``."""
    low: float | None = None
    high: float | None = None
    write: Callable[[float], str] = field(default=format_number, repr=False, compare=False)
    why: str = field(default="", repr=False, compare=False)
    """Why this one measure is not compared, if so."""

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        found = asdict(self)
        del found["write"], found["why"]
        return found


@dataclass(frozen=True)
class Changes:
    """What two benchmarks say together."""

    against: str
    """Where the earlier one lies."""
    changes: tuple[Change, ...]
    cautions: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Changes(against {self.against!r}, {len(self.worse)} of {len(self.changes)} worse)"

    def _repr_html_(self) -> str:
        """All measures, for a notebook."""
        table = self.table()
        return html_table(table.headers, table.rows, title=repr(self), note=" ".join(self.cautions))

    @property
    def worse(self) -> tuple[Change, ...]:
        """What got worse beyond noise."""
        return tuple(one for one in self.changes if one.verdict == "worse")

    def table(self) -> Table:
        """A row for each measure of each model; of kinds of text and along a sweep, those that changed."""
        quiet = ("no difference shown", "unchanged", "not compared")
        rows = (_row(one) for one in self.changes if "," not in one.measure or one.verdict not in quiet)
        return Table(("Model", "Measure", "Before", "Now", "Now / before", "Verdict"), tuple(rows))

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "schema": SCHEMA,
            "against": self.against,
            "worse": len(self.worse),
            "cautions": list(self.cautions),
            "changes": [one.as_json() for one in self.changes],
        }

    def require_none_worse(self) -> None:
        """Raise RegressionError where something got worse."""
        if not self.worse:
            return
        said = "; ".join(
            f"{one.variant}: {one.measure} is {format_number(one.ratio or 0.0)} times what it was"
            for one in self.worse
        )
        raise RegressionError(
            f"Worse than {self.against} beyond noise: {said}.",
            hint="If the machine was busy, measure again: nirvana-deploy benchmark OUT --wait-until-idle. "
            "To let smaller changes pass: --tolerance 5%",
        )


def changes_since(before: Folder, now: Folder, *, tolerance: float) -> Changes:
    """Compare what two benchmarks have in common; ``tolerance`` is the least share that counts.

    Raises NirvanaError for another model, and for benchmarks that have no model's name in common.
    """
    then, new = before.records.benchmark or {}, now.records.benchmark or {}
    require_same_model(before, now)
    old_variants = {str(one["name"]): one for one in then.get("variants") or ()}
    pairs = _pairs(then, new)
    apart, texts = list(times_apart(then, new, now.label)), list(other_text(before, now))
    baseline = baseline_of(new) or {}
    baselines = _Pair("", old_variants.get(str(baseline.get("name")), {}), baseline)
    found: list[Change] = []
    for pair in pairs:
        found += _times(pair, baselines, tolerance, compared=not apart)
        old, one = quality_of(before, pair.old), quality_of(now, pair.new)
        found += _quality(pair.name, old, one, tolerance, compared=not texts)
        found += _size(pair, tolerance)
        found += _memory(pair, tolerance, compared=not apart)
    of_workloads, left_out = _workloads(before, now, tolerance)
    found += [*of_workloads, *_sweeps(before, now, tolerance, left_out)]
    if not pairs and ((then and new) or not found):
        raise NirvanaError(
            f"{before.label} and {now.label} have no model in common that was timed alike: "
            f"{_models(before)} there, {_models(now)} here.",
            hint="Compare benchmarks of the same models, under the same workloads.",
        )
    cautions = [*apart, *texts, *differences(before, now), *_baseline_itself(found, baselines)]
    cautions += [*_not_judged(found), *left_out, *(f"{now.label}: {one}" for one in failed(new))]
    if not texts and (lacking := _without_windows(before, now, pairs)):
        cautions.append(
            f"Quality is not compared: {lacking} has no numbers by window, as of an earlier version. "
            f"Measure it again: nirvana-deploy evaluate {lacking}"
        )
    return Changes(before.label, tuple(found), tuple(cautions))


def _models(folder: Folder) -> str:
    """The models that were timed; where that was under workloads and along axes alone, those of each."""
    if benchmark := folder.records.benchmark:
        return ", ".join(_names(benchmark))
    under = {**_entries(folder, "workloads", "name"), **_entries(folder, "sweeps", "axis")}
    return "; ".join(f"{name}: {', '.join(_names(one))}" for name, one in under.items())


def _names(timed: _Entry) -> list[str]:
    return [str(one["name"]) for one in timed["variants"]]


@dataclass(frozen=True)
class _Pair:
    """A model in both benchmarks."""

    name: str
    old: Mapping[str, Any]
    new: Mapping[str, Any]

    def samples(self, key: str) -> tuple[Sequence[float], Sequence[float]]:
        """Milliseconds of all rounds, then and now."""
        old, new = ((one.get(key) or {}).get("samples") or () for one in (self.old, self.new))
        return old, new


def _without_windows(before: Folder, now: Folder, pairs: Sequence[_Pair]) -> str | None:
    """The label of a folder with quality whose windows were not recorded."""
    for folder, variants in ((before, [one.old for one in pairs]), (now, [one.new for one in pairs])):
        found = [quality_of(folder, one) for one in variants]
        if any(one.get("perplexity") and not one.get("nll_by_window") for one in found):
            return folder.label
    return None


def _baseline_itself(found: Sequence[Change], baselines: _Pair) -> Iterator[str]:
    name = str(baselines.new.get("name"))
    for one in found:
        if (one.variant, one.measure, one.verdict) == (name, "TPOT", "worse"):
            yield (
                f"{name}, the baseline, takes {format_number(one.ratio or 0.0)} times as long "
                "itself: rather the machine or the runtime than a cut."
            )


_Entry = Mapping[str, Any]
"""Of workloads.json: a workload or a sweep."""
_Samples = tuple[Sequence[float], Sequence[float]]
"""Milliseconds then and now."""


def _times(
    pair: _Pair, baselines: _Pair, tolerance: float, *, compared: bool, write: str = "{}"
) -> Iterator[Change]:
    for key, measure in _TIMES:
        of_baseline = baselines.samples(key) if pair.new != baselines.new else ((), ())
        ratio = ratio_of_runs if compared else None
        yield from _time(pair.name, write.format(measure), pair.samples(key), of_baseline, tolerance, ratio)


def _time(
    name: str,
    measure: str,
    samples: _Samples,
    of_baseline: _Samples,
    tolerance: float,
    ratio_of_both: Callable[[Sequence[float], Sequence[float]], Ratio] | None,
) -> Iterator[Change]:
    """One change, if both were measured; a slow-down that the baseline has, too, is not the model's."""
    old, new = samples
    if not old or not new:
        return
    ratio = ratio_of_both(new, old) if ratio_of_both else None
    found = _change(name, measure, (median(old), median(new)), ratio, tolerance, format_ms)
    if found.verdict == "worse" and all(of_baseline) and ratio_of_both:
        relative = ratio_of_both(_by_round(new, of_baseline[1]), _by_round(old, of_baseline[0]))
        if not _is_worse(relative, tolerance):
            found = replace(found, verdict="as the baseline")
    yield found


def _by_round(samples: Sequence[float], of_baseline: Sequence[float]) -> list[float]:
    return [one / base for one, base in zip(samples, of_baseline, strict=False)]


def _quality(name: str, old: Quality, new: Quality, tolerance: float, *, compared: bool) -> Iterator[Change]:
    before, after = old.get("parts") or {}, new.get("parts") or {}
    kinds = [kind for kind in after if kind in before]
    every: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [("", old, new)]
    if len(kinds) > 1:
        every += [(f", {kind}", before[kind], after[kind]) for kind in kinds]
    for suffix, then, now in every:
        for measure, key, by_window, to_log in _QUALITIES:
            if then.get(key) and now.get(key):
                windows = (then.get(by_window), now.get(by_window))
                ratio, why = _paired(*windows, to_log) if compared else (None, "")
                values = (then[key], now[key])
                found = _change(name, f"{measure}{suffix}", values, ratio, tolerance, format_number)
                yield replace(found, why=why)


def _paired(
    before: Sequence[float] | None, now: Sequence[float] | None, to_log: Callable[[float], float]
) -> tuple[Ratio | None, str]:
    """Now over before; None, and why, where the windows do not tell or were not recorded."""
    if not before or not now:
        return None, ""  # said once for the folder
    if len(before) != len(now):
        return None, f"{len(before)} windows before, {len(now)} now"
    if to_log is log and min(*before, *now) <= 0:
        return None, "a window where it is 0 has no ratio"
    ratio = ratio_of_means([to_log(new) - to_log(old) for old, new in zip(before, now, strict=True)])
    return ratio, "" if ratio else "a single window tells no difference from noise"


def _not_judged(found: Sequence[Change]) -> Iterator[str]:
    """Cautions on single measures, those of one reason together."""
    for why in dict.fromkeys(one.why for one in found if one.why):
        names = (f"{one.measure} of {one.variant}" for one in found if one.why == why)
        yield f"Not compared: {'; '.join(names)}: {why}."


def _size(pair: _Pair, tolerance: float) -> Iterator[Change]:
    before, now = pair.old.get("weights_bytes"), pair.new.get("weights_bytes")
    if before and now:
        exact = Ratio(now / before, now / before, now / before, 1.0)
        yield _change(pair.name, "Weights", (before, now), exact, tolerance, format_bytes)


def _memory(pair: _Pair, tolerance: float, *, compared: bool, write: str = "{}") -> Iterator[Change]:
    for key, measure in _MEMORIES:
        before, now = pair.old.get(key), pair.new.get(key)
        if before and now:
            exact = Ratio(now / before, now / before, now / before, 1.0) if compared else None
            least = max(tolerance, _MEMORY_TOLERANCE)
            yield _change(pair.name, write.format(measure), (before, now), exact, least, format_bytes)


def _workloads(before: Folder, now: Folder, tolerance: float) -> tuple[list[Change], list[str]]:
    """Changes under the workloads that both were timed under, and why another is not compared."""
    found: list[Change] = []
    cautions: list[str] = []
    for old, new in _both(before, now, "workloads", "name"):
        name = str(new["name"])
        then, there = ({**one, "workload": one.get("environment")} for one in (old, new))  # threads are there
        apart = list(times_apart(then, there, f"{now.label} --workload {name}"))
        if old["file"] != new["file"]:
            apart = ["Times are not compared: its file is another."]
        cautions += [f"Workload {name}: {why}" for why in apart]
        pairs = _pairs(old, new)
        baseline = next((one for one in pairs if one.new is new["variants"][0]), None)
        for pair in pairs:
            of_baseline = baseline if pair is not baseline else None
            for key, measure in _ANSWERS:
                samples = _answered(pair, key)
                base = _answered(of_baseline, key) if of_baseline else ((), ())
                ratio = ratio_of if not apart and len(samples[0]) == len(samples[1]) else None
                found += _time(pair.name, f"{name}: {measure}", samples, base, tolerance, ratio)
            found += _memory(pair, tolerance, compared=not apart, write=f"{name}: {{}}")
    return found, cautions


def _answered(pair: _Pair, key: str) -> _Samples:
    """One time of every request, or the mean of every round at a server, then and now, in their order."""
    old, new = (_of_rounds(some.get("batches", ()), _ANSWERED[key]) for some in (pair.old, pair.new))
    return old, new


def _of_rounds(
    batches: Sequence[Mapping[str, Any]], time: Callable[[Mapping[str, Any]], float]
) -> list[float]:
    rounds: dict[int, list[float]] = {}
    for index, one in enumerate(batches):
        rounds.setdefault(one.get("round", index), []).append(time(one))
    return [fmean(of_one) for of_one in rounds.values()]


def _sweeps(before: Folder, now: Folder, tolerance: float, left_out: list[str]) -> Iterator[Change]:
    """Changes at the values that a sweep of the same request has in both; ``left_out`` is told the others."""
    for old, new in _both(before, now, "sweeps", "axis"):
        if apart := list(times_apart(old, new, now.label)):
            left_out += [f"Sweep of {new['axis']}: {why}" for why in apart]
            continue
        baseline = str(new["variants"][0]["name"])
        points = {pair.name: _points(pair) for pair in _pairs(old, new)}
        for of_model in points.values():
            for value, pair in of_model.items():
                base = points.get(baseline, {}).get(value, _Pair(baseline, {}, {}))
                where = f"{{}}, {new['axis']} {value}"
                yield from _times(pair, base, tolerance, compared=True, write=where)


def _points(pair: _Pair) -> dict[int, _Pair]:
    old = {one["value"]: one for one in pair.old["points"]}
    return {
        one["value"]: _Pair(pair.name, old[one["value"]], one)
        for one in pair.new["points"]
        if one["value"] in old
    }


def _both(before: Folder, now: Folder, what: str, name: str) -> Iterator[tuple[_Entry, _Entry]]:
    """Entries of the two workloads.json of one name."""
    then = _entries(before, what, name)
    for key, new in _entries(now, what, name).items():
        if key in then:
            yield then[key], new


def _entries(folder: Folder, what: str, name: str) -> dict[str, _Entry]:
    return {str(one[name]): one for one in (folder.records.workloads or {}).get(what) or ()}


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[_Pair]:
    """The models that both have."""
    then = {str(one["name"]): one for one in old.get("variants") or ()}
    pairs = ((str(one["name"]), one) for one in new.get("variants") or ())
    return [_Pair(name, then[name], one) for name, one in pairs if name in then]


def _change(
    variant: str,
    measure: str,
    values: tuple[float, float],
    ratio: Ratio | None,
    tolerance: float,
    write: Callable[[float], str],
) -> Change:
    if ratio is None:
        return Change(variant, measure, *values, "not compared", write=write)
    verdict: Verdict = "no difference shown"
    if ratio.low == ratio.high == 1:
        verdict = "unchanged"
    elif _is_worse(ratio, tolerance):
        verdict = "worse"
    elif ratio.shows_difference:
        verdict = "better" if ratio.high < 1 / (1 + tolerance) else "within tolerance"
    return Change(variant, measure, *values, verdict, ratio.p50, ratio.low, ratio.high, write)


def _is_worse(ratio: Ratio, tolerance: float) -> bool:
    return ratio.shows_difference and ratio.low > 1 + tolerance


def _row(one: Change) -> tuple[str, ...]:
    ratio = ""
    if one.ratio is not None and one.low is not None and one.high is not None:
        ratio = f"{format_number(one.ratio)}{TIMES}"
        if one.low != one.high:
            ratio += f" ({format_number(one.low)}\N{EN DASH}{format_number(one.high)})"
    return (one.variant, one.measure, one.write(one.before), one.write(one.now), ratio, one.verdict)
