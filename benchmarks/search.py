"""What a search takes and saves: its minutes, and its CPU seconds beside those of as many single commands.

    python benchmarks/search.py smollm2 --out results/search-cost.json
    python benchmarks/search.py smollm2 --preset fast --sparsity 0,0.2,0.4 --singles all --out FILE.json

A search and some of the `prune-export` commands that would find the same points one at a time, each in a
process of its own; --singles names points, as SPARSITY:PRECISION, or "all". What was not run is taken to cost
what the others of its precision did on average, or all others where none of it was run, and the record says
how many were. With --work what was run before is not run again. Each single command
must find its point's KL (to 1e-6) and its bytes: the point is what its recipe makes. The promise: the search
costs at most a third, and on two idle cores ends within 45 minutes, the timing of its front included. Exits
with 1 where one of them is broken. The CPU seconds are those of commands that time no model (--no-benchmark):
that part is the same for both. The search then goes on with --resume and times its front.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import environment
from nirvana_deploy.search.recipe import FLOAT

PROMISED_SHARE = 1 / 3
PROMISED_MINUTES = 45
Row = dict[str, Any]


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--sparsity", default="0,0.1,0.2,0.3,0.4,0.5")
    parser.add_argument("--precision", default="none,int8,w4")
    parser.add_argument("--singles", nargs="+", default=["0.3:none", "0.3:int8", "0.3:w4"])
    parser.add_argument("--preset", default="best")
    parser.add_argument("--processes", default="1")
    parser.add_argument("--threads", default="1", help="of each process [1]")
    parser.add_argument("--work", type=Path, help="keep the folders here [a temporary one]")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nirvana-search-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        record = measured(options, work)
    write_json(options.out, record)
    print(said(record))
    sys.exit(0 if record["kept"] else 1)


def measured(options: argparse.Namespace, work: Path) -> Row:
    """The search, the single commands, and what follows."""
    timed = ["--preset", options.preset, "--threads", options.threads]
    common = [*timed, "--no-benchmark"]
    load = os.getloadavg()[0]
    grid = ["--sparsity", options.sparsity, "--precision", options.precision]
    where = ["--out", str(work / "search"), "--processes", options.processes]
    words = ["search", options.model, *grid, *where]
    search = once(work / "search.cost.json", lambda: command(*words, *common))
    timing = once(work / "timing.cost.json", lambda: command(*words, *timed, "--resume"))
    minutes = (search["seconds"] + timing["seconds"]) / 60
    points = json.loads((work / "search/search.json").read_text())["points"]
    names = {f"{one['sparsity']:g}:{one['scheme'] or FLOAT}": one for one in points if one["sparsity"]}
    wanted = list(names) if options.singles == ["all"] else options.singles
    singles = [
        once(
            work / f"{name.replace(':', '-')}.cost.json",
            lambda name=name: single(options.model, name, names[name], work, common),
        )
        for name in wanted
    ]
    by_precision = {
        precision: fmean(one["cpu_s"] for one in singles if one["precision"] == precision)
        for precision in {one["precision"] for one in singles}
    }
    # the dense model in some precision is a by-product of any of its commands
    cuts = [name.partition(":")[2] for name in names]
    usual = fmean(by_precision.values())
    total = sum(by_precision.get(precision, usual) for precision in cuts)
    share = search["cpu_s"] / total
    return {
        "schema": 1,
        "model": options.model,
        "preset": options.preset,
        "sparsity": options.sparsity,
        "precision": options.precision,
        "processes": int(options.processes),
        "threads": int(options.threads),
        "minutes": round(minutes, 1),
        "promised_minutes": PROMISED_MINUTES,
        "timing": timing,
        "search": search
        | {"points": len(points), "failed": sum(one["failed"] is not None for one in points)},
        "cuts": cuts_in(work / "search"),
        "singles": singles,
        "single_commands": len(cuts),
        "single_commands_run": len(singles),
        "singles_cpu_s": total,
        "share": share,
        "promised_share": PROMISED_SHARE,
        "kept": share <= PROMISED_SHARE
        and minutes <= PROMISED_MINUTES
        and all(one["same_kl"] and one["same_bytes"] for one in singles),
        "environment": environment() | {"load_average_1min_before": load},
    }


def cuts_in(search: Path) -> list[Row]:
    """CPU seconds of the stages of each cut, and the bytes that it wrote; the first made what is shared.

    A file that several cuts have in common is the first one's.
    """
    seen: set[int] = set()
    rows = []
    for manifest in sorted(search.glob("s*/manifest.json")):
        stages = json.loads(manifest.read_text())["stages"]
        files = [file.stat() for file in manifest.parent.rglob("*") if file.is_file()]
        own = {file.st_ino: file.st_size for file in files if file.st_ino not in seen}
        seen |= set(own)
        taken = {name: round(stage["cpu_seconds"], 1) for name, stage in stages.items()}
        row = {"name": manifest.parent.name, "cpu_s": round(sum(taken.values()), 1)}
        rows.append({**row, "bytes": sum(own.values()), "stages_cpu_s": taken})
    return rows


def once(path: Path, measure: Callable[[], Row]) -> Row:
    """What was measured into ``path`` before, or now."""
    if not path.is_file():
        write_json(path, measure())
    return dict(json.loads(path.read_text()))


def single(model: str, name: str, point: Row, work: Path, common: list[str]) -> Row:
    """One command for one point."""
    sparsity, _, precision = name.partition(":")
    out = work / name.replace(":", "-")
    quantized = [] if precision == FLOAT else ["--quantize", precision]
    spent = command("prune-export", model, "--sparsity", sparsity, *quantized, "--out", str(out), *common)
    variant = "pruned" if precision == FLOAT else f"pruned-{precision}"
    kl = json.loads((out / "quality.json").read_text())["variants"][variant]["kl_vs_dense"]
    folder = out / ("onnx" if precision == FLOAT else f"onnx-{precision}")
    size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
    shutil.rmtree(out)
    return {
        "name": name,
        "precision": precision,
        **spent,
        "kl": kl,
        "kl_of_the_point": point["kl"],
        "same_kl": abs(kl - point["kl"]) <= 1e-6,
        "same_bytes": size == point["weights_bytes"],
    }


def command(*words: str) -> Row:
    """Run a command of nirvana-deploy; its seconds and CPU seconds, its processes' included."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "nirvana_deploy", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"nirvana-deploy {' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
    }


def said(record: Row) -> str:
    """In words."""
    search, singles = record["search"], record["singles"]
    lines = [
        f"{search['points']} points: {search['cpu_s']:,.0f} CPU s; {record['minutes']:.0f} minutes, "
        f"{record['timing']['seconds'] / 60:.0f} of them to time the front (wanted: {PROMISED_MINUTES})",
        f"{record['single_commands']} commands ({record['single_commands_run']} run): "
        f"{record['singles_cpu_s']:,.0f} CPU s; the search takes {record['share']:.2f} of it",
    ]
    lines += [
        f"{one['name']}: {one['cpu_s']:,.0f} CPU s, KL {one['kl']:.6f}"
        f"{'' if one['same_kl'] and one['same_bytes'] else ', NOT what the search found'}"
        for one in singles
    ]
    return "\n".join([*lines, "Kept." if record["kept"] else "BROKEN."])


if __name__ == "__main__":
    main()
