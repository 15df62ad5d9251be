"""What pruning costs when the model is far larger than memory: seconds, CPU seconds, peak memory.

    python benchmarks/scale.py 8b [--sequences 4] [--seq-len 128] [--json FILE]
    python benchmarks/scale.py 1b --in-memory
    python benchmarks/scale.py 1b --layers 4 --reconstruct 64
    python benchmarks/scale.py 8b --layers 2 --best 32 --seq-len 256

Writes a checkpoint of random bf16 weights in the exact shape of Llama-3-8B or Llama-3.2-1B (or of a tiny
model, to try the script), shard by shard, to a temporary folder, and in a fresh process scores it on random
tokens, plans, slices and saves. Neurons and KV heads get scales of their own, as trained ones have: without
them all scores would be nearly alike. Then the result is opened lazily and its shapes are compared with the
plan. The checkpoint was just written: as much of it as fits is still in the system's file cache.

Peak memory comes from one layer, the head and one shard, hardly from the number of layers: --layers 2 with
the 8b shape shows it in minutes. The promise is a peak of at most 6 GB; exits with 1 when it is broken. With
--reconstruct N what the cut leaves is refitted on N sequences. With --best N the cut is that of --preset best
in place of scores: curves, then selection inside the refit, on N sequences. With --in-memory another process
holds the whole model in float32 and does one plain backward; its plan must be the same.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import measured_environment
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.resources import require_free_bytes
from nirvana_deploy.measure.worker import peak_rss_bytes
from nirvana_deploy.model.checkpoint import Checkpoint, load_checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import INDEX_FILE, expected_shapes
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.cutting import Cutter
from nirvana_deploy.prune.plan import PrunePlan, make_plan, pruned_shape
from nirvana_deploy.prune.plan_file import read_plan, write_plan
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.prune.refit.reconstruct import reconstruct_layers
from nirvana_deploy.prune.saliency.gradient import SALIENCIES, saliency_named
from nirvana_deploy.prune.saliency.units import UnitScores, scored_tensors, unit_sums
from nirvana_deploy.prune.streaming.score import score_units

PEAK_PROMISE_BYTES = 6_000_000_000
IN_MEMORY_PROMISE = 1.3
"""Streamed seconds per second of one backward in memory."""
_SHARD_BYTES = 1_000_000_000
_BLOCK_ELEMENTS = 1 << 24
_WEIGHT_STD = 0.02
_UNIT_SCALE_STD = 0.7


def _llama(
    layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocab: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "dtype": "bfloat16",
    }


SHAPES: dict[str, dict[str, Any]] = {
    "8b": _llama(32, 4096, 32, 8, 128, 14336, 128256, tied=False),
    "1b": _llama(16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    "tiny": _llama(4, 256, 8, 4, 32, 512, 10000, tied=False),
}


def main() -> None:
    """Write the checkpoint, measure, print a table, and say whether the promises hold."""
    options = _options()
    if options.worker:
        _WORKERS[options.worker](options)
        return
    environment = measured_environment(threads=torch.get_num_threads())
    config = SHAPES[options.shape] | {"num_hidden_layers": options.layers}
    shape = shape_from_config(config)
    dense_bytes = 2 * (shape.linear_parameters + shape.embedding_parameters)
    folder = options.folder or Path(tempfile.gettempdir())
    require_free_bytes(folder, 2 * dense_bytes, what="The random checkpoint with its pruned copy")
    with tempfile.TemporaryDirectory(dir=folder, prefix="nirvana-scale-") as temporary:
        options.work = Path(temporary)
        start = time.perf_counter()
        write_random_checkpoint(options.work / "dense", config)
        written_s = time.perf_counter() - start
        print(f"Wrote {dense_bytes / 1e9:.2f} GB of random bf16 weights in {written_s:.0f} s.", flush=True)
        record: dict[str, Any] = {
            "schema": 1,
            "environment": environment,
            "shape": options.shape,
            "layers": options.layers,
            "parameters": shape.linear_parameters + shape.embedding_parameters,
            "dense_bytes": dense_bytes,
            "saliency": options.saliency,
            "sparsity": options.sparsity,
            "sequences": options.sequences,
            "seq_len": options.seq_len,
            "reconstruct_sequences": options.reconstruct,
            "best_sequences": options.best,
            "written_s": written_s,
            "streamed": in_fresh_process("best" if options.best else "streamed", options),
            "result": check_result(options.work / "pruned", shape, read_plan(options.work / "streamed.json")),
        }
        if options.in_memory:
            record["in_memory"] = in_fresh_process("in-memory", options)
            record["comparison"] = compared(options.work, record)
    record["promise"] = promises(record)
    print(table(record))
    if options.json:
        write_json(options.json, record)
    sys.exit(0 if all(record["promise"]["kept"].values()) else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128, help="tokens in a sequence [128]")
    parser.add_argument("--sparsity", type=float, default=0.4)
    gradients = [name for name, method in SALIENCIES.items() if method.functional]
    parser.add_argument("--saliency", choices=gradients, default="nirvana")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go for a while [the system's]")
    parser.add_argument("--reconstruct", type=int, default=0, metavar="N", help="refit on N sequences too")
    parser.add_argument("--best", type=int, default=0, metavar="N", help="curves and refit on N sequences")
    parser.add_argument("--in-memory", action="store_true", help="compare with one backward in memory")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", choices=list(_WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.layers = options.layers or SHAPES[options.shape]["num_hidden_layers"]
    return options


def write_random_checkpoint(folder: Path, config: dict[str, Any], *, seed: int = 0) -> None:
    """A sharded checkpoint of random bf16 weights; memory is bounded by one shard."""
    folder.mkdir(parents=True)
    rng = np.random.Generator(np.random.SFC64(seed))
    shape = shape_from_config(config)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, dimensions in expected_shapes(shape).items():
        if shards[-1] and sum(2 * np.prod(d) for d in [*shards[-1].values(), dimensions]) > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = dimensions
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random_tensor(rng, name, size, shape.head_dim) for name, size in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config)


def _random_tensor(rng: np.random.Generator, name: str, size: tuple[int, ...], head_dim: int) -> torch.Tensor:
    tensor = torch.ones(size, dtype=torch.bfloat16)
    if len(size) == 1:
        return tensor  # a norm
    scale = np.full(size[0], _WEIGHT_STD * 12**0.5, dtype=np.float32)
    if name.endswith(("v_proj.weight", "up_proj.weight")):
        unit = head_dim if "v_proj" in name else 1
        scale *= np.repeat(rng.lognormal(sigma=_UNIT_SCALE_STD, size=size[0] // unit), unit)
    step = max(1, _BLOCK_ELEMENTS // size[1])
    for start in range(0, size[0], step):
        rows = slice(start, min(start + step, size[0]))
        block = rng.random((rows.stop - start, size[1]), dtype=np.float32)
        block -= 0.5
        block *= scale[rows, None]
        tensor[rows] = torch.from_numpy(block)
    return tensor


def in_fresh_process(worker: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one of the workers and return what it reports of itself."""
    command = [sys.executable, __file__, options.shape, "--worker", worker, "--work", str(options.work)]
    for name in ("layers", "sequences", "seq_len", "sparsity", "saliency", "reconstruct", "best"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    start = time.perf_counter()
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"The {worker} run of {options.shape} failed.")
    report: dict[str, Any] = read_json(options.work / "report.json")
    return report | {"process_s": time.perf_counter() - start}


