"""What a pruned draft gains: every target with every draft, 1 to 6 draft tokens, in onnxruntime-genai.

    nirvana-deploy export smollm2 --flavor gqa --out dense
    nirvana-deploy export smollm2-s0.2/checkpoint --flavor gqa --out cut
    nirvana-deploy quantize cut --scheme w4 --head --out cut-w4
    python benchmarks/speculative.py smollm2 --target fp32=dense --draft "0.2, w4=cut-w4" --out FILE.json

NAME=FOLDER says what a model is called, and the ONNX folder, of flavor gqa, that it lies in. A model
does not draft for itself. The target answers twenty prompts alone and with its draft, in turn, so a busy
machine slows both; its load is recorded. Exits with 1 where an answer is not the target's own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nirvana_deploy import VerificationError, package_speculative
from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import cpu_name, environment
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.shown.progress import ShownProgress
from nirvana_deploy.report.pages import speculative as words

HEADERS = ("Target", "Draft", *words.HEADERS)


def main() -> None:
    """Measure all pairs, write, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--target", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--draft", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    asked = [(target, draft) for target in options.target for draft in options.draft]
    pairs: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "schema": 1,
        "model": options.model,
        "pairs": pairs,
        "environment": {
            "cpu": cpu_name(),
            **environment(),
            "load_average_1min_before": os.getloadavg()[0],
        },
    }
    for target, draft in asked:
        if target.rpartition("=")[2] != draft.rpartition("=")[2]:
            pairs.append(measured(target, draft, threads=options.threads))
            record["environment"]["load_average_1min_after"] = os.getloadavg()[0]
            write_json(options.out, record)
    print(section(record))
    sys.exit(0 if all(pair["same_answers"]["passed"] for pair in pairs) else 1)


def measured(target: str, draft: str, *, threads: int | None) -> dict[str, Any]:
    """One pair: what ``package --speculative`` records of it, under the names given."""
    (target_name, _, target_folder), (draft_name, _, draft_folder) = (
        one.rpartition("=") for one in (target, draft)
    )
    with tempfile.TemporaryDirectory(
        prefix="speculative-", dir=Path(target_folder).resolve().parent
    ) as place:
        out = Path(place) / "package"
        try:
            package_speculative(
                target_folder, out, draft=draft_folder, threads=threads, progress=ShownProgress()
            )
        except VerificationError as error:
            print(error)
        found: dict[str, Any] = read_json(out / "speculative.json")
    del found["environment"]  # that of the whole is beside the pairs
    return {**found, "target": target_name, "draft": draft_name}


def section(record: Mapping[str, Any]) -> str:
    """The table of a record, and what it says."""
    rows = [row for pair in record["pairs"] for row in _rows(pair)]
    rule = ["---", "---", "---:", *["---:"] * (len(words.HEADERS) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in (HEADERS, rule, *rows)]
    where = record["environment"]
    loads = " and ".join(f"{where[f'load_average_1min_{when}']:.1f}" for when in ("before", "after"))
    threads = record["pairs"][0]["threads"] or "all"
    note = (
        f"{threads} of {where['logical_cores']} cores of {where['cpu']}, onnxruntime-genai "
        f"{where['onnxruntime-genai']}; load before and after {loads}."
    )
    said = [f"Target {pair['target']}: {' '.join(words.says(pair))}" for pair in record["pairs"]]
    return "\n".join([*lines, "", *said, note])


def _rows(pair: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    return [(pair["target"], pair["draft"], *row) for row in words.rows(pair)]


if __name__ == "__main__":
    main()
