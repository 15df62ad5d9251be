"""How often the interval of a speed-up says what is so.

    python benchmarks/intervals.py
    python benchmarks/intervals.py --folder smollm2-s0.2/onnx --repetitions 20 --out results/intervals.json

Without a folder: invented rounds of two equal models, how often the interval holds 1, and how often it leaves
1 out when one of them is 5 % slower; the interval of measure/rounds/ratios.py beside a bootstrap of the
median. With a folder: contests of the same model twice, and a third time in a process that sleeps 5 % of each
step. Wanted: 1 in at least 18 of 20 intervals of the first two, and the sleeping one found in 18 of 20.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.measure import worker
from nirvana_deploy.measure.contest.contender import Contender, runtime_of
from nirvana_deploy.measure.contest.timing import time_contenders
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.rounds import processes
from nirvana_deploy.measure.rounds.ratios import Ratio, ratio_of
from nirvana_deploy.measure.worker import WorkerProcess
from nirvana_deploy.runtime import registry
from nirvana_deploy.runtime.runner import Runner

SLOWER = 1.05
WANTED = 0.9
"""Of the intervals of either kind."""
SLEEPING = "--sleeping"
Record = dict[str, Any]
Rounds = NDArray[np.float64]


def main() -> None:
    """Invent rounds, or measure some."""
    if SLEEPING in sys.argv:
        sleep_between()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="an ONNX folder")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", type=float, default=0.02)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.folder is None:
        invented()
        return
    record = measured(options)
    print(section(record))
    if options.out is not None:
        write_json(options.out, record)


def invented(benchmarks: int = 400) -> None:
    """Print a row for each kind of noise and number of rounds."""
    random = np.random.default_rng(0)
    noises: dict[str, Callable[[tuple[int, int]], Rounds]] = {
        "3 %": lambda shape: np.exp(0.03 * random.standard_normal(shape)),
        "8 %": lambda shape: np.exp(0.08 * random.standard_normal(shape)),
        "2 %, spikes": lambda shape: (
            np.exp(0.02 * random.standard_normal(shape))
            * (1 + (random.random(shape) < 0.15) * random.exponential(0.5, shape))
        ),
    }
    print(
        f"{'noise':<12}{'rounds':>7}   order statistics: holds 1, finds 5 %   bootstrap: holds 1, finds 5 %"
    )
    for kind, noise in noises.items():
        for rounds in (11, 21, 41):
            pairs = [noise((2, rounds)) for _ in range(benchmarks)]
            found = [
                np.mean([[holds(a, b), not holds(SLOWER * a, b)] for a, b in pairs], axis=0)
                for holds in (_holds_one, _bootstrap_holds_one)
            ]
            print(f"{kind:<12}{rounds:>7}" + "".join(f"{one:>14.1%}{two:>14.1%}   " for one, two in found))


def _holds_one(before: Sequence[float], after: Sequence[float]) -> bool:
    return not ratio_of(before, after).shows_difference


def _bootstrap_holds_one(before: Rounds, after: Rounds) -> bool:
    ratios = before / after
    draws = np.random.default_rng(1).integers(0, len(ratios), (1000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975))
    return bool(low <= 1 <= high)


class Sleeper:
    """A runner that takes SLOWER times as long as the one it has."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def prefill(self, *given: Any) -> Any:
        """As of Runner, and a nap."""
        return self._slept(self._runner.prefill, *given)

    def decode(self, *given: Any) -> Any:
        """As of Runner, and a nap."""
        return self._slept(self._runner.decode, *given)

    def _slept(self, work: Callable[..., Any], *given: Any) -> Any:
        start = time.perf_counter()
        found = work(*given)
        time.sleep((SLOWER - 1) * (time.perf_counter() - start))
        return found


class Process(WorkerProcess):
    """The process of a contender; that of the slower one runs this file, and sleeps."""

    def __init__(self, name: str, path: Path, *, threads: int | None, runtime: str | None = None) -> None:
        if name == "slower":
            self.program = ("-P", str(Path(__file__).resolve()), SLEEPING)
        super().__init__(name, path, threads=threads, runtime=runtime)


def sleep_between() -> None:
    """The end of the slower contender's process: a worker whose runner is a Sleeper."""
    sys.argv.remove(SLEEPING)
    open_runner = registry.open_runner

    def opened(path: Path, **how: Any) -> Sleeper:
        return Sleeper(open_runner(path, **how))

    with patch.object(registry, "open_runner", opened):
        worker.main()


def measured(options: argparse.Namespace) -> Record:
    """Contests of the same folder three times, one of them asleep now and then."""
    folder = options.folder
    contenders = [Contender(name, folder, runtime_of(folder, None)) for name in ("one", "again", "slower")]
    workload = Workload(
        prompt_tokens=32, new_tokens=33, threads=options.threads, precision=options.precision, max_minutes=1
    )
    found = []
    with patch.object(processes, "WorkerProcess", Process):
        for number in range(options.repetitions):
            contest = time_contenders(contenders, workload=workload)
            again, slower = (one["tpot_speedup_interval"] for one in contest["comparisons"])
            rounds = len(contest["variants"][0]["tpot_ms"]["samples"])
            cautions = contest["watch"]["cautions"]
            found.append({"rounds": rounds, "again": again, "slower": slower, "cautions": cautions})
            print(
                f"{number + 1} of {options.repetitions}: {_said(again)}; slower {_said(slower)}", flush=True
            )
    return {
        "schema": 1,
        "environment": contest["environment"],
        "workload": contest["workload"],
        "slower": SLOWER,
        "contests": found,
    }


def _said(ratio: Record) -> str:
    return f"{ratio['p50']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def section(record: Record) -> str:
    """How many intervals said what is so, how wide they were, and where it was measured."""
    contests, where, asked = record["contests"], record["environment"], record["workload"]
    count, rounds = len(contests), [one["rounds"] for one in contests]
    holds = sum(one["again"]["low"] <= 1 <= one["again"]["high"] for one in contests)
    finds = sum(Ratio(**one["slower"]).shows_difference and one["slower"]["p50"] < 1 for one in contests)
    widths = [Ratio(**one[name]).width for one in contests for name in ("again", "slower")]
    slower = [1 / one["slower"]["p50"] for one in contests]
    busy = sum(bool(one["cautions"]) for one in contests)
    return "\n".join(
        [
            f"| of {count} contests | found | wanted |",
            "|---|--:|--:|",
            f"| the same model twice: 1 in the interval | {holds} | {WANTED * count:g} |",
            f"| a runner that sleeps {record['slower'] - 1:.0%}: found slower | {finds} "
            f"| {WANTED * count:g} |",
            "",
            f"{min(rounds)} to {max(rounds)} rounds each, until the interval was within "
            f"{asked['precision']:.0%} or a minute was over; it was {median(widths):.1%} (median). The one "
            f"that sleeps was measured {min(slower):.3f} to {max(slower):.3f} times as slow. "
            f"{busy} of {count} had a caution on the machine; {where['threads']} thread(s) of "
            f"{where['cpu']}.",
        ]
    )


if __name__ == "__main__":
    main()
