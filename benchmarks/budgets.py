"""Whether a budget is met, and how nearly: the sparsity is found by measuring cuts.

    python benchmarks/budgets.py smollm2 --preset fast --out results/budgets.json
    python benchmarks/budgets.py smollm2 --budget max_kl=0.2 min_speedup=1.3 --out FILE.json

Each budget is one `prune-export` with that option alone. Its load is what was measured over what is allowed
(of a speed-up the other way round): at most 1, and wanted is at least 0.95. Time budgets are measured in
alternating rounds, so the machine should be idle. Exits with 1 where a budget is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nirvana_deploy import Target, meet_target
from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import cpu_seconds, environment
from nirvana_deploy.search.load import loads

BUDGETS = ("max_weights_bytes=450000000", "max_kl=0.5", "min_speedup=1.2")
WANTED_LOAD = 0.95


def main() -> None:
    """Meet every budget and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--preset", default="best")
    parser.add_argument("--budget", nargs="+", default=BUDGETS)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    how: dict[str, Any] = {"preset": options.preset, "run_benchmark": False, "threads": options.threads}
    rows = []
    for budget in options.budget:
        with tempfile.TemporaryDirectory(prefix="nirvana-budget-") as folder:
            rows.append(met(options.model, budget, Path(folder) / "out", **how))
    write_json(
        options.out,
        {
            "schema": 1,
            "model": options.model,
            "preset": options.preset,
            "budgets": rows,
            "environment": environment() | {"load_average_1min_after": os.getloadavg()[0]},
        },
    )
    sys.exit(0 if all(row.get("load", 2) <= 1 for row in rows) else 1)


def met(model: str, budget: str, out: Path, **options: Any) -> dict[str, Any]:
    """One budget, its trials, and how much of it the chosen cut, made in ``out``, uses."""
    name, _, limit = budget.partition("=")
    target = Target(**{name: int(limit) if name.endswith("bytes") else float(limit)})
    started, cpu_started = time.perf_counter(), cpu_seconds()
    row: dict[str, Any] = {"budget": {name: float(limit)}}
    try:
        done = meet_target(model, target, out=out, **options)
    except NirvanaError as error:
        row["failed"] = error.message
    else:
        row |= {"load": loads(done.chosen, target).most, "chosen": done.chosen.name}
        row["trials"] = [
            {"load": loads(one, target).most}
            | {key: value for key, value in asdict(one).items() if value is not None}
            for one in done.trials
        ]
    row |= {"seconds": time.perf_counter() - started, "cpu_s": cpu_seconds() - cpu_started}
    said = row.get("failed") or f"{row['chosen']} after {len(row['trials']) - 1} cuts, load {row['load']:.3f}"
    near = "" if row.get("load", 0) >= WANTED_LOAD else "  (wanted 0.95 to 1)"
    print(f"{budget:<30} {said}{near}; {row['cpu_s']:,.0f} CPU s", flush=True)
    return row


if __name__ == "__main__":
    main()
