"""The quality table: saliency x sparsity x gamma x seed, on text that had no say in the pruning.

    python benchmarks/quality.py MODEL --calib valid.txt --eval-text test.txt --out quality.jsonl
    python benchmarks/quality.py MODEL --calib valid.txt --eval-text test.txt --out quality.jsonl --quick

MODEL is an alias or a folder. Each row is one pruned model, cut in memory, not built: calibration windows
drawn by seed from --calib, perplexity (windows of 512 tokens) and KL to the dense model on --eval-text, and
the KL on held-out windows of --calib, which is all that a selector may see. From the rows the table derives
gamma ``auto`` (of each seed, the gamma of least held-out KL) and the KL-selected seed beside the median seed.

``nirvana`` and ``taylor`` are measured with the whole grid of ``--gamma auto``, the others with gamma 1 and
M/A; magnitudes know no seed. Rows are written as they are measured, the sparsities in the order given; the
same command continues where it stopped. --quick measures sparsity 0.4, nirvana and taylor, gamma 1 and M/A,
two seeds. --reconstruct measures the same plans, what the cut leaves refitted on the seed's own calibration
windows. With --table nothing is measured and the table of what is there is printed.

One candidate costs 2 x (linear weights left + head) operations a token. For SmolLM2 at sparsity 0.4 and the
default 8 x 512 + 32 x 64 tokens that is 1.1e12 (a GEMM of its shapes runs at 0.2e12 a second on two
AVX-512 cores), and scoring 32 x 128 tokens by gradient is 3.5e12, once for all sparsities and gammas.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import sha256_of, write_bytes
from nirvana_deploy.calibrate.texts import read_text_file
from nirvana_deploy.calibrate.windows import (
    CalibrationData,
    calibration_data,
    windows_of_text,
)
from nirvana_deploy.model.checkpoint import Checkpoint, load_tokenizer
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.prune.choosing.select import gamma_grid
from nirvana_deploy.prune.divergence import masked_quality
from nirvana_deploy.prune.plan import PrunePlan, default_gamma, make_plan
from nirvana_deploy.prune.refit.reconstruct import DEFAULT_RIDGE, reconstruct_layers
from nirvana_deploy.prune.saliency.gradient import SALIENCIES
from nirvana_deploy.prune.saliency.units import UnitScores
from nirvana_deploy.prune.streaming.score import score_units

EVAL_LEN = 512
WHOLE_GRID = ("nirvana", "taylor")
"""Saliencies that are measured with every gamma that ``--gamma auto`` tries."""

Row = dict[str, Any]
Item = TypeVar("Item")


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--calib", required=True, help="text to calibrate on")
    parser.add_argument("--eval-text", type=Path, required=True, help="another text, to measure on")
    parser.add_argument("--out", type=Path, required=True, help="JSONL of rows; continued when it exists")
    parser.add_argument("--quick", action="store_true", help="a small subset, see above")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.4, 0.2, 0.5])
    parser.add_argument("--saliency", nargs="+", choices=list(SALIENCIES), default=None)
    parser.add_argument("--gamma", type=float, nargs="+", default=None, help="[see above]")
    parser.add_argument("--seeds", type=int, default=None, help="[3]")
    parser.add_argument("--eval-windows", type=int, default=8, help="of 512 tokens")
    parser.add_argument("--heldout-windows", type=int, default=32, help="of 64 tokens, of --calib")
    parser.add_argument("--num-sequences", type=int, default=32, help="calibration windows of 128 tokens")
    parser.add_argument("--allocation", default="global")
    parser.add_argument("--reconstruct", action="store_true", help="refit after the cut")
    options = parser.parse_args()
    rows = read_rows(options.out)
    if not options.table:
        measure(options, rows)
    print(f"{table(rows)}\n\n{reconstruction_table(rows)}")


def measure(options: argparse.Namespace, rows: list[Row]) -> None:
    """Append to ``rows``, and to the file, every row that is asked for and not there yet."""
    source = resolve_model(options.model)
    grid = Grid(source.path, load_tokenizer(source.path), options)
    settings = grid.settings(source.name)
    done = {key(row) for row in rows}
    sparsities = [0.4] if options.quick else options.sparsity
    saliencies = options.saliency or (WHOLE_GRID if options.quick else list(SALIENCIES))
    for sparsity, saliency in itertools.product(sparsities, saliencies):
        seeds = 1 if saliency == "magnitude" else options.seeds or (2 if options.quick else 3)
        wanted = [
            row
            for seed in range(seeds)
            for gamma in grid.gammas(saliency, sparsity)
            if key(row := new_row(settings, saliency, sparsity, gamma, seed) | grid.refitting) not in done
        ]
        if wanted:
            rows += grid.measured(wanted)
            write_bytes(options.out, "".join(json.dumps(row) + "\n" for row in rows).encode())


def new_row(settings: Row, saliency: str, sparsity: float, gamma: float, seed: int) -> Row:
    """What makes a row, before it is measured."""
    return {"settings": settings, "saliency": saliency, "sparsity": sparsity, "gamma": gamma, "seed": seed}


class Grid:
    """The texts, and what was scored on them so far."""

    def __init__(self, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
        self._checkpoint = checkpoint
        self._shape = checkpoint.shape
        self._options = options
        self.evaluated = windows_of_text(
            read_text_file(options.eval_text),
            checkpoint.tokenizer,
            seq_len=EVAL_LEN,
            max_sequences=options.eval_windows,
        )
        self._heldout = self._data(0).heldout
        self._scores: dict[tuple[str, str | None, int], UnitScores] = {}

    def _data(self, seed: int, *, corpus: str | None = None) -> CalibrationData:
        """Of one seed; the held-out windows are the same for all."""
        return calibration_data(
            corpus or self._options.calib,
            self._checkpoint.tokenizer,
            num_sequences=self._options.num_sequences,
            seq_len=128,
            seed=seed,
            heldout_sequences=self._options.heldout_windows,
            heldout_len=64,
            checkpoint=self._checkpoint,
        )

    def settings(self, model: str) -> Row:
        """What all rows have in common."""
        options, files = self._options, sorted(self._checkpoint.path.glob("*.safetensors"))
        return {
            "model": model,
            "model_sha256": [sha256_of(file) for file in files],
            "calib_sha256": self._heldout.text_sha256,
            "eval_sha256": self.evaluated.text_sha256,
            "eval_windows": len(self.evaluated.tokens),
            "heldout_windows": options.heldout_windows,
            "num_sequences": options.num_sequences,
            "allocation": options.allocation,
        }

    @property
    def refitting(self) -> Row:
        """What a row says of refitting after the cut; nothing where there is none."""
        return {"reconstruct": {"ridge": DEFAULT_RIDGE}} if self._options.reconstruct else {}

    @property
    def default_gamma(self) -> float:
        """M/A."""
        return default_gamma(self._shape)

    def gammas(self, saliency: str, sparsity: float) -> Sequence[float]:
        """The gammas asked for, or those of the table, as far as the model allows them."""
        if self._options.gamma:
            return list(self._options.gamma)
        grid = gamma_grid(self._shape, sparsity=sparsity)
        whole = saliency in WHOLE_GRID and not self._options.quick
        return [gamma for gamma in grid if whole or gamma in (1.0, default_gamma(self._shape))]

    def scores(self, row: Row) -> UnitScores:
        """Of every unit; they serve all sparsities and gammas. A row may name another corpus than --calib."""
        saliency, corpus, seed = row["saliency"], row.get("corpus"), row["seed"]
        if (saliency, corpus, seed) not in self._scores:
            self._scores[saliency, corpus, seed] = score_units(
                self._checkpoint, self._calibration(row), saliency=saliency, seed=seed
            )
        return self._scores[saliency, corpus, seed]

    def _calibration(self, row: Row) -> NDArray[np.int64]:
        return self._data(row["seed"], corpus=row.get("corpus")).calibration.tokens

    def measured(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, which ask for a saliency, a seed, a sparsity and a gamma, with what came out."""
        plans = [
            make_plan(
                self._shape,
                self.scores(row),
                sparsity=row["sparsity"],
                gamma=row["gamma"],
                allocation=row["settings"]["allocation"],
                saliency=row["saliency"],
                seed=row["seed"],
            )
            for row in rows
        ]
        window_sets = [self._heldout.tokens, self.evaluated.tokens]
        with tempfile.TemporaryDirectory() as scratch:
            folders = [
                self._reconstruction(row, plan, Path(scratch) / str(number)) if "reconstruct" in row else None
                for number, (row, plan) in enumerate(zip(rows, plans, strict=True))
            ]
            start = time.process_time()
            seen, unseen = masked_quality(self._checkpoint, plans, window_sets, reconstructions=folders)
            cpu_s = (time.process_time() - start) / len(rows)
        results = [
            row
            | {
                "default_gamma": default_gamma(self._shape),
                "met_removed_share": plan.budget.met_removed_share,
                "heldout_kl": float(seen.divergence[index].mean()),
                "heldout_kl_standard_error": standard_error(seen.divergence[index]),
                "kl": float(unseen.divergence[index].mean()),
                "kl_standard_error": standard_error(unseen.divergence[index]),
                "perplexity": float(np.exp(unseen.loss[index].mean())),
                "dense_perplexity": float(np.exp(unseen.dense_loss.mean())),
                "eval_tokens": int(self.evaluated.tokens.size),
                "evaluated_cpu_s": cpu_s,
            }
            for index, (row, plan) in enumerate(zip(rows, plans, strict=True))
        ]
        for row in results:
            refitted = " refitted" if "reconstruct" in row else ""
            print(
                f"{row['saliency']} {row['sparsity']:g}{refitted} gamma {row['gamma']:g} seed {row['seed']}: "
                f"perplexity {row['perplexity']:.1f} (dense {row['dense_perplexity']:.1f}), "
                f"KL {row['kl']:.3f}",
                flush=True,
            )
        return results

    def _reconstruction(self, row: Row, plan: PrunePlan, out: Path) -> Path:
        """What the plan leaves of its linears, refitted on the row's calibration windows, in ``out``."""
        ridge = row["reconstruct"]["ridge"]
        reconstruct_layers(self._checkpoint, plan, self._calibration(row), out, ridge=ridge)
        return out


