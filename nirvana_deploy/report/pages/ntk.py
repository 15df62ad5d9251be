"""Sentences and table rows of the report about ntk.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from nirvana_deploy.base.units import format_number, format_share


def explain(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Explain in a few sentences what was measured; the first cut of ``record`` is the pruned model."""
    pruned, *others = record["cuts"]
    lines = [
        "The tangent kernel tells how one Adam step on one text moves the output on another; a cut that "
        "leaves it alone leaves a model whose next training steps act like the dense one's. Measured "
        "exactly, "
        f"over all prunable weights, on {record['windows']} windows of {record['window_tokens']} tokens"
        + (f" ({record['source']})" if record.get("source") else "")
        + f", for the output functional of the saliency {record['functional']!r}.",
        _prediction(pruned, others),
        _drift(pruned, others),
        _outputs(record, pruned),
    ]
    return tuple(lines)


def _prediction(pruned: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    share, held = format_share(pruned["removed_share"]), format_share(removed_diagonal(pruned))
    text = f"Predicted: the cut removes {share} of the linear weights, with {held} of the kernel's diagonal"
    if others:
        by_chance = format_share(fmean(removed_diagonal(other) for other in others))
        text += f"; a random cut of the same budget takes {by_chance}"
    return text + ". This part is an identity, computed from the dense model alone."


def _drift(pruned: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    adam = pruned["adam"]
    drift, removed, bound = (format_share(adam[key]) for key in ("drift", "removed", "removed_bound"))
    within = adam["drift"] <= adam["removed_bound"]
    text = (
        f"Measured: the kernel changes by {drift} of its size (Frobenius norm). The removed weights alone "
        f"would change it by {removed}, and by no more than {bound} whatever their signs: the change is "
        f"{'within' if within else 'beyond'} that linear bound"
    )
    if others:
        drifts = [other["adam"]["drift"] for other in others]
        text += f". The random cut changes it by {format_share(fmean(drifts))}"
        if adam["drift"] >= min(drifts):
            text += ", so the saliency bought no stability here"
    tail = "staying within is a measurement, not a theorem" if within else "this is where the rest comes from"
    return f"{text}. The gradients of the kept weights move too, which no first-order score bounds: {tail}."


def _outputs(record: Mapping[str, Any], pruned: Mapping[str, Any]) -> str:
    shot, change = pruned["zero_shot"], mean_change(pruned)
    pairs = list(zip(shot["change"], shot["removed_saliency"], strict=True))
    held = sum(abs(moved) <= bound for moved, bound in pairs)
    share = format_share(change / _mean_size(record["dense"]["values"]))
    bound = fmean(shot["removed_saliency"])
    return (
        f"The output itself changes by {format_number(change)} on average, {share} of its value; the signed "
        f"first-order prediction was {format_number(_mean_size(shot['first_order_change']))}. To first order "
        f"the removed saliency bounds it, which held on {held} of {len(pairs)} windows; at "
        f"{format_number(bound)} that bound adds up all weights as if they pulled one way, so it ranks cuts "
        "and forecasts nothing."
    )


def rows(record: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Rows of the table: a label, then one cell per cut."""
    cuts = record["cuts"]
    size = _mean_size(record["dense"]["values"])
    measures = (
        ("Linear weights removed", lambda cut: cut["removed_share"]),
        ("Saliency removed", lambda cut: fmean(cut["zero_shot"]["removed_saliency_share"])),
        ("Kernel's diagonal removed (predicted)", removed_diagonal),
        ("Adam kernel: by removal (predicted)", lambda cut: cut["adam"]["removed"]),
        ("Adam kernel: linear bound", lambda cut: cut["adam"]["removed_bound"]),
        ("Adam kernel: kept gradients moved", lambda cut: cut["adam"]["moved"]),
        ("Adam kernel: change measured", lambda cut: cut["adam"]["drift"]),
        ("Plain kernel: change measured", lambda cut: cut["plain"]["drift"]),
        ("Output: change measured", lambda cut: mean_change(cut) / size),
    )
    return tuple((label, *(format_share(value(cut)) for cut in cuts)) for label, value in measures)


def headers(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Headers of the table: one column per cut."""
    return ("", *(_label(cut) for cut in record["cuts"]))


def _label(cut: Mapping[str, Any]) -> str:
    name, saliency = str(cut["name"]), str(cut["saliency"])
    return name if name.startswith(saliency) else f"{name} ({saliency})"


def removed_diagonal(cut: Mapping[str, Any]) -> float:
    """Share of the Adam kernel's diagonal held by removed weights, mean over windows."""
    return fmean(cut["adam"]["diagonal_removed"])


def mean_change(cut: Mapping[str, Any]) -> float:
    """Mean over windows of |f - f'|."""
    return _mean_size(cut["zero_shot"]["change"])


def _mean_size(values: Sequence[float]) -> float:
    return fmean(abs(value) for value in values)
