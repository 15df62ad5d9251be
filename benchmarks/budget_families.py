"""How nearly budgets are met on a tiny random model of each family, and what keeps some from it.

    python benchmarks/budget_families.py --out benchmarks/results/budgets-families.json

Each budget is one `prune-export` with that option alone: a KL, a weight file of 85 % of dense's, and a time
of 90 % of dense's by a clock of bytes, as decoding in a large model is bound by them: a token of a tiny model
takes microseconds beside the program around it, which no cut makes shorter. (By a real clock: budgets.py on
SmolLM2.) A load is what was measured over what is allowed: wanted is 0.95 to 1. Below that, `next_load` is
the load of the nearest cut that was tried and is too much; between the two lies a few units, or none.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from budgets import WANTED_LOAD, met  # the script beside this one

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import environment
from nirvana_deploy.pipeline.searching import target
from nirvana_deploy.search.point import Found

FAMILIES = (
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "olmo2",
    "smollm3",
    "granite",
    "phi3",
    "flan-t5",
)
BUDGETS = ("max_kl", "max_weights_bytes", "target_tpot_ms")
MAX_KL, SHARE_OF_BYTES, SHARE_OF_TIME = 0.15, 0.85, 0.9
MS_PER_BYTE = 1e-6
JOB = {
    "preset": "paper",
    "round_to": 1,
    "num_sequences": 8,
    "seq_len": 32,
    "heldout_sequences": 8,
    "heldout_len": 48,
    "threads": 1,
    "run_benchmark": False,
}
"""A quick cut by scores alone, one unit at a time."""
NO_GAMMA = ("olmo2",)
"""KV heads that share a norm stay: there is nothing to divide a budget between."""


def main() -> None:
    """Meet every budget on every family, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    target.timed_points = by_bytes
    rows = [row for family in options.family for row in of_family(family)]
    load = os.getloadavg()[0]
    record = {"schema": 1, "budgets": rows, "environment": environment() | {"load_average_1min_after": load}}
    write_json(options.out, record)
    print(table(record))


def by_bytes(_: Path, points: Sequence[Found], *__: Any, **___: Any) -> tuple[list[Found], dict[str, Any]]:
    """In place of ``timed_points``: a token takes as long as its weights are large."""
    dense = next(one.weights_bytes for one in points if not one.sparsity)
    return [
        replace(one, tpot_ms=MS_PER_BYTE * one.weights_bytes, speedup=dense / one.weights_bytes)
        for one in points
    ], {}


def of_family(family: str) -> Iterator[dict[str, Any]]:
    """A row for each budget."""
    job = JOB if family in NO_GAMMA else JOB | {"gamma": 1.0}
    with tempfile.TemporaryDirectory(prefix="nirvana-budget-") as name:
        folder = Path(name)
        model = str(writer(family)(folder / family, family))
        first = met(model, f"max_kl={MAX_KL:g}", folder / "kl", **job)
        yield row_of(family, first)
        if "trials" not in first:
            raise SystemExit(f"{family}: {first['failed']}")
        dense_bytes = first["trials"][0]["weights_bytes"]
        limit = int(SHARE_OF_BYTES * dense_bytes)
        yield row_of(family, met(model, f"max_weights_bytes={limit}", folder / "bytes", **job))
        allowed_ms = SHARE_OF_TIME * MS_PER_BYTE * dense_bytes
        yield row_of(family, met(model, f"target_tpot_ms={allowed_ms:.6g}", folder / "ms", **job))


def writer(family: str) -> Callable[[Path, str], Path]:
    """What writes the tiny model that the tests of every stage run on."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from builders.tiny import write_tiny
    from builders.tiny_t5 import write_t5

    return write_t5 if "t5" in family else write_tiny


def row_of(family: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row with its family and, where the budget is not used up, the load of the cut next to the chosen."""
    over = [cut["load"] for cut in row.get("trials", [])[1:] if cut["load"] > 1]
    return {"family": family, "next_load": min(over, default=None), **row}


def table(record: dict[str, Any]) -> str:
    """Load of each budget by family; of one that is not used up, the load of the next cut behind it."""
    lines = [f"| | {' | '.join(f'`--{name}`'.replace('_', '-') for name in BUDGETS)} |", "|---|--:|--:|--:|"]
    families = dict.fromkeys(row["family"] for row in record["budgets"])
    for family in families:
        cells = [_cell(row) for row in record["budgets"] if row["family"] == family]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if "load" not in row:
        return "not met"
    if row["load"] >= WANTED_LOAD or row["next_load"] is None:
        return f"{row['load']:.3f}"
    return f"{row['load']:.3f}, next {row['next_load']:.3f}"


if __name__ == "__main__":
    main()
