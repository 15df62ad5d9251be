"""The record ntk.json in words and rows: what a reader of a report is told. Opens no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from nirvana_deploy.measure.table import format_number, format_share


def explain(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What was measured and found, in a few sentences; the first cut of ``record`` is the one in question."""
    pruned, *others = record["cuts"]
    lines = [
        f"The tangent kernel tells how one Adam step on one text moves the output on another; a cut that "
        f"leaves it alone leaves a model that still learns like the dense one. Measured exactly, over all "
        f"prunable weights, on {record['windows']} windows of {record['window_tokens']} tokens"
        + (f" ({record['source']})" if record.get("source") else "")
        + f", for the output functional of the saliency {record['functional']!r}.",
        _prediction(pruned, others),
        _drift(pruned, others),
        _outputs(record, pruned),
    ]
    return tuple(lines)


def _prediction(pruned: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    text = (
        f"Predicted: the cut removes {format_share(pruned['removed_share'])} of the linear weights, which hold "
        f"{format_share(removed_diagonal(pruned))} of the kernel's diagonal"
    )
    if others:
        text += f"; a random cut of the same budget takes {format_share(fmean(map(removed_diagonal, others)))}"
    return text + ". This part is an identity, computed from the dense model alone."


def _drift(pruned: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    adam = pruned["adam"]
    within = adam["drift"] <= adam["removed_bound"]
    text = (
        f"Measured: the kernel changes by {format_share(adam['drift'])} of its size (Frobenius norm); the removed "
        f"weights alone would change it by {format_share(adam['removed'])}, and by at most "
        f"{format_share(adam['removed_bound'])} for any signs. The change is "
        f"{'within' if within else 'beyond'} that linear bound"
    )
    if others:
        drifts = [other["adam"]["drift"] for other in others]
        text += f"; the random cut changes it by {format_share(fmean(drifts))}"
        if adam["drift"] >= min(drifts):
            text += ", so the saliency bought no stability here"
    return text + (
        ". The kept weights' gradients move too, which no first-order score bounds: that it stays small "
        "is a measurement, not a theorem."
        if within
        else ". The rest is the movement of the kept weights' gradients, which no first-order score bounds."
    )


def _outputs(record: Mapping[str, Any], pruned: Mapping[str, Any]) -> str:
    shot = pruned["zero_shot"]
    pairs = list(zip(shot["change"], shot["removed_saliency"], strict=True))
    held = sum(abs(change) <= bound for change, bound in pairs)
    return (
        f"The output itself changes by {format_number(mean_change(pruned))} on average, "
        f"{format_share(mean_change(pruned) / _mean_size(record['dense']['values']))} of its value. To first "
        f"order it may change by the removed saliency, {format_number(fmean(shot['removed_saliency']))} on "
        f"average, which held on {held} of {len(pairs)} windows; the signed first-order prediction was "
        f"{format_number(_mean_size(shot['first_order_change']))}."
    )


def rows(record: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The table below the sentences: a label, then one cell a cut."""
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
    """Of the table: one column a cut."""
    return ("", *(f"{cut['name']} ({cut['saliency']})" for cut in record["cuts"]))


def removed_diagonal(cut: Mapping[str, Any]) -> float:
    """The share of the Adam kernel's diagonal that goes with the removed weights, mean over windows."""
    return fmean(cut["adam"]["diagonal_removed"])


def mean_change(cut: Mapping[str, Any]) -> float:
    """Mean over windows of |f - f'|."""
    return _mean_size(cut["zero_shot"]["change"])


def _mean_size(values: Sequence[float]) -> float:
    return fmean(abs(value) for value in values)
