"""Encoder-decoders on random weights: cost of export, gain of pruning, another exporter's graph beside.

    python benchmarks/seq2seq.py [--shape t5-small] [--sparsity 0.4] [--peer DIR] [--keep DIR] [--json FILE]

The weights of a T5 of the named shape are random, since times do not depend on their values; quality is not
measured. Dense and pruned (units of random rank) decode in alternating rounds. ``--peer`` is the folder that
another exporter made, with optimum's file names, of the same shape: make it from the checkpoint that
``--keep`` leaves in DIR/dense, in an environment of its own (optimum-onnx needs transformers < 4.58):

    optimum-cli export onnx --model DIR/dense --task text2text-generation-with-past PEER

Exits with 1 when our dense graph decodes in more than 1.05 times the peer's time (medians).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.benchmark import alternate, benchmark, speedups, variant_from_folder
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.worker import WorkerProcess
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import default_gamma, make_plan
from nirvana_deploy.prune.streaming.score import score_units

_FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "t5-small": {"d_model": 512, "d_ff": 2048, "num_heads": 8, "num_layers": 6},
    "t5-base": {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 12},
    "flan-t5-base": {"d_model": 768, "d_ff": 2048, "num_heads": 12, "num_layers": 12, **_FLAN},
}
DECODE_PROMISE_RATIO = 1.05


def write_checkpoints(name: str, out: Path, *, sparsity: float) -> dict[str, Path]:
    """A random dense checkpoint of a shape, and a pruned one."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=32128, d_kv=64, decoder_start_token_id=0, **SHAPES[name])
    T5ForConditionalGeneration(config).save_pretrained(out / "dense")
    shape, scores = (
        shape_of(out / "dense"),
        score_units(Checkpoint.open(out / "dense"), None, saliency="random", seed=0),
    )
    gamma = default_gamma(shape)
    plan = make_plan(shape, scores, sparsity=sparsity, gamma=gamma, round_to=64, saliency="random", seed=0)
    slice_checkpoint(Checkpoint.open(out / "dense"), plan, out / "pruned")
    return {"dense": out / "dense", "pruned": out / "pruned"}


def shape_of(checkpoint: Path) -> ModelShape:
    """The shape of a checkpoint."""
    return Checkpoint.open(checkpoint).shape


def exported(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Export a checkpoint; what it cost, imports left out."""
    wall, cpu = time.perf_counter(), time.process_time()
    model = onnx_from_checkpoint(Checkpoint.open(checkpoint), folder)
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "nodes": model.nodes,
        "weights_bytes": model.weights_bytes,
    }


def against_peer(ours: Path, peer: Path, workload: Workload) -> dict[str, Any]:
    """Speed-ups of our graph over the peer's, in alternating rounds of the same runner."""
    with ExitStack() as stack:
        folders = {"peer": peer, "ours": ours}
        workers = {
            name: stack.enter_context(WorkerProcess(name, folder, threads=workload.threads))
            for name, folder in folders.items()
        }
        vocab_size = workers["ours"].loaded.vocab_size
        samples = alternate(workers, workload=workload, vocab_size=vocab_size)
    return speedups(samples["peer"], samples["ours"])


def main() -> int:
    """Export, measure, print, and say whether the promise holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="t5-small")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--peer", type=Path, metavar="DIR", help="a folder with optimum's file names")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave checkpoints and graphs there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    workload = Workload(
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        repeats=options.rounds,
        threads=options.threads,
    )
    with ExitStack() as stack:
        out = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoints = write_checkpoints(options.shape, out, sparsity=options.sparsity)
        exports = {name: exported(path, out / f"{name}-onnx") for name, path in checkpoints.items()}
        variants = [
            variant_from_folder(name, out / f"{name}-onnx", shape_of(path))
            for name, path in checkpoints.items()
        ]
        result = benchmark(variants, workload=workload)
        peer = against_peer(out / "dense-onnx", options.peer, workload) if options.peer else None
    [comparison] = result["comparisons"]
    for name, cost in exports.items():
        print(
            f"export of {name}: {cost['cpu_s']:.2f} CPU s, {cost['wall_s']:.2f} s, {cost['nodes']} nodes, "
            f"{cost['weights_bytes'] / 1e6:.1f} MB"
        )
    for metric in ("tpot", "prefill"):
        print(
            f"{metric} speed-up of pruned: {comparison[f'{metric}_speedup']:.3f}, "
            f"bound {comparison[f'bound_{metric}_speedup']:.3f}"
        )
    if peer:
        print(f"against the peer: decode {peer['tpot_speedup']:.3f}, prefill {peer['prefill_speedup']:.3f}")
    if options.json:
        record = {"shape": options.shape, "sparsity": options.sparsity, "exports": exports, "peer": peer}
        write_json(options.json, {**record, "benchmark": result})
    return int(peer is not None and peer["tpot_speedup"] < 1 / DECODE_PROMISE_RATIO)


if __name__ == "__main__":
    sys.exit(main())
