"""The quality table: saliency x sparsity x gamma x seed, on text that had no say in the pruning.

    python benchmarks/quality.py MODEL --calib valid.txt --eval-text test.txt --out quality.jsonl
    python benchmarks/quality.py MODEL --calib valid.txt --eval-text test.txt --out quality.jsonl --quick

MODEL is an alias or a folder. Each row is one pruned model, masked, not built: calibration windows drawn by
seed from --calib, perplexity (windows of 512 tokens) and KL to the dense model on --eval-text, and the KL on
held-out windows of --calib, which is all that a selector may see. From the rows the table derives gamma
``auto`` (of each seed, the gamma of least held-out KL) and the KL-selected seed beside the median seed.

Rows are written as they are measured; the same command continues where it stopped. --quick measures
sparsity 0.4, nirvana and taylor, gamma 1 and M/A, two seeds and 8 windows. With --table nothing is
measured and the table of what is there is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.artifact import sha256_of, write_bytes
from nirvana_deploy.model.checkpoint import config_json, load_tokenizer
from nirvana_deploy.model.shape import shape_from_config
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.prune.calibrate import calibration_data, windows_of_text
from nirvana_deploy.prune.divergence import masked_quality
from nirvana_deploy.prune.plan import default_gamma, make_plan
from nirvana_deploy.prune.saliency import SALIENCIES
from nirvana_deploy.prune.score import score_units
from nirvana_deploy.prune.select import gamma_grid
from nirvana_deploy.prune.texts import read_text_file
from nirvana_deploy.prune.units import UnitScores

EVAL_LEN = 512
MICRO_BATCH = 2
"""Windows of 512 at a time."""

Row = dict[str, Any]
Tokens = NDArray[np.int64]


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
    parser.add_argument("--sparsity", type=float, nargs="+", default=None)
    parser.add_argument("--saliency", nargs="+", choices=list(SALIENCIES), default=None)
    parser.add_argument("--gamma", type=float, nargs="+", default=None, help="[1, 2, M/A and 1.5 M/A]")
    parser.add_argument("--seeds", type=int, default=None, help="[3]")
    parser.add_argument("--eval-windows", type=int, default=None, help="of 512 tokens [40]")
    parser.add_argument("--heldout-windows", type=int, default=64, help="of 64 tokens, of --calib")
    parser.add_argument("--num-sequences", type=int, default=32, help="calibration windows of 128 tokens")
    parser.add_argument("--allocation", default="global")
    options = parser.parse_args()
    rows = read_rows(options.out)
    if not options.table:
        measure(options, rows)
    print(table(rows))


def measure(options: argparse.Namespace, rows: list[Row]) -> None:
    """Append to ``rows``, and to the file, every row that is asked for and not there yet."""
    source = resolve_model(options.model)
    tokenizer = load_tokenizer(source.path)
    sparsities = options.sparsity or ([0.4] if options.quick else [0.2, 0.4, 0.5])
    saliencies = options.saliency or (["nirvana", "taylor"] if options.quick else list(SALIENCIES))
    seeds = options.seeds or (2 if options.quick else 3)
    count = options.eval_windows or (8 if options.quick else 40)
    text = read_text_file(options.eval_text)
    evaluated = windows_of_text(text, tokenizer, seq_len=EVAL_LEN, max_sequences=count)
    settings = {
        "model": source.name,
        "model_sha256": [sha256_of(file) for file in sorted(source.path.glob("*.safetensors"))],
        "eval_sha256": text.sha256,
        "eval_windows": len(evaluated.tokens),
        "heldout_windows": options.heldout_windows,
        "num_sequences": options.num_sequences,
        "allocation": options.allocation,
    }
    done = {key(row) for row in rows}
    for seed, saliency in itertools.product(range(seeds), saliencies):
        data = calibration_data(
            options.calib,
            tokenizer,
            num_sequences=options.num_sequences,
            seq_len=128,
            seed=seed,
            heldout_sequences=options.heldout_windows,
            heldout_len=64,
            model_path=source.path,
        )
        named = {"settings": settings | {"calib_sha256": data.calibration.text_sha256}, "saliency": saliency}
        wanted = [
            row
            for sparsity in sparsities
            for gamma in gammas_of(options, source.path, sparsity)
            if key(row := named | {"sparsity": sparsity, "gamma": gamma, "seed": seed}) not in done
        ]
        if wanted:
            scores = score_units(source.path, data.calibration.tokens, saliency=saliency, seed=seed)
        for _, together in grouped(wanted, lambda row: row["sparsity"]):
            rows += measured(source.path, scores, together, data.heldout.tokens, evaluated.tokens)
            write_bytes(options.out, "".join(json.dumps(row) + "\n" for row in rows).encode())


def gammas_of(options: argparse.Namespace, checkpoint: Path, sparsity: float) -> Sequence[float]:
    """The gammas asked for, or the grid of ``--gamma auto``, or for --quick 1 and M/A."""
    if options.gamma:
        return list(options.gamma)
    shape = shape_from_config(config_json(checkpoint))
    grid = gamma_grid(shape, sparsity=sparsity)
    return [gamma for gamma in grid if gamma in (1.0, default_gamma(shape))] if options.quick else grid


def measured(
    checkpoint: Path, scores: UnitScores, rows: Sequence[Row], heldout: Tokens, evaluated: Tokens
) -> list[Row]:
    """The rows, which ask for a sparsity and a gamma, with what came out; prints each."""
    shape = shape_from_config(config_json(checkpoint))
    start = time.perf_counter()
    plans = [
        make_plan(
            shape,
            scores,
            sparsity=row["sparsity"],
            gamma=row["gamma"],
            allocation=row["settings"]["allocation"],
            saliency=row["saliency"],
            seed=row["seed"],
        )
        for row in rows
    ]
    seen = masked_quality(checkpoint, plans, heldout)
    unseen = masked_quality(checkpoint, plans, evaluated, micro_batch=MICRO_BATCH)
    seconds = (time.perf_counter() - start) / len(rows)
    results = [
        row
        | {
            "default_gamma": default_gamma(shape),
            "met_removed_share": plan.budget.met_removed_share,
            "heldout_kl": float(seen.divergence[index].mean()),
            "heldout_kl_standard_error": standard_error(seen.divergence[index]),
            "kl": float(unseen.divergence[index].mean()),
            "kl_standard_error": standard_error(unseen.divergence[index]),
            "perplexity": float(np.exp(unseen.loss[index].mean())),
            "dense_perplexity": float(np.exp(unseen.dense_loss.mean())),
            "eval_tokens": int(evaluated.size),
            "evaluated_s": seconds,
        }
        for index, (row, plan) in enumerate(zip(rows, plans, strict=True))
    ]
    for row in results:
        print(
            f"{row['saliency']} {row['sparsity']:g} gamma {row['gamma']:g} seed {row['seed']}: perplexity "
            f"{row['perplexity']:.1f} (dense {row['dense_perplexity']:.1f}), KL {row['kl']:.3f}",
            flush=True,
        )
    return results


def read_rows(path: Path) -> list[Row]:
    """What was measured before; none when there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def key(row: Row) -> str:
    """What makes two rows the same measurement."""
    return json.dumps([row[name] for name in ("settings", "saliency", "sparsity", "gamma", "seed")])