@contextmanager
def stage(stages: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """Add seconds, CPU seconds, bytes read from disk and the process's peak so far to ``stages``."""
    process = psutil.Process()
    start, cpu, read = time.perf_counter(), time.process_time(), _disk_read_bytes(process)
    yield
    stages[name] = {
        "seconds": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
        "disk_read_bytes": _disk_read_bytes(process) - read,
        "peak_rss_bytes_so_far": peak_rss_bytes(),
    }


def _disk_read_bytes(process: psutil.Process) -> int:
    return process.io_counters().read_bytes if hasattr(process, "io_counters") else 0


def streamed(options: argparse.Namespace) -> None:
    """Worker: score, plan and slice as ``nirvana-deploy prune`` does."""
    tokens = _tokens(options)
    stages: dict[str, dict[str, float]] = {}
    profile = cProfile.Profile()
    with stage(stages, "score"), profile:
        dense = Checkpoint.open(options.work / "dense")
        scores = score_units(dense, tokens, saliency=options.saliency, spill_folder=options.work)
    with stage(stages, "plan"):
        plan = _write_plan_of(scores, options, "streamed")
    reconstruction = options.work / "reconstruction" if options.reconstruct else None
    if reconstruction is not None:
        with stage(stages, "reconstruct"):
            reconstruct_layers(dense, plan, _tokens(options, options.reconstruct), reconstruction)
    with stage(stages, "slice"):
        slice_checkpoint(dense, plan, options.work / "pruned", reconstruction=reconstruction)
    write_json(
        options.work / "report.json",
        {"stages": stages, "score_parts_s": score_parts(profile), "peak_rss_bytes": peak_rss_bytes()},
    )


def best(options: argparse.Namespace) -> None:
    """Worker: curves, selection inside the refit and slicing, as the default recipe does."""
    tokens = _tokens(options, options.best)
    stages: dict[str, dict[str, float]] = {}
    dense = Checkpoint.open(options.work / "dense")
    cutter = Cutter(dense, Pruning(sparsity=options.sparsity), seed=0, spill_folder=options.work)
    with stage(stages, "curves"):
        curves = cutter.curves(tokens)
    with stage(stages, "refit"):
        plan, _ = cutter.select(cutter.allocated(curves), tokens, options.work / "reconstruction", None)
    write_plan(plan, options.work / "streamed.json")
    with stage(stages, "slice"):
        slice_checkpoint(dense, plan, options.work / "pruned", reconstruction=options.work / "reconstruction")
    write_json(options.work / "report.json", {"stages": stages, "peak_rss_bytes": peak_rss_bytes()})


def in_memory(options: argparse.Namespace) -> None:
    """Worker: the whole model in float32 and one backward through transformers' own classes."""
    stages: dict[str, dict[str, float]] = {}
    functional = saliency_named(options.saliency).functional
    assert functional is not None
    batch = torch.from_numpy(_tokens(options))
    with stage(stages, "score"):
        model = load_checkpoint(options.work / "dense")
        shape = Checkpoint.open(options.work / "dense").shape
        (functional(model(batch, use_cache=False).logits, batch) / len(batch)).backward()
        parameters = dict(model.named_parameters())
        layers = []
        for index in range(len(shape.layers)):
            gradients = {name: parameters[name].grad for name in scored_tensors(shape, index)}
            scores = {name: g * parameters[name].detach() for name, g in gradients.items() if g is not None}
            layers.append(unit_sums(shape, index, {name: score.abs_() for name, score in scores.items()}))
    with stage(stages, "plan"):
        units = UnitScores(groups=tuple(g for g, _ in layers), neurons=tuple(n for _, n in layers))
        _write_plan_of(units, options, "in-memory")
    write_json(options.work / "report.json", {"stages": stages, "peak_rss_bytes": peak_rss_bytes()})


_WORKERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "streamed": streamed,
    "best": best,
    "in-memory": in_memory,
}