def read_rows(path: Path) -> list[Row]:
    """What was measured before; none when there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def key(row: Row) -> str:
    """What makes two rows the same measurement."""
    names = ("settings", "saliency", "sparsity", "gamma", "seed", "corpus", "reconstruct")
    return json.dumps([row.get(name) for name in names])


def standard_error(values: Any) -> float | None:
    """Of a mean; None for one value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def plain(rows: Sequence[Row]) -> list[Row]:
    """The rows that were cut and not refitted."""
    return [row for row in rows if "reconstruct" not in row]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per sparsity, saliency and settings; perplexity as the median of the seeds (range).

    Of plain cuts alone; :func:`reconstruction_table` shows the others beside theirs.
    """
    rows = plain(rows)
    lines = [
        "| sparsity | saliency | allocation | seeds | gamma 1 | gamma M/A | gamma auto | KL, gamma auto | "
        "seed of least KL, gamma auto |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def group(row: Row) -> tuple[Any, ...]:
        return row["sparsity"], row["saliency"], row["settings"]["allocation"], json.dumps(row["settings"])

    for (sparsity, saliency, allocation, _), members in grouped(rows, group):
        usual = members[0]["default_gamma"]
        by_gamma = dict(grouped(members, lambda row: row["gamma"]))
        auto = [least_heldout(same) for _, same in grouped(members, lambda row: row["seed"])]
        selected = least_heldout(auto)
        cells = [f"{sparsity:g}", saliency, allocation, str(len(auto))]
        cells += [spread(by_gamma.get(1.0, [])), spread(by_gamma.get(usual, [])), spread(auto)]
        cells += [f"{np.median([row['kl'] for row in auto]):.3f}", spread([selected])]
        lines.append(f"| {' | '.join(cells)} |")
    dense = {f"{row['dense_perplexity']:.1f}" for row in rows}
    return "\n".join([*lines, "", f"Dense perplexity: {', '.join(sorted(dense))}."])


def reconstruction_table(rows: Sequence[Row]) -> str:
    """Markdown: the same cuts plain and refitted, gamma M/A; medians of the seeds with both (range)."""
    lines = [
        "| sparsity | saliency | allocation | seeds | perplexity, plain cut | reconstructed | "
        "KL, plain cut | reconstructed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cuts = {key(row): row for row in plain(rows)}
    pairs = []
    for row in rows:
        beside = cuts.get(key({name: value for name, value in row.items() if name != "reconstruct"}))
        if "reconstruct" in row and beside is not None and row["gamma"] == row["default_gamma"]:
            pairs.append((beside, row))

    def group(pair: tuple[Row, Row]) -> tuple[Any, ...]:
        _, row = pair
        return row["sparsity"], row["saliency"], row["settings"]["allocation"], json.dumps(row["settings"])

    for (sparsity, saliency, allocation, _), members in grouped(pairs, group):
        before, after = ([pair[side] for pair in members] for side in (0, 1))
        kl = [f"{np.median([row['kl'] for row in side]):.3f}" for side in (before, after)]
        cells = [f"{sparsity:g}", saliency, allocation, str(len(members)), spread(before), spread(after), *kl]
        lines.append(f"| {' | '.join(cells)} |")
    ridges = ", ".join(sorted({f"{row['reconstruct']['ridge']:g}" for _, row in pairs}))
    how = f"Reconstructed (`--reconstruct`): refitted on the seed's own calibration windows, ridge {ridges}."
    return "\n".join([*lines, "", how]) if pairs else ""


def spread(rows: Sequence[Row]) -> str:
    """Perplexity of some rows: median and range."""
    values = sorted(row["perplexity"] for row in rows)
    if not values:
        return ""
    digits = 1 if values[-1] < 1000 else 0
    most = f" ({values[0]:.{digits}f}-{values[-1]:.{digits}f})" if len(values) > 1 else ""
    return f"{np.median(values):.{digits}f}{most}"


def least_heldout(rows: Sequence[Row]) -> Row:
    """What a selector chooses, which sees the held-out KL alone."""
    return min(rows, key=lambda row: float(row["heldout_kl"]))


def grouped(rows: Sequence[Item], by: Callable[[Item], Any]) -> list[tuple[Any, list[Item]]]:
    """Rows by a key, in order of the key."""
    return [(name, list(same)) for name, same in itertools.groupby(sorted(rows, key=by), key=by)]


if __name__ == "__main__":
    main()
