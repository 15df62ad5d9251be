"""What a whole job costs by stage: seconds, CPU seconds, peak memory, from the manifest of its folder.

    python benchmarks/job_cost.py demo [--json benchmarks/results/job-cost.json]
    python benchmarks/job_cost.py 1b --layers 2 [--json FILE]
    python benchmarks/job_cost.py "demo, before" --of FOLDER [--json FILE]

Runs the command of `make demo` in a temporary folder: as it stands, or on random weights in the shape of
Llama-3.2-1B or Llama-3-8B with SmolLM2's tokenizer, whose ids are the first of that vocabulary. With --of a
folder that is there already is read. FILE is continued when it exists: one entry for each job. CPU seconds
grow with the load of a machine; the load before the job is recorded.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scale import SHAPES, write_random_checkpoint

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import measured_environment, usable_threads
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.units import format_bytes
from nirvana_deploy.model.sources import resolve_model

ROOT = Path(__file__).resolve().parent.parent
_SHAPES = ("1b", "8b")
_OF_A_STAGE = ("seconds", "cpu_seconds", "peak_rss_bytes")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    """Run or read the job, print its table, and add it to the record."""
    options = _options()
    if options.of is not None:
        name, found = options.job, cost_of(options.of)
    else:
        environment = measured_environment(threads=usable_threads())
        name = options.job + (f", {options.layers} layers" if options.layers else "")
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="nirvana-job-") as work:
            found = {"environment": environment, **run(options, Path(work))}
    print(table({name: found}))
    if options.json is not None:
        record = read_json(options.json) if options.json.is_file() else {"schema": 1, "jobs": {}}
        record["jobs"][name] = found
        write_json(options.json, record)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", help=f"demo, or a shape ({', '.join(_SHAPES)}); with --of what to call it")
    parser.add_argument("--layers", type=int, help="of the shape [its own]")
    parser.add_argument("--of", type=Path, metavar="FOLDER", help="a finished folder to read")
    parser.add_argument("--folder", type=Path, help="where files go for a while [the system's]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.of is None and options.job not in {"demo", *_SHAPES}:
        parser.error(f"no such job: {options.job!r}")
    if options.layers is not None and options.job not in _SHAPES:
        parser.error("--layers is of a shape")
    return options


def demo_words() -> list[str]:
    """The command of `make demo` without the program's name and the folder."""
    line = re.search(r"^demo:.*\n\t\S+/nirvana-deploy (.*) --out demo", (ROOT / "Makefile").read_text(), re.M)
    assert line is not None
    return shlex.split(line[1])


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the job below ``work`` and return what it cost."""
    command, model, *words = demo_words()
    if options.job in _SHAPES:
        config = SHAPES[options.job]
        write_random_checkpoint(
            work / "model", config | {"num_hidden_layers": options.layers or config["num_hidden_layers"]}
        )
        for file in _TOKENIZER:
            shutil.copyfile(resolve_model(model).path / file, work / "model" / file)
        model = str(work / "model")
    job = [command, model, *words, "--out", str(work / "out")]
    subprocess.run([sys.executable, "-m", "nirvana_deploy", *job], check=True, stdout=subprocess.DEVNULL)
    return cost_of(work / "out")


def cost_of(folder: Path) -> dict[str, Any]:
    """What the manifest of a finished ``folder`` says of its stages."""
    manifest = read_json(folder / "manifest.json")
    stages = {
        name: {what: stage[what] for what in _OF_A_STAGE}
        for name, stage in manifest["stages"].items()
        if stage.get("seconds") is not None
    }
    return {"packages": manifest["environment"], "stages": stages}


def table(jobs: Mapping[str, Mapping[str, Any]]) -> str:
    """Stages by row, three columns a job, and the sum; in Markdown."""
    heads = [f"{name}: s | CPU s | peak" for name in jobs]
    lines = [f"| stage | {' | '.join(heads)} |", f"|---|{'--:|' * (3 * len(jobs))}"]
    names = list(dict.fromkeys(stage for job in jobs.values() for stage in job["stages"]))
    for stage in names:
        cells = [_cells(job["stages"].get(stage)) for job in jobs.values()]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    sums = []
    for job in jobs.values():
        seconds, cpu = (sum(one[what] for one in job["stages"].values()) for what in _OF_A_STAGE[:2])
        peak = max(one["peak_rss_bytes"] for one in job["stages"].values())
        sums.append(_cells({"seconds": seconds, "cpu_seconds": cpu, "peak_rss_bytes": peak}))
    lines.append(f"| all | {' | '.join(sums)} |")
    loads = [
        f"{name}: {job['environment']['load_average_1min']:.1f}"
        for name, job in jobs.items()
        if "environment" in job
    ]
    return "\n".join([*lines, *(["", f"Load before it began: {', '.join(loads)}."] if loads else [])])


def _cells(stage: Mapping[str, Any] | None) -> str:
    if stage is None:
        return "| |"
    peak = format_bytes(stage["peak_rss_bytes"])
    return f"{stage['seconds']:.1f} | {stage['cpu_seconds']:.1f} | {peak}"


if __name__ == "__main__":
    main()