def _tokens(options: argparse.Namespace, sequences: int | None = None) -> Any:
    vocab = SHAPES[options.shape]["vocab_size"]
    size = (sequences or options.sequences, options.seq_len)
    return np.random.default_rng(0).integers(0, vocab, size=size)


def _write_plan_of(scores: UnitScores, options: argparse.Namespace, name: str) -> PrunePlan:
    shape = Checkpoint.open(options.work / "dense").shape
    plan = make_plan(shape, scores, sparsity=options.sparsity, saliency=options.saliency)
    write_plan(plan, options.work / f"{name}.json")
    np.savez(options.work / f"{name}.npz", np.concatenate(scores.groups), np.concatenate(scores.neurons))
    return plan


def score_parts(profile: cProfile.Profile) -> dict[str, float]:
    """Wall seconds of scoring by what they were spent on."""
    entries = pstats.Stats(profile).stats  # type: ignore[attr-defined]

    def seconds(function: str, file: str = "") -> float:
        """With everything it called."""
        return sum(e[3] for (path, _, name), e in entries.items() if name == function and file in path)

    read = seconds("load", "weights.py") + seconds("rows", "weights.py")
    parts = {
        "read weights and check them": read,
        "convert to float32": seconds("<method 'to' of 'torch._C.TensorBase' objects>"),
        "layers, forward and recomputed": seconds("run", "stacks.py"),
        "layers, backward": seconds("<method 'run_backward' of 'torch._C._EngineBase' objects>"),
        "head": seconds("states_gradient", "head.py") - seconds("blocks", "head.py"),
        "sums over units": seconds("unit_sums", "units.py"),
    }
    return parts | {"other": seconds("score_units", "score.py") - sum(parts.values())}


