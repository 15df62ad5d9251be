"""Recipes side by side: perplexity and KL on texts of several kinds, and zero-shot accuracy.

    python benchmarks/recipes.py smollm2 --calib valid.txt --texts DIR --out recipes.jsonl
    python benchmarks/recipes.py smollm2 --sparsity 0.2 --tasks DIR --limit 500 --out recipes.jsonl
    python benchmarks/recipes.py --table --out recipes.jsonl

MODEL is an alias or a folder. Each row is one cut: a recipe (``best`` as in --preset best, and others with
one option changed; ``paper``: NIRVANA as published; ``paper-refit``; ``wanda-refit``: wanda-sp uniform), a
calibration source, a sparsity, a seed. Nothing is exported: a cut is compared with the dense model in
float32, as ``select-calib`` does. --texts are files or folders (WikiText-2's test.txt among them), one kind
a file; pydoc and code are added. A kind that is part of the calibration is read from its held-out windows.
Rows are appended as they are measured; the same command continues where it stopped. Tasks run on a
checkpoint in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.machine import cpu_seconds, environment, peak_rss_bytes
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.calibrate.stage import calibration_record, windows_wanted
from nirvana_deploy.calibrate.texts import read_text_file
from nirvana_deploy.calibrate.windows import CalibrationData, calibration_data, windows_of_text
from nirvana_deploy.calibrate.windows_file import write_windows
from nirvana_deploy.measure.zero_shot.tasks import evaluate_tasks
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.output.layout import CALIBRATION_FILE, CHECKPOINT, PLAN_FILE
from nirvana_deploy.pipeline.job import Job, job_of
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.curves.curve import Curves
from nirvana_deploy.prune.cutting import Cutter, reads_curves
from nirvana_deploy.prune.divergence import MaskedQuality, masked_quality
from nirvana_deploy.prune.plan import PrunePlan
from nirvana_deploy.prune.plan_file import write_plan
from nirvana_deploy.prune.recipe import REFIT
from nirvana_deploy.prune.streaming.score import score_units

RECIPES: dict[str, dict[str, Any]] = {
    "best": {"preset": "best"},
    "best-round-8": {"preset": "best", "round_to": 8},
    "best-ridge-2": {"preset": "best", "ridge": 2.0},
    "best-240-windows": {"preset": "best", "num_sequences": 240},
    "paper": {"preset": "paper"},
    "paper-refit": {"preset": "paper", "reconstruct": True},
    "wanda-refit": {"preset": "fast", "num_sequences": 32},
}
WINDOW_TOKENS = 256
"""Of texts. Not shorter than calibration windows of any recipe: then all recipes hold out the same ones."""
SHIPPED = ("pydoc", "code")
"""Kinds of text that every machine has."""
TEST = "test"
"""The text whose windows are long: 8 x 512 tokens, as in all records of this project."""
HELD_OUT = "held-out"
"""Windows of the calibration file: its kind differs between rows, so means over kinds leave it out."""

Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", default="smollm2")
    parser.add_argument("--calib", default="mix")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="files or folders of texts")
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=["best"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.4, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, default=8, help="of 256 tokens, of each kind of text")
    parser.add_argument("--tasks", type=Path, default=None, help="folder of local tasks")
    parser.add_argument("--limit", type=int, default=500, help="items of each task")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the cuts, for frontier.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = read_rows(options.out)
    if not options.table:
        for row in measured(options, {key(row) for row in rows}):
            rows.append(row)
            write_bytes(options.out, "".join(json.dumps(one) + "\n" for one in rows).encode())
            print(line(row), flush=True)
    print(table(rows))


def measured(options: argparse.Namespace, done: set[str]) -> Iterator[Row]:
    """The rows that are asked for and not there yet."""
    dense = Checkpoint.open(resolve_model(options.model).path)
    if options.tasks is not None:
        row = {"recipe": "dense", "calib": None, "sparsity": 0.0, "seed": 0}
        if key(row | {"limit": options.limit}) not in done:
            yield row | with_tasks(dense.path, options)
    for recipe in options.recipe:
        for seed in options.seeds:
            limit = None if options.tasks is None else options.limit
            about = {"recipe": recipe, "calib": Path(options.calib).name, "seed": seed, "limit": limit}
            missing = [one for one in options.sparsity if key(about | {"sparsity": one}) not in done]
            if not missing:
                continue
            cuts = Cuts(options, dense, recipe, seed)
            for sparsity, row in zip(missing, cuts.measured(missing), strict=True):
                yield about | {"sparsity": sparsity} | row


class Cuts:
    """One recipe on one draw of calibration text."""

    def __init__(self, options: argparse.Namespace, dense: Checkpoint, recipe: str, seed: int) -> None:
        self._options = options
        self._dense = dense
        self._recipe = recipe
        self._seed = seed
        self._data: CalibrationData | None = None
        self._curves: Curves | None = None
        self._texts: dict[str, NDArray[np.int64]] = {}

    def measured(self, sparsities: Sequence[float]) -> list[Row]:
        """What came out at each sparsity; all cuts are compared with the dense model in one pass."""
        with tempfile.TemporaryDirectory() as scratch:
            made = [self._cut(sparsity, Path(scratch) / f"{sparsity:g}") for sparsity in sparsities]
            plans, refits = [plan for plan, _, _ in made], [refit for _, refit, _ in made]
            texts = masked_quality(self._dense, plans, list(self._texts.values()), reconstructions=refits)
            rows = []
            for index, (plan, refit, row) in enumerate(made):
                row["texts"] = {
                    name: text_row(quality, index, windows.size)
                    for (name, windows), quality in zip(self._texts.items(), texts, strict=True)
                }
                if self._options.tasks is not None or self._options.keep is not None:
                    folder = self._folder(Path(scratch), plan)
                    slice_checkpoint(self._dense, plan, folder / CHECKPOINT, reconstruction=refit)
                    write_plan(plan, folder / PLAN_FILE)
                if self._options.tasks is not None:
                    row |= with_tasks(folder / CHECKPOINT, self._options)
                rows.append(row)
        return rows

    def _folder(self, scratch: Path, plan: PrunePlan) -> Path:
        """Where a cut is written, with the windows that it was made with if it is kept."""
        name = f"{self._recipe}-s{plan.budget.met_removed_share:.2f}-seed{self._seed}"
        folder = (self._options.keep or scratch) / name
        folder.mkdir(parents=True)
        if self._data is not None:
            write_windows(self._data, folder / CALIBRATION_FILE)
        return folder

    def _cut(self, sparsity: float, out: Path) -> tuple[PrunePlan, Path | None, Row]:
        """A plan, its refit, and what they cost."""
        job = job_of("", {**RECIPES[self._recipe], "calib": self._options.calib, "sparsity": sparsity})
        data = self._calibrated(job)
        saliency = job.pruning.saliency
        cutter = Cutter(self._dense, job.pruning, seed=self._seed)
        curves_cpu_s = 0.0
        if reads_curves(job.pruning, saliency) and self._curves is None:
            start = cpu_seconds()
            self._curves = cutter.curves(data.calibration.tokens)
            curves_cpu_s = cpu_seconds() - start
        start = cpu_seconds()
        scores = None
        if saliency != REFIT:
            scores = score_units(self._dense, data.calibration.tokens, saliency=saliency)
        plan, refitted = cutter.candidate(
            data.calibration,
            scores,
            saliency=saliency,
            gamma=None,
            curves=self._curves if reads_curves(job.pruning, saliency) else None,
            out=out,
        )
        return (
            plan,
            refitted,
            {
                "met_removed_share": plan.budget.met_removed_share,
                "calibration": calibration_record(data.calibration),
                "curves_cpu_s": curves_cpu_s,
                "cut_cpu_s": cpu_seconds() - start,
                "peak_rss_bytes": peak_rss_bytes(),
                "environment": environment() | {"load_average_1min": os.getloadavg()[0]},
            },
        )

    def _calibrated(self, job: Job) -> CalibrationData:
        """The windows, and the texts to measure on."""
        if self._data is None:
            options = self._options
            recipe = job.calibration
            self._data = self._drawn(options.calib, recipe, windows_wanted(recipe, self._dense.shape))
            for path in text_files(options.texts):
                length, windows = (512, 8) if path.stem == TEST else (WINDOW_TOKENS, options.windows)
                self._texts[path.stem] = windows_of_text(
                    read_text_file(path), self._dense.tokenizer, seq_len=length, max_sequences=windows
                ).tokens
            for name in SHIPPED:  # the same held-out windows, whatever was calibrated on
                self._texts[name] = self._drawn(name, recipe, 1).heldout.tokens
            if Path(options.calib).is_file():
                self._texts[HELD_OUT] = self._data.heldout.tokens
        return self._data

    def _drawn(self, source: str, recipe: Calibration, windows: int) -> CalibrationData:
        return calibration_data(
            source,
            self._dense.tokenizer,
            num_sequences=windows,
            seq_len=recipe.seq_len,
            seed=self._seed,
            heldout_sequences=self._options.windows,
            heldout_len=WINDOW_TOKENS,
            checkpoint=self._dense,
        )


def text_row(quality: MaskedQuality, plan: int, tokens: int) -> Row:
    """Of one kind of text, for the plan of this index."""
    divergence, loss = quality.divergence[plan], quality.loss[plan]
    return {
        "tokens": int(tokens),
        "kl": float(divergence.mean()),
        "kl_standard_error": standard_error(divergence),
        "perplexity": float(np.exp(loss.mean())),
        "dense_perplexity": float(np.exp(quality.dense_loss.mean())),
    }


def with_tasks(folder: Path, options: argparse.Namespace) -> Row:
    """Accuracies of a checkpoint."""
    files = sorted(options.tasks.glob("*.jsonl"))
    found = evaluate_tasks({"model": folder}, [str(file) for file in files], limit=options.limit)
    return {"limit": options.limit, "tasks": found}


def text_files(given: Sequence[Path]) -> list[Path]:
    """Every text, in order of its name."""
    files = [file for one in given for file in (sorted(one.iterdir()) if one.is_dir() else [one])]
    return [file for file in files if file.suffix in (".txt", ".jsonl")]


def read_rows(path: Path) -> list[Row]:
    """What was measured before; none when there is no file."""
    return [json.loads(one) for one in path.read_text().splitlines()] if path.is_file() else []


def key(row: Row) -> str:
    """What makes two rows the same measurement."""
    return json.dumps([row.get(name) for name in ("recipe", "calib", "sparsity", "seed", "limit")])


def standard_error(values: NDArray[np.float64]) -> float | None:
    """Of a mean; None for one value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def line(row: Row) -> str:
    """One row for people who wait."""
    texts = ", ".join(f"{name} {text['perplexity']:.1f}" for name, text in row.get("texts", {}).items())
    return f"{row['recipe']} {row['calib']} {row['sparsity']:g} seed {row['seed']}: {texts}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: perplexity by recipe, calibration and kind of text: the median of the seeds (range).

    Then KL to dense in nats per token, on ``test`` and as the mean of all kinds but the calibration's own
    held-out windows, and the mean accuracy of tasks. Where a seed was measured twice, the later row counts.
    """
    rows = [row for row in rows if "texts" in row]
    kinds = list(dict.fromkeys(name for row in rows for name in row["texts"]))
    lines = [
        f"| sparsity | recipe | calibrated on | seeds | {' | '.join(kinds)} "
        "| KL, test | KL, mean of kinds | zero-shot |",
        "|---" * (7 + len(kinds)) + "|",
    ]
    groups = dict.fromkeys((row["sparsity"], row["recipe"], row["calib"]) for row in rows)
    for group in sorted(groups):
        same = list(
            {
                row["seed"]: row
                for row in sorted(rows, key=lambda row: "tasks" in row)
                if (row["sparsity"], row["recipe"], row["calib"]) == group
            }.values()
        )
        cells = [spread([row["texts"][kind] for row in same if kind in row["texts"]]) for kind in kinds]
        sparsity, recipe, calib = group
        cells += [median_kl(same, [TEST]), median_kl(same, [kind for kind in kinds if kind != HELD_OUT])]
        cells.append(", ".join(mean_accuracy(row["tasks"]) for row in same if "tasks" in row))
        lines.append(f"| {sparsity:g} | {recipe} | {calib} | {len(same)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_accuracy(tasks: Row) -> str:
    """Of all tasks of one checkpoint, with its standard error; and, in brackets, of all but boolq.

    A model that answers yes to all of boolq is right more often than one that reads it and is unsure.
    """
    [found] = tasks["means"]["variants"].values()
    [accuracies] = tasks["variants"].values()
    others = [
        accuracies[task][f"{about['metric']},none"]
        for task, about in tasks["files"].items()
        if task != "boolq"
    ]
    return f"{found['mean']:.3f} ± {found['standard_error']:.3f} ({np.mean(others):.3f})"


def median_kl(rows: Sequence[Row], kinds: Sequence[str]) -> str:
    """The median of the seeds (range) of the mean KL to dense over these kinds, nats per token."""
    found = [
        float(np.mean([row["texts"][kind]["kl"] for kind in kinds]))
        for row in rows
        if all(kind in row["texts"] for kind in kinds)
    ]
    return f"{np.median(found):.2f}{_range(found, '.2f')}" if found else ""


def spread(texts: Sequence[Row]) -> str:
    """Perplexity: the median (range), and how many times dense."""
    if not texts:
        return ""
    found = [text["perplexity"] for text in texts]
    times = np.median([text["perplexity"] / text["dense_perplexity"] for text in texts])
    return f"{np.median(found):.1f}{_range(found, '.1f')}, {times:.2f}x"


def _range(found: Sequence[float], form: str) -> str:
    """Of several seeds."""
    return f" ({min(found):{form}}-{max(found):{form}})" if len(found) > 1 else ""


if __name__ == "__main__":
    main()
