"""What a step of recovery takes: tokens a second and peak memory, by method and teacher.

    python benchmarks/recover_speed.py smollm2 --out recover-speed.jsonl
    python benchmarks/recover_speed.py --shape 1b --layers 4 --batch 1 --out recover-speed.jsonl
    python benchmarks/recover_speed.py --table --out recover-speed.jsonl

MODEL is an alias or a folder; with --shape it is a checkpoint of random bf16 weights in a shape of scale.py,
of its depth or of --layers. A plain cut of it at --sparsity is trained on random tokens, each way in its own
process: forward and backward, timed after a step that warms up, with the optimizer's share added as recovery
plans it. A teacher on disk is not run. Peak memory is the process's; the optimizer's moments are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from recipes import read_rows  # the scripts beside this one
from scale import SHAPES, write_random_checkpoint

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.machine import environment, peak_rss_bytes
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import make_plan
from nirvana_deploy.prune.streaming.score import score_units
from nirvana_deploy.recover.layers import BlockByBlock
from nirvana_deploy.recover.learning.dtype import in_bfloat16
from nirvana_deploy.recover.recipe import Recovery
from nirvana_deploy.recover.shared import WholeModel

WAYS: dict[str, dict[str, Any]] = {
    "distill, live teacher": {"recover_teacher": "live"},
    "distill, stored teacher": {"recover_teacher": "stored"},
    "distill, stored teacher, checkpointing": {"recover_teacher": "stored", "recover_checkpointing": True},
    "full": {"recover_method": "full", "recover_teacher": "stored"},
    "lora, live teacher": {"recover_method": "lora", "recover_teacher": "live"},
    "lora, stored teacher": {"recover_method": "lora", "recover_teacher": "stored"},
    "layers": {"recover_method": "layers"},
}
_MOMENTS_BYTES = 2 * 4
"""Of AdamW, a trained parameter; of the block at hand where one is trained at a time."""

Row = dict[str, Any]


def main() -> None:
    """Measure every way that is not there yet, then print the table."""
    options = _options()
    if options.worker is not None:
        print(json.dumps(step(options.worker, options.work, options)))
        return
    rows = read_rows(options.out)
    if not options.table:
        done = {key(row) for row in rows}
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="nirvana-recover-speed-") as temporary:
            work = Path(temporary)
            about = prepared(work, options)
            for way in options.way:
                row = about | {"way": way}
                if key(row) in done:
                    continue
                rows.append(row | in_fresh_process(way, work))
                write_bytes(options.out, "".join(json.dumps(one) + "\n" for one in rows).encode())
                print(f"{row['model']} {way}: {rows[-1]['seconds']:.1f} s a step", flush=True)
    print(table(rows))


def prepared(work: Path, options: argparse.Namespace) -> Row:
    """Write the cut, and the dense model where it is a random one; what they are."""
    if options.shape:
        layers = options.layers or SHAPES[options.shape]["num_hidden_layers"]
        write_random_checkpoint(work / "dense", SHAPES[options.shape] | {"num_hidden_layers": layers})
        dense, name = Checkpoint.open(work / "dense"), f"{options.shape} shape, {layers} layers"
    else:
        source = resolve_model(options.model)
        (work / "dense").symlink_to(source.path.resolve(), target_is_directory=True)
        dense, name = Checkpoint.open(source.path), source.name
    scores = score_units(dense, None, saliency="random", seed=0)
    plan = make_plan(dense.shape, scores, sparsity=options.sparsity, saliency="random")
    slice_checkpoint(dense, plan, work / "cut")
    return {
        "model": name,
        "sparsity": options.sparsity,
        "batch": options.batch,
        "seq_len": options.seq_len,
        "threads": torch.get_num_threads(),
        "environment": environment() | {"load_average_1min": os.getloadavg()[0]},
    }


def in_fresh_process(way: str, work: Path) -> Row:
    """What a step that way takes."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", way, "--work", str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def step(way: str, work: Path, options: argparse.Namespace) -> Row:
    """Seconds and bytes of a step."""
    recipe = Recovery(recover="1k", recover_batch=options.batch, **WAYS[way])
    dense, cut = Checkpoint.open(work / "dense"), Checkpoint.open(work / "cut")
    kind = BlockByBlock if recipe.recover_method == "layers" else WholeModel
    model = kind(cut, dense, recipe, work / "state")
    seconds = model.seconds_of_step(options.seq_len)
    trained = model.trained_parameters // (len(cut.shape.layers) if kind is BlockByBlock else 1)
    return {
        "seconds": seconds,
        "bfloat16": in_bfloat16(recipe),
        "tokens_per_second": options.batch * options.seq_len / seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "moments_bytes": _MOMENTS_BYTES * trained,
    }


def key(row: Row) -> str:
    """What makes two rows the same measurement."""
    return json.dumps([row[name] for name in ("model", "sparsity", "batch", "seq_len", "threads", "way")])


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each model and way."""
    lines = [
        "| model | way | step | tokens a second | peak memory | and moments |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [
            f"{row['model']}, {row['sparsity']:g} removed",
            row["way"],
            f"{row['seconds']:.1f} s",
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
            f"{row['moments_bytes'] / 1e9:.2f} GB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def section(rows: Sequence[Row]) -> str:
    """The table, and in what it was measured."""
    if not rows:
        return "Not measured yet."
    where = {
        (row["batch"], row["seq_len"], row["threads"], "bfloat16" if row["bfloat16"] else "float32")
        for row in rows
    }
    told = "; ".join(f"{b} windows of {t} tokens, {n} threads, {d}" for b, t, n, d in sorted(where))
    return f"{table(rows)}\n\nA step: {told}. Moments of the optimizer come on top of the peak."


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", default="smollm2")
    parser.add_argument("--shape", choices=list(SHAPES), help="a random model in its place")
    parser.add_argument("--layers", type=int, help="of the shape [all]")
    parser.add_argument("--way", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--batch", type=int, default=4, help="windows of a step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--worker", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
