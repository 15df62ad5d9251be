"""Three readings by a newcomer's clock: clone to first report, README to own model, report to decision.

    python benchmarks/newcomer.py --model FOLDER --json benchmarks/results/newcomer.json
    python benchmarks/newcomer.py --readings decision --report demo/report.html

first-report: clones this repository, then `make demo` there: seconds of the clone, of the set-up, and of the
job. Caches are empty, so packages and the model's weights come over the network.
own-model: the commands of README.md on a folder of weights of one's own, counted from the clone on; at most
ten. Where first-report is read too, in its clone, else in the environment of this script.
decision: the report in headless Chromium, on a desktop and a phone. The verdict and its reason are to be read
without scrolling; counted are the words before the end of the reason.

FILE is continued: a reading that is taken again takes the place of the older one. Exits with 1 where what is
wanted was not found.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import measured_environment, usable_threads
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.units import format_seconds

ROOT = Path(__file__).resolve().parent.parent
READINGS = ("first-report", "own-model", "decision")
MOST_COMMANDS = 10
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
"""Width and height in CSS pixels."""
PROGRAM = "nirvana-deploy"
_TRIAL = "Try it: "
_PLACE = "smollm2-s0.4"
"""The folder that README's commands go on with."""
_MEASURE = r"""(() => {
  const [heading, why] = [".verdict h2", ".verdict p"].map((one) => document.querySelector(one));
  const end = (one) => one && one.getBoundingClientRect().bottom + scrollY;
  const said = (text) => text.match(/\S+/g) || [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const read = document.createRange();
  read.setStart(document.body, 0);
  if (why) read.setEndAfter(why);
  let words = 0;
  while (why && texts.nextNode() && read.comparePoint(texts.currentNode, 0) <= 0) {
    const { data, parentElement } = texts.currentNode;
    if (parentElement.checkVisibility()) words += said(data).length;
  }
  return {
    verdict: heading && said(heading.textContent).join(" "), why: why && said(why.textContent).join(" "),
    verdict_ends_px: end(heading), why_ends_px: end(why), words,
  };
})()"""
Record = dict[str, Any]


