"""What recovery brings back: the same cut trained for several budgets, judged on texts that had no say.

    python benchmarks/recover.py OUT --budget 16k 64k 200k --texts DIR --out recover.jsonl
    python benchmarks/recover.py OUT --budget 64k --method lora --text self --out recover.jsonl
    python benchmarks/recover.py OUT --budget 64k --for w4 --rounded --out recover.jsonl
    python benchmarks/recover.py --table --out recover.jsonl

OUT is a folder that `nirvana-deploy prune` or `prune-export` made; it is copied, not touched. Budgets are
those of --recover. A row holds the course, perplexity and KL of transformers' logits on each kind of text
(--texts, one kind a file; pydoc and code held out of training), and what the model writes to the report's
prompts; the first row of an OUT is the cut itself. With --rounded each row has the same texts once more, the
linears of the layers in four bits (scales of least error), as `quantize --rounding search` deploys them. Rows
are appended; what is there is not measured again. Tasks, with --tasks DIR, are those of recipes.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frontier import texts_of  # the scripts beside this one
from numpy.typing import NDArray
from recipes import read_rows, with_tasks

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.machine import cpu_seconds, environment, peak_rss_bytes
from nirvana_deploy.measure.answers import NEW_TOKENS, PROMPTS
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import CHECKPOINT
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.folder import recover_folder
from nirvana_deploy.prune.plan_file import read_plan
from nirvana_deploy.quantize.weights.rounding import round_weight
from nirvana_deploy.recover.stage import greedy_answers

Row = dict[str, Any]
_KEY = ("sparsity", "calibrated_on", "budget", "method", "text", "learning_rate", "limit", "for", "rounded")


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outs", type=Path, nargs="*", metavar="OUT")
    parser.add_argument("--budget", nargs="+", default=[], help="as --recover takes it")
    parser.add_argument("--method", default="distill")
    parser.add_argument("--for", dest="rounded_for", help="as --recover-for takes it")
    parser.add_argument("--rounded", action="store_true", help="judge in four bits, too")
    parser.add_argument("--text", default="mix", help="as --recover-text takes it")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="files or folders of texts")
    parser.add_argument("--tasks", type=Path, default=None, help="folder of local tasks")
    parser.add_argument("--limit", type=int, default=500, help="items of each task")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the folders here [a temporary one]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = read_rows(options.out)
    if not options.table:
        with tempfile.TemporaryDirectory(prefix="nirvana-recover-") as temporary:
            for out in options.outs:
                for row in measured(
                    out, options, options.work or Path(temporary), {key(row) for row in rows}
                ):
                    rows.append(row)
                    write_bytes(options.out, "".join(json.dumps(one) + "\n" for one in rows).encode())
                    print(line(row), flush=True)
    print(table(rows))


def measured(out: Path, options: argparse.Namespace, work: Path, done: set[str]) -> Iterator[Row]:
    """The cut, and each recovery of it that is not there yet."""
    with Run.open(out) as run:
        dense = Checkpoint.open(run.dense)
    plan = read_plan(out / "plan.json")
    texts = texts_of(dense, options.texts)
    about = {
        "sparsity": plan.sparsity,
        "calibrated_on": plan.calibration["source"] if plan.calibration else None,
        "limit": options.limit if options.tasks else None,
        "rounded": True if options.rounded else None,
    }
    cut = about | {"budget": "0", "method": None, "text": None, "learning_rate": None}
    if key(cut) not in done:
        yield cut | judged(out / CHECKPOINT, dense, texts, options)
    for budget in options.budget:
        row = about | {
            "budget": budget,
            "method": options.method,
            "text": options.text,
            "learning_rate": options.learning_rate,
            "for": options.rounded_for,
        }
        if key(row) in done:
            continue
        folder = work / f"{out.name}-{options.method}-{options.rounded_for or 'float'}-{budget}"
        shutil.copytree(out, folder)
        started = cpu_seconds()
        asked = {
            "recover": budget,
            "recover_method": options.method,
            "recover_text": options.text,
            "learning_rate": options.learning_rate,
            "recover_for": options.rounded_for,
        }
        recover_folder(folder, asked)
        spent = {"cpu_s": cpu_seconds() - started, "peak_rss_bytes": peak_rss_bytes()}
        with Run.open(folder) as run:
            course = {"course": run.result(stage.RECOVER, dict[str, Any])}
        yield row | spent | course | judged(folder / CHECKPOINT, dense, texts, options)


def judged(
    folder: Path, dense: Checkpoint, texts: Mapping[str, NDArray[np.int64]], options: argparse.Namespace
) -> Row:
    """Quality, answers and accuracies of a checkpoint."""
    pruned = Checkpoint.open(folder)
    model = pruned.load()
    row: Row = {
        "texts": compared(dense.load(), model, texts),
        "answers": dict(zip(PROMPTS, greedy_answers(pruned, PROMPTS, NEW_TOKENS), strict=True)),
        "environment": environment() | {"load_average_1min": os.getloadavg()[0]},
    }
    if options.rounded:
        row["rounded_texts"] = compared(dense.load(), in_four_bits(model), texts)
    return row | with_tasks(folder, options) if options.tasks else row


@torch.no_grad()
def in_four_bits(model: Any) -> Any:
    """``model`` with the linears of its layers rounded as w4 rounds them without calibration, in place."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            rounded = round_weight(module.weight.numpy().T, bits=4, block_size=32, search=True)
            module.weight.copy_(torch.from_numpy(rounded.dequantized().T))
    return model


