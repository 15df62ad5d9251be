"""What a KV group and an FFN neuron cost per decoded token: milliseconds of ONNX Runtime, beside bytes.

    python benchmarks/unit_cost.py [MODEL] [--scheme fp32 --scheme int8 --scheme w4] [--runs 2] [--json FILE]

A weight of attention against one of the FFN is the last column: 1 where milliseconds and weights say the same
of a cut. Every scheme is measured --runs times, for the spread. Promise: every run tells both kinds of unit
from the noise. Exits with 1 when it is broken, as it is on a machine that has other work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import default_threads, measured_environment
from nirvana_deploy.measure.bounds import mean_context_tokens
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.units.unit_cost import UnitTime, bytes_cost, unit_times
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.prune.curves.budget import UnitCost, weight_cost

FLOAT = "fp32"


def main() -> None:
    """Measure, print the table, and say whether the promise holds."""
    options = _options()
    checkpoint = Checkpoint.open(resolve_model(options.model).path)
    workload = Workload(
        prompt_tokens=options.context_tokens - options.new_tokens // 2,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        threads=options.threads or default_threads(),
    )
    record: dict[str, Any] = {
        "schema": 1,
        "model": options.model,
        "environment": measured_environment(threads=workload.threads or default_threads()),
        "workload": asdict(workload),
        "flavor": options.flavor,
        "rows": [],
    }
    print(header(record), flush=True)
    for _ in range(options.runs):
        for name in options.schemes or [FLOAT, "int8", "w4"]:
            row = measured_row(checkpoint, name, options.flavor, workload)
            record["rows"].append(row)
            print(line(row), flush=True)
    for text in spread(record["rows"]):
        print(text)
    if options.json:
        write_json(options.json, record)
    kept = all(row["group"]["measured"] and row["neuron"]["measured"] for row in record["rows"])
    print("Promise kept." if kept else "The promise is broken: some units do not stand out of the noise.")
    sys.exit(0 if kept else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2", metavar="MODEL")
    parser.add_argument("--scheme", action="append", dest="schemes", help="[fp32, int8 and w4]")
    parser.add_argument("--flavor", default="portable")
    parser.add_argument("--context-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--threads", type=int, help="[physical cores]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def measured_row(checkpoint: Checkpoint, name: str, flavor: str, workload: Workload) -> dict[str, Any]:
    """One run of one scheme."""
    scheme = None if name == FLOAT else name
    times = unit_times(checkpoint, scheme=scheme, dtype=FLOAT, flavor=flavor, workload=workload)
    context_tokens = mean_context_tokens(prompt_tokens=workload.prompt_tokens, new_tokens=workload.new_tokens)
    by_bytes = bytes_cost(checkpoint.shape, scheme=scheme, dtype=FLOAT, context_tokens=context_tokens)
    weights = weight_cost(checkpoint.shape)
    group = times.group
    if group is None:
        raise SystemExit("The model has one KV head: attention is never cut and has no cost to measure.")
    return {
        "scheme": name,
        "layers": times.layers,
        "step_ms": times.step_ms,
        "group": unit_record(group, weights.group, by_bytes.group),
        "neuron": unit_record(times.neuron, weights.neuron, by_bytes.neuron),
        "attention_over_ffn_ms": over_ffn(UnitCost(group.ms, times.neuron.ms, "ms"), weights),
        "attention_over_ffn_bytes": over_ffn(by_bytes, weights),
        "load_average_1min": os.getloadavg()[0],
    }


def unit_record(time: UnitTime, weights: float, bytes_read: float) -> dict[str, Any]:
    """One kind of unit."""
    return {
        "ms": time.ms,
        "error_ms": time.error_ms,
        "measured": time.measured,
        "ms_per_million_weights": 1e6 * time.ms / weights,
        "bytes": bytes_read,
    }


def over_ffn(cost: UnitCost, weights: UnitCost) -> float:
    """Cost of a weight of attention over that of the FFN."""
    return (cost.group / weights.group) / (cost.neuron / weights.neuron)


def header(record: Mapping[str, Any]) -> str:
    """Machine, workload, names of columns."""
    environment, workload = record["environment"], record["workload"]
    return (
        f"{record['model']} ({record['flavor']}), {environment['cpu']}, {environment['threads']} threads, "
        f"load {environment['load_average_1min']}; {workload['prompt_tokens']} + {workload['new_tokens']} "
        f"tokens, {workload['repeats']} rounds\n"
        f"{'':6}{'step ms':>9}{'us/group':>16}{'us/neuron':>16}{'ms/M attention':>16}{'ms/M FFN':>10}"
        f"{'ratio':>7}{'bytes':>7}{'load':>6}"
    )


def line(row: Mapping[str, Any]) -> str:
    """One row; "?" where a unit does not stand out of the noise."""
    group, neuron = row["group"], row["neuron"]
    units = [
        f"{1e3 * unit['ms']:.2f} ± {1e3 * unit['error_ms']:.2f}{'' if unit['measured'] else '?'}"
        for unit in (group, neuron)
    ]
    return (
        f"{row['scheme']:6}{row['step_ms']:>9.2f}{units[0]:>16}{units[1]:>16}"
        f"{group['ms_per_million_weights']:>16.3f}{neuron['ms_per_million_weights']:>10.3f}"
        f"{row['attention_over_ffn_ms']:>7.2f}{row['attention_over_ffn_bytes']:>7.2f}"
        f"{row['load_average_1min']:>6.1f}"
    )


def spread(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per scheme, the ratio over its runs."""
    found = []
    for name in dict.fromkeys(row["scheme"] for row in rows):
        ratios = [row["attention_over_ffn_ms"] for row in rows if row["scheme"] == name]
        found.append(
            f"{name}: attention over FFN {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} runs"
        )
    return found


if __name__ == "__main__":
    main()
