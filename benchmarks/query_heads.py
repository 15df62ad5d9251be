"""Would query heads pay as units? The best plan by predicted KL, with KV groups alone and with heads as well.

    python benchmarks/query_heads.py smollm2 --calib valid.txt --json FILE

A KV group can go whole; or every group of a layer that stays loses the same number of its query heads, so
that one operator still serves them. Both losses come from the same measured curves: each option of each
attention is refitted in the same metric and scaled by the same trials. Which heads go is the cheapest choice
of all. For each sparsity the script prints the predicted KL of either plan and how many options were taken.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import environment
from nirvana_deploy.calibrate.windows import calibration_data
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.prune.curves import measure_curves
from nirvana_deploy.prune.curves.budget import hull
from nirvana_deploy.prune.curves.curve import Curve, Curves
from nirvana_deploy.prune.refit import elimination
from nirvana_deploy.prune.refit.elimination import Optimum

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Option:
    """What one attention may keep."""

    groups: int
    heads: int
    """Query heads of each group."""
    removed: float
    """Linear weights."""
    loss: float
    """Nats per token; before it is scaled, growth of the objective."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", default="smollm2")
    parser.add_argument("--calib", default="pydoc,code")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    dense = Checkpoint.open(resolve_model(options.model).path)
    windows = calibration_data(
        options.calib,
        dense.tokenizer,
        num_sequences=options.windows,
        seq_len=options.window_tokens,
        seed=0,
        heldout_sequences=0,
        heldout_len=options.window_tokens,
    ).calibration.tokens
    curves, attentions = measured(dense, windows)
    rows = [compared(dense.shape, curves, attentions, sparsity) for sparsity in SPARSITIES]
    print(table(rows))
    if options.json:
        record = {"model": options.model, "calib": Path(options.calib).name, "windows": list(windows.shape)}
        write_json(
            options.json,
            {
                **record,
                "rows": rows,
                "environment": environment() | {"load_average_1min": os.getloadavg()[0]},
            },
        )


def measured(dense: Checkpoint, windows: np.ndarray) -> tuple[Curves, list[list[Option]]]:
    """The curves, and the options of each attention in nats per token."""
    found: list[list[Option]] = []  # blocks come last to first
    own = elimination.eliminate_groups

    def noting(optimum: Optimum, groups: int) -> Any:
        result = own(optimum, groups)
        found.append(attention_options(dense.shape, optimum, result[0]))
        return result

    measure_curves.eliminate_groups = noting  # type: ignore[attr-defined]
    try:
        curves = measure_curves.measure_curves(dense, windows)
    finally:
        measure_curves.eliminate_groups = own  # type: ignore[attr-defined]
    return curves, [
        scaled(options, curve) for options, curve in zip(reversed(found), curves.groups, strict=True)
    ]


def attention_options(
    shape: ModelShape, optimum: Optimum, kept_groups: Sequence[tuple[int, ...]]
) -> list[Option]:
    """All pairs of a number of groups and of heads of each."""
    groups = len(kept_groups[0])
    inputs = optimum.inverse.shape[0]
    heads = inputs // shape.head_dim // groups
    per_head = 2 * shape.head_dim * shape.hidden_size  # q and o
    per_group = shape.group_cost * shape.hidden_size
    assert per_group == per_head * (heads + 1)  # k and v are as much as one more head
    options = []
    for stay in kept_groups:
        gone = [one for one in range(groups) if one not in stay]
        for keep in range(1, heads + 1):
            losses = (
                growth(optimum, shape.head_dim, heads, gone, stay, choice)
                for choice in itertools.product(
                    itertools.combinations(range(heads), heads - keep), repeat=len(stay)
                )
            )
            removed = len(gone) * per_group + len(stay) * (heads - keep) * per_head
            options.append(Option(len(stay), keep, float(removed), min(losses)))
    return options


def growth(
    optimum: Optimum,
    head_dim: int,
    heads: int,
    gone: Sequence[int],
    stay: Sequence[int],
    choice: Sequence[Sequence[int]],
) -> float:
    """How much the objective grows without groups ``gone`` and, of those that stay, heads ``choice``."""
    chosen = [group * heads + head for group in gone for head in range(heads)]
    chosen += [group * heads + head for group, some in zip(stay, choice, strict=True) for head in some]
    if not chosen:
        return 0.0
    inputs = torch.cat([torch.arange(one * head_dim, (one + 1) * head_dim) for one in sorted(chosen)])
    return elimination._growth(optimum, inputs)


def scaled(options: Sequence[Option], curve: Curve) -> list[Option]:
    """In nats per token: by the factor that scaled the curve of the same attention."""
    most = len(curve.removed)  # groups
    heads = max(one.heads for one in options)
    fewest = next(one for one in options if (one.groups, one.heads) == (1, heads)) if most > 1 else None
    factor = curve.kl[-1] / fewest.loss if fewest else 1.0
    return [Option(one.groups, one.heads, one.removed, one.loss * float(factor)) for one in options]


def compared(
    shape: ModelShape, curves: Curves, attentions: Sequence[Sequence[Option]], sparsity: float
) -> dict[str, Any]:
    """Predicted KL of the plan with whole groups, and with heads too."""
    heads = max(one.heads for one in attentions[0])
    whole = [[one for one in options if one.heads == heads] for options in attentions]
    alone, _ = planned(shape, curves, whole, sparsity)
    both, taken = planned(shape, curves, attentions, sparsity)
    return {
        "sparsity": sparsity,
        "groups_kl": alone,
        "heads_kl": both,
        "attentions_with_fewer_heads": sum(one.heads < heads for one in taken),
    }


def planned(
    shape: ModelShape, curves: Curves, attentions: Sequence[Sequence[Option]], sparsity: float
) -> tuple[float, list[Option]]:
    """(KL, the option of each attention): segments of the hulls by ascending KL per weight."""
    neuron = shape.neuron_cost * shape.hidden_size
    segments: list[tuple[float, int, float, float, Option | None]] = []
    for index, options in enumerate(attentions):
        ordered = sorted(options, key=lambda one: (one.removed, one.loss))
        ordered = [one for n, one in enumerate(ordered) if n == 0 or one.removed > ordered[n - 1].removed]
        points = hull(np.array([one.removed for one in ordered]), np.array([one.loss for one in ordered]))
        for a, b in itertools.pairwise(points):
            size, loss = ordered[b].removed - ordered[a].removed, ordered[b].loss - ordered[a].loss
            segments.append((loss / size, index, size, loss, ordered[b]))
    for index, curve in enumerate(curves.neurons):
        removed = curve.removed.astype(np.float64) * neuron
        for a, b in itertools.pairwise(hull(removed, curve.kl)):
            size, loss = removed[b] - removed[a], float(curve.kl[b] - curve.kl[a])
            segments.append((loss / size, index, size, loss, None))
    left = sparsity * shape.linear_parameters
    total = 0.0
    taken = [max(options, key=lambda one: (one.groups, one.heads)) for options in attentions]
    for _, index, size, loss, option in sorted(segments, key=lambda one: one[:2]):
        if left <= 0:
            break
        share = min(1.0, left / size)  # both plans end on the budget
        total += share * loss
        left -= share * size
        if option is not None:
            taken[index] = option
    return total, taken


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| sparsity | predicted KL, groups | with query heads | change | attentions that lose heads |",
        "|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        change = row["heads_kl"] / row["groups_kl"] - 1
        lines.append(
            f"| {row['sparsity']:g} | {row['groups_kl']:.4f} | {row['heads_kl']:.4f} | {change:+.1%} | "
            f"{row['attentions_with_fewer_heads']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
