"""How often the interval of a speed-up says what is so.

    python benchmarks/intervals.py
    python benchmarks/intervals.py --folder smollm2-s0.2/onnx --repetitions 20 --out results/intervals.json

Without a folder: invented rounds of two equal models, how often the interval holds 1, and how often it leaves
1 out when one of them is 5 % slower; the interval of measure/rounds/ratios.py beside a bootstrap of the
median. With a folder: the same model twice in real benchmarks, each of them once more with one model's decode
times made 5 % longer. Wanted: 1 in at least 18 of 20 intervals, and the slower model found in 18 of 20.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import environment
from nirvana_deploy.measure.benchmark import benchmark, variant_from_folder
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.rounds.ratios import ratio_of
from nirvana_deploy.model.checkpoint import Checkpoint

SLOWER = 1.05
Rounds = NDArray[np.float64]


def main() -> None:
    """Invent rounds, or measure some."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="an ONNX folder")
    parser.add_argument("--checkpoint", type=Path, help="what it was exported from [beside it]")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--precision", type=float, default=0.02)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.folder is None:
        invented()
        return
    record = measured(options)
    print({name: value for name, value in record.items() if name != "intervals"})
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


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The same folder twice, again and again."""
    shape = Checkpoint.open(options.checkpoint or options.folder.parent / "checkpoint").shape
    variants = [variant_from_folder(name, options.folder, shape) for name in ("dense", "again")]
    workload = Workload(
        prompt_tokens=32, new_tokens=33, threads=1, precision=options.precision, max_minutes=1
    )
    intervals, holds, finds, cautions = [], 0, 0, 0
    for _ in range(options.repetitions):
        found = benchmark(variants, workload=workload)
        before, after = (one["tpot_ms"]["samples"] for one in found["variants"])
        ratio = ratio_of(before, after)
        intervals.append([ratio.low, ratio.p50, ratio.high, len(before)])
        holds += ratio.low <= 1 <= ratio.high
        finds += ratio_of([SLOWER * one for one in before], after).shows_difference
        cautions += bool(found["watch"]["cautions"])
    return {
        "schema": 1,
        "repetitions": options.repetitions,
        "precision": options.precision,
        "hold_one": holds,
        "find_five_percent": finds,
        "with_a_caution": cautions,
        "intervals": intervals,
        "environment": environment() | {"load_average_1min": os.getloadavg()[0]},
    }


if __name__ == "__main__":
    main()
