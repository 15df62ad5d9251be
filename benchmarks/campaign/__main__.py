"""Try to break the command line, and count: ``python benchmarks/campaign [SUBJECT ...]``.

    python benchmarks/campaign                       # all subjects, a short form of each
    python benchmarks/campaign kills --trials 200
    python benchmarks/campaign hostile --seed 7 --only 31 -v     # that trial again

Exits with 1 when a trial failed. README.md says what each subject does.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import resource
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent.parent)
sys.path += [str(HERE.parent), str(HERE.parent.parent / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

SUBJECTS = {
    "kills": (2, 200),
    "disks": (1, 50),
    "permissions": (2, 200),
    "hostile": (4, 700),
    "odd_options": (3, 300),
    "forced": (1, 100),
    "writers": (1, 20),
    "resumed": (1, 20),
    "requests": (20, 2000),
    "soak": (1, 50),
}
"""Subject -> its count in the short form and in the long one."""


def main() -> None:
    """Run the subjects named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)} [all]")
    parser.add_argument("--trials", type=int, metavar="N", help="count of each subject [the short form's]")
    parser.add_argument("--long", action="store_true", help="the long form, for the record and README.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="run trial N alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and failures there")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what every trial did")
    options = parser.parse_args()
    if unknown := set(options.subjects).difference(SUBJECTS):
        parser.error(f"no subject {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    record = {}
    base = Path(tempfile.mkdtemp(prefix="campaign-"))  # nothing that a child's exit would remove
    try:
        world = _world(base)
        for name in options.subjects or SUBJECTS:
            record[name] = _run(name, world, options)
    finally:
        shutil.rmtree(base)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.long:
        from campaign.record import keep

        keep(record)
    sys.exit(any(part["failed"] for part in record.values()))


def _world(base: Path) -> Any:
    """The world of the trials; home and cache of everything that follows lie in it."""
    from campaign import trial
    from campaign.world import World

    world = World(base)
    for variable in [name for name in os.environ if name.startswith(("XDG_", "HF_"))]:
        del os.environ[variable]
    os.environ |= {"HOME": str(world.home), "TMPDIR": str(world.temporary), "HF_HUB_OFFLINE": "1"}
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(base / "hypothesis")
    tempfile.tempdir = None  # which it remembers
    trial.warm()
    world.strays()  # what imports left
    return world


def _run(name: str, world: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The trials of one subject: what the record says of them."""
    subject = importlib.import_module(f"campaign.subjects.{name}")
    record: dict[str, Any] = {
        "unit": subject.UNIT,
        "count": 0,
        "trials": 0,
        "failed": 0,
        "seed": options.seed,
    }
    if reason := getattr(subject, "why_not", str)():
        print(f"{name}: not run, {reason}")
        return record | {"not_run": reason}
    failures, cpu, wanted = [], _cpu_seconds(), options.trials or SUBJECTS[name][options.long]
    more = (wanted,) if getattr(subject, "LONG", False) else ()
    for number in itertools.count() if options.only is None else (options.only,):
        if record["count"] >= wanted:
            break
        result = subject.trial(world, Random(f"{name} {options.seed} {number}"), *more)
        record["count"] += result.count
        record["trials"] += 1
        again = f"python benchmarks/campaign {name} --seed {options.seed} --only {number} -v"
        if result.complaints:
            failures.append({"did": result.said, "complaints": list(result.complaints), "again": again})
            print(f"{name}: {result.said}\n    {'; '.join(result.complaints)}\n    {again}", flush=True)
        if options.verbose:
            print(f"{name} {number}: {result.said}\n{result.output}", flush=True)
    record |= {"failed": len(failures), "cpu_seconds": round(_cpu_seconds() - cpu, 1), "failures": failures}
    counts = f"{record['count']} {subject.UNIT}, {len(failures)} of {record['trials']} trials failed"
    print(f"{name}: {counts}, {record['cpu_seconds']:.0f} s of CPU", flush=True)
    return record


def _cpu_seconds() -> float:
    """What children have used that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
