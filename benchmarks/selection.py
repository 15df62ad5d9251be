"""Does choosing by KL pay? What the selector takes, beside what random draws give.

    python benchmarks/selection.py MODEL --calib valid.txt --eval-text test.txt \\
        --quality quality.jsonl --out selection.jsonl

Candidates are calibration sets from several corpora (--calib, ``pydoc``, and ``self``, the model's own) and
of several seeds, with the saliencies ``nirvana`` and ``taylor`` and some gammas, at one sparsity. All are
judged by their KL to the dense model on the same held-out windows of --calib, which is all that the selector
sees; perplexity is measured on --eval-text, which has no say. What benchmarks/quality.py has measured at this
sparsity are the candidates of --calib; only the other corpora are measured here, row by row, and the same
command continues where it stopped. The table widens the choice step by step; its last line chooses among the
corpora that ``--calib auto`` draws from.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from quality import (
    WHOLE_GRID,
    Grid,
    Row,
    key,
    least_heldout,
    new_row,
    plain,
    read_rows,
    spread,
)  # beside this one

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.model.checkpoint import load_tokenizer
from nirvana_deploy.model.sources import resolve_model


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--calib", required=True, help="text whose held-out windows decide")
    parser.add_argument("--eval-text", type=Path, required=True, help="another text, to measure on")
    parser.add_argument("--quality", type=Path, required=True, help="rows of benchmarks/quality.py")
    parser.add_argument("--out", type=Path, required=True, help="JSONL of rows; continued when it exists")
    parser.add_argument("--corpora", nargs="*", default=["pydoc", "self"], help="[pydoc self]")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--gamma", type=float, nargs="+", default=None, help="[M/A]")
    parser.add_argument("--seeds", type=int, default=2, help="of every other corpus [2]")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    options = parser.parse_args()
    rows = read_rows(options.out)
    if not options.table:
        measure(options, rows)
    print(table([*read_rows(options.quality), *rows], sparsity=options.sparsity))


def measure(options: argparse.Namespace, rows: list[Row]) -> None:
    """Append to ``rows``, and to the file, the candidates of the other corpora that are not there yet."""
    settings = json.dumps(read_rows(options.quality)[0]["settings"])
    agreed = json.loads(settings)
    for name in ("eval_windows", "heldout_windows", "num_sequences", "allocation"):
        setattr(options, name, agreed[name])
    source = resolve_model(options.model)
    grid = Grid(source.path, load_tokenizer(source.path), options)
    if grid.settings(source.name) != agreed:
        raise SystemExit(f"{options.quality} was measured with another model or other texts.")
    gammas = options.gamma or [grid.default_gamma]
    done = {key(row) for row in rows}
    for seed, corpus in itertools.product(range(options.seeds), options.corpora):
        wanted = [
            row
            for saliency, gamma in itertools.product(WHOLE_GRID, gammas)
            if key(row := new_row(agreed, saliency, options.sparsity, gamma, seed) | {"corpus": corpus})
            not in done
        ]
        if wanted:
            rows += grid.measured(wanted)
            write_bytes(options.out, "".join(json.dumps(row) + "\n" for row in rows).encode())


def table(rows: Sequence[Row], *, sparsity: float = 0.4) -> str:
    """Markdown: ever wider choices, what the least KL took from each, and what else it could have been."""
    candidates = [
        row
        for row in plain(rows)
        if row["sparsity"] == sparsity
        and row["saliency"] in WHOLE_GRID
        and row["settings"]["allocation"] == "global"
    ]
    if not candidates:
        return "Nothing to choose from yet."
    own = [row for row in candidates if "corpus" not in row]
    default = [
        row for row in candidates if (row["saliency"], row["gamma"]) == ("nirvana", row["default_gamma"])
    ]
    steps = {
        "seeds": [row for row in own if row in default],
        "seeds and gammas": [row for row in own if row["saliency"] == "nirvana"],
        "seeds, gammas and saliencies": own,
        "seeds, gammas, saliencies and corpora": candidates,
        "seeds and corpora without a text of one's own": [row for row in default if "corpus" in row],
    }
    lines = [
        "| chosen among | candidates | least KL takes | its perplexity | all candidates: median (range) | "
        "rank correlation of KL and perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for choice, pool in steps.items():
        if not pool or (choice.endswith("saliencies and corpora") and pool == own):
            continue
        taken = least_heldout(pool)
        cells = [choice, str(len(pool)), name(taken), f"{taken['perplexity']:.1f}", spread(pool)]
        lines.append(f"| {' | '.join([*cells, rank_correlation(pool)])} |")
    drawn = f"Without a choice (`nirvana`, gamma M/A, a random seed): {spread(steps['seeds'])}"
    if own != candidates:
        drawn += f"; over all corpora {spread(default)}"
    return "\n".join([*lines, "", f"{drawn}. Sparsity {sparsity:g}."])


def name(row: Row) -> str:
    """A candidate for people."""
    corpus = f"{row['corpus']} " if "corpus" in row else ""
    return f"{row['saliency']}, gamma {row['gamma']:g}, {corpus}seed {row['seed']}"


def rank_correlation(rows: Sequence[Row]) -> str:
    """Spearman's, of held-out KL and perplexity on the other text; nothing for less than four candidates."""
    if len(rows) < 4:
        return ""
    kl, perplexity = (
        np.argsort(np.argsort([row[what] for row in rows])) for what in ("heldout_kl", "perplexity")
    )
    return f"{np.corrcoef(kl, perplexity)[0, 1]:.2f}"


if __name__ == "__main__":
    main()