def standard_error(values: Any) -> float | None:
    """Of a mean; None for one value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line per settings, sparsity, saliency and gamma; seeds as median and range."""
    lines = [
        "| sparsity | saliency | gamma | seeds | perplexity: median (range) | KL: median | "
        "KL-selected seed: perplexity |",
        "|---|---|---|---|---|---|---|",
    ]

    def group(row: Row) -> tuple[Any, ...]:
        return json.dumps(row["settings"]), row["sparsity"], row["saliency"]

    for (_, sparsity, saliency), members in grouped(rows, group):
        for gamma, chosen in grouped(members, lambda row: row["gamma"]):
            usual = " (M/A)" if gamma == chosen[0]["default_gamma"] else ""
            lines.append(line(sparsity, saliency, f"{gamma:.3g}{usual}", chosen))
        by_seed = [least_heldout(same) for _, same in grouped(members, lambda row: row["seed"])]
        lines.append(line(sparsity, saliency, "auto", by_seed))
    dense = {f"{row['dense_perplexity']:.1f}" for row in rows}
    return "\n".join([*lines, "", f"Dense perplexity: {', '.join(sorted(dense))}."])


def line(sparsity: float, saliency: str, gamma: str, rows: Sequence[Row]) -> str:
    """One line of the table."""
    perplexities = [row["perplexity"] for row in rows]
    selected = least_heldout(rows)
    return (
        f"| {sparsity:g} | {saliency} | {gamma} | {len(rows)} | {np.median(perplexities):.1f} "
        f"({min(perplexities):.1f}-{max(perplexities):.1f}) | {np.median([row['kl'] for row in rows]):.3f} | "
        f"{selected['perplexity']:.1f} (seed {selected['seed']}) |"
    )


def least_heldout(rows: Sequence[Row]) -> Row:
    """What a selector chooses, which sees the held-out KL alone."""
    return min(rows, key=lambda row: float(row["heldout_kl"]))


def grouped(rows: Sequence[Row], by: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows by a key, in order of the key."""
    return [(name, list(same)) for name, same in itertools.groupby(sorted(rows, key=by), key=by)]


if __name__ == "__main__":
    main()