@torch.inference_mode()
def compared(dense: Any, pruned: Any, texts: Mapping[str, NDArray[np.int64]]) -> dict[str, Row]:
    """Perplexity of both and KL(dense || pruned) on windows [M, T] of each kind, from whole logits."""
    found = {}
    for name, windows in texts.items():
        kl, losses = [], []
        for window in torch.from_numpy(windows):
            log_p, log_q = (one(window[None]).logits[0].log_softmax(-1) for one in (dense, pruned))
            kl.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
            following = window[1:, None]
            losses.append([float(-one[:-1].gather(1, following).mean()) for one in (log_p, log_q)])
        dense_loss, loss = np.mean(losses, axis=0)
        found[name] = {
            "tokens": int(windows.size),
            "kl": float(np.mean(kl)),
            "kl_standard_error": float(np.std(kl, ddof=1) / np.sqrt(len(kl))),
            "perplexity": float(np.exp(loss)),
            "dense_perplexity": float(np.exp(dense_loss)),
        }
    return found


def key(row: Row) -> str:
    """What makes two rows the same measurement."""
    return json.dumps([row.get(name) for name in _KEY])


def line(row: Row) -> str:
    """One row for people who wait."""
    texts = ", ".join(f"{name} {text['perplexity']:.1f}" for name, text in row["texts"].items())
    return f"{row['sparsity']:g} {row['method'] or 'cut'} {row['budget']}: {texts}"


def table(rows: list[Row]) -> str:
    """Markdown: perplexity and its ratio to dense, by kind of text; rows in four bits beside their own."""
    rows = [one for row in rows for one in (row, _rounded(row)) if one]
    kinds = list(dict.fromkeys(name for row in rows for name in row["texts"]))
    lines = [
        f"| sparsity | method | trained on | tokens | minutes | {' | '.join(kinds)} |",
        "|---" * (5 + len(kinds)) + "|",
    ]
    for row in sorted(rows, key=lambda one: (one["sparsity"], one["method"] or "", str(one["budget"]))):
        course = row.get("course")
        tokens = f"{course['tokens']:,}" if course else "0"
        minutes = f"{(course['seconds'] + course['writing_seconds']) / 60:.0f}" if course else "0"
        cells = [
            f"{text['perplexity']:.1f}, {text['perplexity'] / text['dense_perplexity']:.2f}x"
            if (text := row["texts"].get(kind))
            else ""
            for kind in kinds
        ]
        method = f"{row['method'] or 'the cut'}{', for ' + row['for'] if row.get('for') else ''}"
        method += ", in 4 bits" if row.get("in_four_bits") else ""
        about = [f"{row['sparsity']:g}", method, row["text"] or "", tokens, minutes]
        lines.append(f"| {' | '.join([*about, *cells])} |")
    return "\n".join(lines)


def _rounded(row: Row) -> Row | None:
    """The row of the same model in four bits, if that was judged."""
    if "rounded_texts" not in row:
        return None
    return row | {"texts": row["rounded_texts"], "in_four_bits": True}


if __name__ == "__main__":
    main()
