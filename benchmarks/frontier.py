"""What pruning saves and what it costs, beside what quantization alone saves and costs.

    nirvana-deploy search smollm2 --out DIR
    python benchmarks/frontier.py DIR/search.json --picture FILE

Reads the record of a search: every cut and the dense model in every precision, their KL on text that no
calibration source holds, and their decode times of one alternating run. A model is on the frontier if none is
both faster and nearer to dense; whether a pruned model is, at each precision, is the question.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nirvana_deploy.base.reading import read_json
from nirvana_deploy.report.drawing import COLOURS, bare, entitle, new_figure
from nirvana_deploy.report.pages.front import columns, rows

Record = dict[str, Any]


def main() -> None:
    """Print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("search", type=Path, metavar="search.json")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    options = parser.parse_args()
    record = read_json(options.search)
    print(section(record))
    if options.picture:
        draw(record, options.picture)


def section(record: Record) -> str:
    """The table of a search, what it says of pruning, and where it was timed."""
    where, load = record["environment"], record["workload"]
    note = (
        f"Decode behind {load['prompt_tokens']} tokens, {load['repeats']} rounds in turns, "
        f"{where['threads']} threads of {where['cpu']}, onnxruntime {where['onnxruntime']}; load average "
        f"before the start {where['load_average_1min']:.1f}, so read the ratios and their intervals."
    )
    return "\n".join([table(record), "", verdict(record), "", note])


def table(record: Record) -> str:
    """Markdown: every point, as the page of the search shows it."""
    headers = columns(record)
    lines = [f"| {' | '.join(headers)} |", "|---" + "|--:" * (len(headers) - 2) + "|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows(record))])


def verdict(record: Record) -> str:
    """Where pruning pays and where another model is both faster and nearer to dense, in a sentence."""
    points, told = record["points"], []
    best = [one for one in points if one["on_front"]]
    for scheme in dict.fromkeys(one["scheme"] for one in points):
        pruned = [one for one in points if one["scheme"] == scheme and one["sparsity"]]
        pays = [f"{one['sparsity']:.0%}" for one in pruned if one["on_front"]]
        beaten = {
            _said(min((other for other in best if _beats(other, one)), key=lambda other: other["kl"]))
            for one in pruned
            if not one["on_front"]
        }
        what = f"in {scheme or 'fp32'} pruning is on the frontier at {', '.join(pays)}" if pays else ""
        if beaten:
            *others, last = sorted(beaten, key=lambda name: (not name.startswith("dense"), name))
            off = f"{' or '.join([', '.join(others), last] if others else [last])} beats "
            rest = f"; {off}the rest" if pays else f"in {scheme or 'fp32'} {off}every pruned model"
            what += rest
        if what:
            told.append(what)
    return f"Speed beside quality: {'. '.join(one[:1].upper() + one[1:] for one in told)}."


def _beats(one: Record, other: Record) -> bool:
    """Whether ``one`` is as fast and as near to dense at least."""
    return bool(one["tpot_ms"] <= other["tpot_ms"] and one["kl"] <= other["kl"])


def _said(point: Record) -> str:
    """For people: "dense w4", "w4 at 40%"."""
    scheme = point["scheme"] or "fp32"
    return f"{scheme} at {point['sparsity']:.0%}" if point["sparsity"] else f"dense {scheme}"


def draw(record: Record, path: Path) -> None:
    """One figure: decode time across, KL up, a line for each precision, dense at its start."""
    figure = new_figure(4.2, width_in=7.2)
    axes = figure.subplots()
    schemes: Sequence[str | None] = list(dict.fromkeys(one["scheme"] for one in record["points"]))
    for scheme, colour in zip(schemes, ("first", "second", "third"), strict=False):
        line = [one for one in record["points"] if one["scheme"] == scheme]
        line.sort(key=lambda one: one["sparsity"])
        x, y = [one["tpot_ms"] for one in line], [one["kl"] for one in line]
        errors = [one["kl_standard_error"] for one in line]
        axes.errorbar(
            x, y, yerr=errors, fmt="-o", color=COLOURS[colour], label=scheme or "fp32", markersize=5
        )
        for point, across, up in zip(line, x, y, strict=True):
            name = f"{point['sparsity']:.0%}" if point["sparsity"] else "dense"
            axes.annotate(name, (across, up), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel("decode, ms per token")
    axes.set_ylabel("KL to dense, nats per token")
    axes.legend(frameon=False)
    bare(axes, ticks=True)
    entitle(axes, "Left and down is better; labels: share of linear weights removed")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
