"""What two benchmarks must share for their numbers to compare, and what else differs between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.units import format_number
from nirvana_deploy.measure.rounds.ratios import CONFIDENCE, ratio_of_runs
from nirvana_deploy.report.compare.alike import REQUEST, Folder
from nirvana_deploy.report.compare.comparison import quality_of, recipe_table
from nirvana_deploy.report.table import baseline_of

_MACHINE = ("cpu", "logical_cores", "gpu")
"""Where these differ, times are those of two machines."""
_VERSIONS = ("platform", "python", "onnxruntime", "numpy", "torch", "transformers")
_NAMED = 4
_SAME_PERPLEXITY = 1e-3
"""Relative difference of the first model's perplexity up to which the text was the same."""


def require_same_model(before: Folder, now: Folder) -> None:
    """Raise NirvanaError where the two began with other models, as far as they tell."""
    files = [(one.records.manifest or {}).get("model", {}).get("files") for one in (before, now)]
    sizes = [(baseline_of(one.records.benchmark or {}) or {}).get("parameters") for one in (before, now)]
    told = files if all(files) else sizes
    if all(told) and told[0] != told[1]:
        what = f"{before.model}" if all(files) else f"{sizes[0]:,} parameters before pruning"
        other = f"{now.model}" if all(files) else f"{sizes[1]:,}"
        raise NirvanaError(
            f"{before.label} is the benchmark of another model: {what} there, {other} here, of other files.",
            hint=f"Set them side by side instead: nirvana-deploy report --compare {now.label} OTHER-OUT",
        )


def times_apart(then: Mapping[str, Any], new: Mapping[str, Any], label: str) -> Iterator[str]:
    """Why times are not compared, if so."""
    for what, names, again in (
        ("environment", _MACHINE, "Measure both on one machine."),
        ("workload", REQUEST, f"Measure alike: nirvana-deploy benchmark {label} {_options(then)}"),
    ):
        old, now = then.get(what) or {}, new.get(what) or {}
        said = [
            f"{name.replace('_', ' ')} {old[name]} before, {now[name]} now"
            for name in names
            if None not in (old.get(name), now.get(name)) and old[name] != now[name]
        ]
        if said:
            yield f"Times are not compared: {'; '.join(said)}. {again}"
    yield from _other_runtimes(then, new)


def _other_runtimes(then: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    runtimes = {str(one["name"]): one.get("runtime") for one in then.get("variants") or ()}
    pairs = [(runtimes.get(str(one["name"])), one.get("runtime")) for one in new.get("variants") or ()]
    others = dict.fromkeys((old, now) for old, now in pairs if None not in (old, now) and old != now)
    if others:
        said = "; ".join(f"runtime {old} before, {now} now" for old, now in others)
        yield f"Times are not compared: {said}. Measure both in one: --runtime {next(iter(others))[0]}"


def _options(benchmark: Mapping[str, Any]) -> str:
    workload = benchmark.get("workload") or {}
    return " ".join(f"--{name.replace('_', '-')} {workload[name]}" for name in REQUEST if workload.get(name))


def other_text(before: Folder, now: Folder) -> Iterator[str]:
    """Why quality is not compared, if so."""
    of_text = [(one.records.benchmark or {}).get("evaluation") or {} for one in (before, now)]
    for key in ("source", "window_tokens"):
        values = [one.get(key) for one in of_text]
        if None not in values and values[0] != values[1]:
            what = "text" if key == "source" else "length of its windows in tokens"
            yield f"Quality is not compared: the {what} is {values[0]} before, {values[1]} now."
            return
    dense = []
    for one in (before, now):
        baseline = baseline_of(one.records.benchmark or {})
        dense.append(quality_of(one, baseline).get("perplexity") if baseline else None)
    if dense[0] and dense[1] and abs(dense[1] / dense[0] - 1) > _SAME_PERPLEXITY:
        yield (
            f"Quality is not compared: the dense model's own perplexity is {format_number(dense[0])} before, "
            f"{format_number(dense[1])} now, so text or arithmetic is another."
        )


def differences(before: Folder, now: Folder) -> Iterator[str]:
    """Cautions on what else is not as it was."""
    then, new = before.records.benchmark or {}, now.records.benchmark or {}
    old, here = then.get("environment") or {}, new.get("environment") or {}
    said = [
        f"{name} {old[name]} before, {here[name]} now"
        for name in _VERSIONS
        if None not in (old.get(name), here.get(name)) and old[name] != here[name]
    ]
    if said:
        yield f"The environment is another: {'; '.join(said)}."
    if before.records.manifest and now.records.manifest:
        rows = recipe_table([before, now]).rows
        if changed := [f"{name} {old} before, {new} now" for name, old, new in rows]:
            more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
            yield f"The recipe is another: {'; '.join(changed[:_NAMED])}{more}."
    for when, one in (("before", then), ("now", new)):
        yield from (f"{when.capitalize()}: {said}" for said in (one.get("watch") or {}).get("cautions") or ())
    variants = [(one.get("variants") or ()) for one in (then, new)]
    names = {str(one["name"]) for one in variants[1]}
    gone = [str(one["name"]) for one in variants[0] if str(one["name"]) not in names]
    if gone:
        yield f"Not measured any more: {', '.join(gone)}."
    counts = [len((one.get("tpot_ms") or {}).get("samples") or ()) for some in variants for one in some]
    fewest = [1.0] * min(filter(None, counts), default=0)
    if fewest and ratio_of_runs(fewest, fewest).confidence < CONFIDENCE:
        yield (
            f"{len(fewest)} rounds show no difference between two runs with a confidence of "
            f"{CONFIDENCE:.0%}: seven of each may (--repeats)."
        )