def main() -> None:
    """Take the readings that are asked for, print their table, and add them to the record."""
    options = _options()
    found: dict[str, Record] = {}
    record: Record = {"schema": 1, "readings": {}}
    if options.json is not None and options.json.is_file():
        record = read_json(options.json)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="nirvana-newcomer-") as work:
        clone = Path(work) / "clone"
        take: dict[str, Callable[[], Record]] = {
            "first-report": lambda: first_report(clone),
            "own-model": lambda: own_model(options.model, Path(work), clone, more=shlex.split(options.more)),
            "decision": lambda: decision(options.report or clone / "demo" / "report.html", Path(work)),
        }
        for name in (one for one in READINGS if one in options.readings):
            record["readings"][name] = found[name] = measured(take[name])
            if options.json is not None:  # a later reading that fails takes none away
                write_json(options.json, record)
    print(section(record))
    if missed := missed_by({"readings": found}):
        sys.exit("\n".join(missed))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readings", nargs="+", choices=READINGS, default=READINGS)
    parser.add_argument("--model", type=Path, help="a folder with safetensors, for own-model")
    parser.add_argument(
        "--more", default="", help="options for its prune-export, as in --more '--seq-len 64'"
    )
    parser.add_argument("--report", type=Path, help="report.html, for decision [that of the demo]")
    parser.add_argument("--folder", type=Path, help="where files go for a while [the system's]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if "own-model" in options.readings and options.model is None:
        parser.error("own-model needs --model FOLDER")
    if "decision" in options.readings and options.report is None and "first-report" not in options.readings:
        parser.error("decision needs --report FILE, or first-report before it")
    return options


def measured(take: Callable[[], Record]) -> Record:
    """A reading with where it was taken, and the machine's load before and after."""
    environment = measured_environment(threads=usable_threads())
    return {"environment": environment, **take(), "load_average_1min_after": psutil.getloadavg()[0]}


def first_report(clone: Path) -> Record:
    """Seconds from a clone to the report of `make demo`."""
    clean = {**_environment(), "XDG_CACHE_HOME": str(clone.with_name("cache"))}
    steps = {
        "clone_seconds": (["git", "clone", "--quiet", str(ROOT), str(clone)], ROOT),
        "set_up_seconds": (["make", ".venv/.demo-ready"], clone),
        "demo_seconds": (["make", "demo"], clone),
    }
    seconds = {name: _seconds(command, where, clean) for name, (command, where) in steps.items()}
    if not (clone / "demo" / "report.html").is_file():
        sys.exit("make demo wrote no demo/report.html")
    return {**seconds, "python": sys.version.partition(" ")[0]}


def own_model(model: Path, work: Path, clone: Path, *, more: list[str]) -> Record:
    """Type README's commands on ``model``; ``generate`` as prune-export prints it, if it recommends one."""
    made = clone / ".venv" / "bin" / PROGRAM
    program = [str(made)] if made.is_file() else [sys.executable, "-m", "nirvana_deploy"]
    inherited = _environment() if made.is_file() else None
    place = work / "own"
    place.mkdir()
    (place / model.name).symlink_to(model.resolve())
    steps, trial = [], ""
    for line in commands_for(f"./{model.name}"):
        words = shlex.split(line)
        if words[0] != PROGRAM:
            steps.append({"command": line, "seconds": None})
            continue
        line = trial if trial and words[1] == "generate" else line
        asked = [*shlex.split(line)[1:], *(more if words[1] == "prune-export" else [])]
        start = time.perf_counter()
        done = subprocess.run(
            [*program, *asked], cwd=place, env=inherited, stdout=subprocess.PIPE, text=True, check=False
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{line}\nended with exit code {done.returncode}: {done.stdout[-2000:]}")
        trial = next(
            (said.removeprefix(_TRIAL) for said in done.stdout.splitlines() if said.startswith(_TRIAL)), trial
        )
        steps.append({"command": shlex.join([PROGRAM, *asked]), "seconds": seconds})
    return {"model": model.name, "steps": steps}


def commands_for(model: str) -> list[str]:
    """The commands that README.md has for a model of one's own: from the clone on, without the demo."""
    sys.path.append(str(ROOT / "tests"))
    from builders.documents import lines_of

    lines = lines_of("README.md")
    begin = next(at for at, line in enumerate(lines) if " MODEL" in line)
    install = re.search(r"`(pip install -e [^`]*)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert install is not None
    out = f"{Path(model).name}-s0.4"
    named = {"MODEL": model}
    own = [
        shlex.join(named.get(word, word).replace(_PLACE, out) for word in shlex.split(line))
        for line in lines[begin:]
    ]
    return [next(line for line in lines if line.startswith("git clone")), install[1], *own]


def decision(report: Path, work: Path) -> Record:
    """Where verdict and reason end on a report, at each of SIZES."""
    sys.path.append(str(ROOT / "tests"))
    from builders.browser import PROGRAMS, Chromium

    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        sys.exit("decision needs Chromium: apt-get install chromium")
    browser = Chromium(program, Path(tempfile.mkdtemp(dir=work)))
    sizes = {}
    try:
        for name, (width, height) in SIZES.items():
            browser.open(report, width=width, height=height)
            sizes[name] = {"width_px": width, "height_px": height, **browser.evaluate(_MEASURE)}
    finally:
        browser.close()
    return {"sizes": sizes}


def _environment() -> dict[str, str]:
    """This process's environment without its path to the package."""
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}


def _seconds(command: list[str], where: Path, environment: Mapping[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=where, env=environment, stdout=sys.stderr, check=True)
    return time.perf_counter() - start


def missed_by(record: Record) -> list[str]:
    """What was wanted and not found, as sentences."""
    readings = record["readings"]
    missed = []
    if "own-model" in readings and (count := len(readings["own-model"]["steps"])) > MOST_COMMANDS:
        missed.append(f"own-model takes {count} commands, of {MOST_COMMANDS}")
    for name, one in readings.get("decision", {}).get("sizes", {}).items():
        for what in ("verdict", "why"):
            end = one[f"{what}_ends_px"]
            if end is None or end > one["height_px"]:
                missed.append(f"decision on a {name}: the {what} ends at {end}, of {one['height_px']} pixels")
    return missed


def section(record: Record) -> str:
    """The readings as a table, then where they were taken; in Markdown."""
    readings = record["readings"]
    rows = [row for name in READINGS if name in readings for row in _ROWS[name](readings[name])]
    places = [
        f"{name}: {where['threads']} thread(s) of {where['cpu']}, load before and after "
        f"{where['load_average_1min']:.1f} and {readings[name]['load_average_1min_after']:.1f}."
        for name in READINGS
        if name in readings and (where := readings[name]["environment"])
    ]
    head = ["| Reading | Found | Wanted |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows), "", *places])


def _first_rows(reading: Record) -> Iterator[tuple[str, str, str]]:
    parts = {what: reading[f"{what}_seconds"] for what in ("clone", "set_up", "demo")}
    said = ", ".join(f"{what.replace('_', '-')} {format_seconds(one)}" for what, one in parts.items())
    yield "Clone to first report", f"{format_seconds(sum(parts.values()))}: {said}", ""


def _own_rows(reading: Record) -> Iterator[tuple[str, str, str]]:
    steps = reading["steps"]
    said = ", ".join(
        f"{one['command'].split()[1]} {format_seconds(one['seconds'])}"
        for one in steps
        if one["seconds"] is not None
    )
    found = f"{len(steps)} commands with clone and set-up; {said}"
    yield f"README to own model ({reading['model']})", found, f"at most {MOST_COMMANDS} commands"


def _decision_rows(reading: Record) -> Iterator[tuple[str, str, str]]:
    for name, one in reading["sizes"].items():
        place = f"Report to decision, {name} of {one['width_px']} x {one['height_px']}"
        ends = (
            "no verdict"
            if one["why_ends_px"] is None
            else f"the reason ends at {one['why_ends_px']:.0f} pixels"
        )
        yield place, f"{ends}, after {one['words']} words: “{one['verdict']}”", "without scrolling"


_ROWS = {"first-report": _first_rows, "own-model": _own_rows, "decision": _decision_rows}


if __name__ == "__main__":
    main()