def check_result(folder: Path, shape: ModelShape, plan: PrunePlan) -> dict[str, Any]:
    """Open the pruned checkpoint without reading it, compare its shapes with the plan, read one tensor."""
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    checkpoint = Checkpoint.open(folder)
    found, weights = checkpoint.shape, checkpoint.weights
    opened_s = time.perf_counter() - start
    grown = psutil.Process().memory_info().rss - before
    if found.layers != pruned_shape(shape, plan).layers:
        raise SystemExit("The pruned checkpoint does not have the planned shapes.")
    weights.load(f"{found.family.layer(len(found.layers) - 1)}.mlp.down_proj.weight")
    files = sorted(folder.glob("*.safetensors"))
    return {
        "planned_shapes": True,
        "met_removed_share": plan.budget.met_removed_share,
        "opened_s": opened_s,
        "opened_rss_growth_bytes": grown,
        "bytes": sum(file.stat().st_size for file in files),
        "shards": len(files),
    }


def compared(work: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The streamed run against the one in memory."""
    plans = [read_plan(work / f"{name}.json") for name in ("streamed", "in-memory")]
    scores = [np.load(work / f"{name}.npz") for name in ("streamed", "in-memory")]
    difference = max(float(np.max(np.abs(scores[0][k] / scores[1][k] - 1))) for k in scores[0].files)
    seconds = [record[name]["stages"]["score"]["seconds"] for name in ("streamed", "in_memory")]
    cpu = [record[name]["stages"]["score"]["cpu_s"] for name in ("streamed", "in_memory")]
    return {
        "identical_plan": plans[0] == plans[1],
        "max_relative_score_difference": difference,
        "streamed_seconds_per_in_memory_second": seconds[0] / seconds[1],
        "streamed_cpu_s_per_in_memory_cpu_s": cpu[0] / cpu[1],
    }


def promises(record: dict[str, Any]) -> dict[str, Any]:
    """What is promised, and whether it held."""
    kept = {"peak": record["streamed"]["peak_rss_bytes"] <= PEAK_PROMISE_BYTES}
    promise: dict[str, Any] = {"peak_rss_bytes": PEAK_PROMISE_BYTES}
    if "comparison" in record:
        promise["streamed_seconds_per_in_memory_second"] = IN_MEMORY_PROMISE
        kept["plan"] = record["comparison"]["identical_plan"]
        kept["time"] = record["comparison"]["streamed_seconds_per_in_memory_second"] <= IN_MEMORY_PROMISE
    return promise | {"kept": kept}


def table(record: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{record['shape']}, {record['layers']} layers: {record['parameters'] / 1e9:.2f}e9 parameters, "
        f"{record['dense_bytes'] / 1e9:.2f} GB in bf16; "
        f"{record['best_sequences'] or record['sequences']} x {record['seq_len']} tokens, "
        f"{'curves and refit' if record['best_sequences'] else record['saliency']}"
    ]
    for run in ("streamed", "in_memory"):
        for name, cost in record.get(run, {"stages": {}})["stages"].items():
            lines.append(
                f"  {run:9} {name:6} {cost['seconds']:8.1f} s  {cost['cpu_s']:8.1f} s CPU  "
                f"{cost['disk_read_bytes'] / 1e9:6.2f} GB from disk  "
                f"peak {cost['peak_rss_bytes_so_far'] / 1e9:.2f} GB"
            )
            if name == "score" and run == "streamed":
                parts = record[run]["score_parts_s"]
                lines += [f"    {seconds:8.1f} s  {part}" for part, seconds in parts.items()]
    result = record["result"]
    lines.append(
        f"  Result: {result['bytes'] / 1e9:.2f} GB in {result['shards']} shards, "
        f"{result['met_removed_share']:.1%} of linear weights removed, opens in {result['opened_s']:.2f} s."
    )
    if comparison := record.get("comparison"):
        lines.append(
            f"  Against memory: {comparison['streamed_seconds_per_in_memory_second']:.2f} x the seconds, "
            f"plan {'identical' if comparison['identical_plan'] else 'DIFFERENT'}, scores within "
            f"{comparison['max_relative_score_difference']:.1e}."
        )
    lines += [
        f"  Promise ({what}): {'kept' if kept else 'BROKEN'}"
        for what, kept in record["promise"]["kept"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
