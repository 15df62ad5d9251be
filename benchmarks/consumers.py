"""Which program loads which artifact: run every test marked ``consumer`` and keep what it found.

    python benchmarks/consumers.py [--json FILE] [TESTS ...]
    python -m pytest -m consumer --slow --consumers part.json TESTS
    python benchmarks/consumers.py --found part.json

The README's table "where does it run" is made from the record: a row stands in it because its test ran and
passed. What was not run is listed with the reason, and claims nothing. TESTS [all] are what pytest is given;
rows of other tests stay as they were recorded. --found takes what such runs of pytest wrote and runs none.
Exits with 1 when a test failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import environment
from nirvana_deploy.base.reading import read_json

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "consumers.json"
NOT_RUN = [
    {
        "consumer": "vLLM",
        "artifact": "HF folder, uniform",
        "reason": "its wheel on PyPI (0.33.0, 336 MB) is built for CUDA; what it would read is the stock "
        "folder that transformers loads without code",
    },
    {
        "consumer": "optimum (ORTModelForCausalLM)",
        "artifact": "ONNX folder with fewer heads or a head_dim of its own",
        "reason": "optimum-onnx 0.1.0 makes the first, empty cache with hidden_size / num_attention_heads "
        "for head_dim, which ONNX Runtime refuses; it also asks for transformers below 4.58",
    },
    {
        "consumer": "Triton Inference Server",
        "artifact": "model repository",
        "reason": "the server comes as a container; its configuration schema and the decode model were run",
    },
    {
        "consumer": "TensorRT, TensorRT for RTX",
        "artifact": "engine, running",
        "reason": "needs an NVIDIA GPU; building one does not",
    },
]
_WORSE = ["passed", "skipped", "failed"]


def rows_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each program and artifact; it passed when every test that shows it did."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in found:
        place = (one["consumer"], one["artifact"])
        tests = [*rows.get(place, {"tests": []})["tests"], one["test"]]
        worst = max(rows.get(place, one), one, key=lambda row: _WORSE.index(row["outcome"]))
        rows[place] = {**{key: value for key, value in worst.items() if key != "test"}, "tests": tests}
    return [rows[key] for key in sorted(rows)]


def section(record: dict[str, Any]) -> str:
    """The README's table: what ran, by which version, shown by what; then what did not run, and why."""
    lines = ["| Program | Artifact | What the test shows |", "| --- | --- | --- |"]
    for row in record["rows"]:
        if row["outcome"] == "passed":
            lines.append(f"| {row['consumer']} {row['version']} | {row['artifact']} | {row['proof']} |")
    for row in [*record["rows"], *record["not_run"]]:
        if row.get("outcome") != "passed":
            why = "FAILED" if row.get("outcome") == "failed" else f"not run: {row['reason']}"
            lines.append(f"| {row['consumer']} | {row['artifact']} | {why} |")
    return "\n".join(lines)


def run_tests(tests: Sequence[str]) -> list[dict[str, Any]]:
    """What the tests marked ``consumer`` among ``tests`` [all] found."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "consumer", "--slow", "--consumers", str(file)]
        subprocess.run([*command, *tests], cwd=ROOT, check=False)
        found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


def main() -> None:
    """Run the tests, merge with what was recorded, write, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", metavar="TESTS")
    parser.add_argument("--found", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--json", type=Path, default=RECORD, metavar="FILE")
    options = parser.parse_args()
    found = [one for file in options.found for one in json.loads(file.read_text())]
    if not options.found:
        found = run_tests(options.tests)
    rows = rows_of(found)
    partly = bool(options.tests or options.found)
    ran = {test for row in rows for test in row["tests"]}
    before = read_json(options.json)["rows"] if options.json.is_file() and partly else []
    kept = [row for row in before if not ran & set(row["tests"])]
    record = {
        "schema": 1,
        "environment": environment(),
        "rows": sorted([*kept, *rows], key=lambda row: (row["consumer"], row["artifact"])),
        "not_run": NOT_RUN,
    }
    write_json(options.json, record)
    print(section(record))
    sys.exit(1 if any(one["outcome"] == "failed" for one in found) else 0)


if __name__ == "__main__":
    main()
