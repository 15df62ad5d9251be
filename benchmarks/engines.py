"""What building a TensorRT-RTX engine costs, pruned against dense: seconds, CPU, memory, bytes.

    python benchmarks/engines.py OUT [--forms fp16-concat,w4-in-place] [--also uniform,round-64] [--json FILE]
    python benchmarks/engines.py --shape 8b [--layers 4] [--only pruned] [--limit-gb 20] [--json FILE]

OUT is a folder that `nirvana-deploy prune-export` made: its checkpoint and the dense model it came from are
built; --also cuts the same scores in other ways (each layer alike, or FFN widths in steps of 64). With
--shape both are random checkpoints in the shape of Llama-3-8B or Llama-3.2-1B, the pruned one cut by random
scores (so its layers differ, as they do in earnest). Each engine is built in a process of its own. Needs no
GPU. --json puts the run into FILE, beside the runs of other models that are there.

The promises: the pruned build takes at most 0.8 of the dense build's CPU time and of its peak memory, and
the engines' bytes are in the proportion of the weights' bytes within 3 %. Exits with 1 when one is broken. A
build that needs more than --limit-gb of memory of its own (pages of the mapped ONNX file are not counted: the
system can drop them) is stopped, and that is what is reported.

What breaks the promises, that of bytes at 135M parameters and that of CPU time at 1B too, found by looking
into the engines: an RTX engine carries each kernel that was generated for it as source text, 0.16 MB apiece,
since each brings a copy of the same definitions (0.13 MB). Their number grows with layers, profiles and
*distinct* widths, not with parameters: engines of as many layers of one width have programs of the same
bytes, dense or pruned, and layers that differ cost more (`kernel_sources` in the record). Of the builder's
options none changes that (optimization level, tactics, auxiliary streams, verbosity and targets were tried);
FFN widths in steps of 64 or `--allocation uniform` do. CPU seconds of one and the same build differ by a
fifth from run to run, and by more where gigabytes are read for the first time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scale import SHAPES, write_random_checkpoint

from nirvana_deploy.artifact import read_json, write_json
from nirvana_deploy.engine.from_checkpoint import onnx_for_engine
from nirvana_deploy.measure.environment import measured_environment
from nirvana_deploy.model.checkpoint import config_json
from nirvana_deploy.model.shape import shape_from_config
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import make_plan
from nirvana_deploy.prune.units import UnitScores
from nirvana_deploy.prune.windows_file import read_scores
from nirvana_deploy.stages import SCORES_FILE

COST_PROMISE = 0.8
SIZE_PROMISE = 0.03
LENGTH_TOKENS = 2048
OTHER_CUTS: dict[str, dict[str, Any]] = {
    "uniform": {"allocation": "uniform"},
    "round-64": {"round_to": 64},
}
"""Variant -> what its plan has of its own."""
_POLL_S = 0.2


def main() -> None:
    """Build, print a table, and say whether the promises hold."""
    options = _options()
    environment = measured_environment(threads=1)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="nirvana-engines-") as temporary:
        work = Path(temporary)
        checkpoints = _checkpoints(options, work)
        for form in options.forms.split(","):
            for variant, checkpoint in checkpoints.items():
                records.append(
                    {"variant": variant, "form": form, **_measured(checkpoint, form, options, work)}
                )
                print(_line(records[-1]), flush=True)
    comparisons = _comparisons(records)
    for one in comparisons:
        print(
            f"{one['form']:14} {one['variant']} / dense: CPU {one['cpu_ratio']:.2f}, memory "
            f"{one['memory_ratio']:.2f} (promise {COST_PROMISE}); bytes {one['engine_ratio']:.3f} (promise: "
            f"weights' {one['weights_ratio']:.3f} within {SIZE_PROMISE:.0%}, is {one['size_deviation']:+.1%})"
        )
    kept = all(all(one["kept"].values()) for one in comparisons)
    if comparisons:
        print("Promises kept." if kept else "A promise is broken.")
    if options.json:
        _add_run(options, {"environment": environment, "builds": records, "comparisons": comparisons})
    sys.exit(0 if kept else 1)


def _add_run(options: argparse.Namespace, run: dict[str, Any]) -> None:
    """Put a run into the record of all models, in the place of an earlier one of the same builds."""
    record = read_json(options.json) if options.json.is_file() else {"schema": 2, "runs": {}}
    name = options.shape or read_json(options.out / "manifest.json")["model"]["name"]
    if options.only:
        name += f", {options.only} alone"
    record["runs"][name] = run
    write_json(options.json, record)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT")
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--sparsity", type=float, default=0.4, help="of a random checkpoint [0.4]")
    parser.add_argument(
        "--forms", default="fp16-concat", help="of fp16|bf16|w8|w4-concat|in-place [fp16-concat]"
    )
    parser.add_argument("--also", help=f"other cuts by the scores of OUT, built too: {','.join(OTHER_CUTS)}")
    parser.add_argument("--only", choices=["dense", "pruned"])
    parser.add_argument("--repeats", type=int, default=1, help="builds of each, the median is taken [1]")
    parser.add_argument("--limit-gb", type=float, help="stop a build that needs more memory of its own")
    parser.add_argument("--folder", type=Path, help="where models and engines go for a while [the system's]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if (options.out is None) == (options.shape is None):
        parser.error("give either OUT or --shape")
    options.also = options.also.split(",") if options.also else []
    if options.also and (options.out is None or not set(options.also) <= set(OTHER_CUTS)):
        parser.error(f"--also takes OUT and some of {','.join(OTHER_CUTS)}")
    return options


def _checkpoints(options: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Variant -> checkpoint, the dense one first."""
    if options.out is not None:
        dense = Path(read_json(options.out / "manifest.json")["model"]["path"])
        found = {"dense": dense, "pruned": options.out / "checkpoint"}
        found |= {name: _cut_again(options.out, dense, work / name, name) for name in options.also}
    else:
        config = SHAPES[options.shape]
        config = config | {"num_hidden_layers": options.layers or config["num_hidden_layers"]}
        found = {"dense": work / "dense", "pruned": work / "pruned"}
        write_random_checkpoint(found["dense"], config)
        if options.only != "dense":
            rng, shape = np.random.default_rng(0), shape_from_config(config)
            scores = UnitScores(
                groups=tuple(rng.lognormal(size=layer.kv_heads) for layer in shape.layers),
                neurons=tuple(rng.lognormal(size=layer.ffn_width) for layer in shape.layers),
            )
            plan = make_plan(shape, scores, sparsity=options.sparsity, saliency="random")
            slice_checkpoint(found["dense"], plan, found["pruned"])
        if options.only == "pruned":
            shutil.rmtree(found["dense"])
    return {name: path for name, path in found.items() if options.only in (None, name)}


def _cut_again(out: Path, dense: Path, folder: Path, name: str) -> Path:
    """The checkpoint of OUT's scores and sparsity, cut in another way."""
    said = read_json(out / "manifest.json")["options"]
    own = {"allocation": said["allocation"], "round_to": said["round_to"], **OTHER_CUTS[name]}
    gamma = said["gamma"] if own["allocation"] == "global" else None
    shape, scores = shape_from_config(config_json(dense)), read_scores(out / SCORES_FILE)
    plan = make_plan(shape, scores, sparsity=said["sparsity"], gamma=gamma, saliency=said["saliency"], **own)
    slice_checkpoint(dense, plan, folder)
    return folder


def _measured(checkpoint: Path, form: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Export ``checkpoint`` in ``form`` and build it; of several builds the one of median CPU time."""
    precision, _, kv = form.partition("-")
    onnx, engine = work / "onnx", work / "engine"
    scheme = precision if precision in ("w8", "w4") else None
    onnx_for_engine(
        checkpoint,
        onnx,
        dtype="fp16" if scheme else precision,
        kv=kv,
        quantize=scheme,
        rounding="plain" if scheme else None,
        cache_tokens=LENGTH_TOKENS,
    )
    samples = [_built(onnx, engine, options.limit_gb) for _ in range(options.repeats)]
    shutil.rmtree(onnx)
    shutil.rmtree(engine, ignore_errors=True)
    middle = sorted(samples, key=lambda sample: sample.get("cpu_s", 0.0))[len(samples) // 2]
    return middle | {"cpu_samples_s": [sample.get("cpu_s") for sample in samples]}


def _built(onnx: Path, engine: Path, limit_gb: float | None) -> dict[str, Any]:
    """One build in a new process; what that process says of itself."""
    shutil.rmtree(engine, ignore_errors=True)
    started = time.perf_counter()
    worker = Path(__file__).with_name("engine_worker.py")
    command = [sys.executable, str(worker), str(onnx), str(engine), str(LENGTH_TOKENS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak_bytes, stopped = _watched(process, limit_gb)
    said = process.stdout.read() if process.stdout else ""
    result: dict[str, Any] = {
        "onnx_bytes": sum(file.stat().st_size for file in onnx.glob("model.onnx*")),
        "process_s": round(time.perf_counter() - started, 1),
        "peak_own_bytes": peak_bytes,
    }
    if stopped:
        result["stopped"] = f"needed more than {limit_gb} GB of memory of its own"
    elif process.returncode:
        raise SystemExit(f"Building {onnx} failed with exit code {process.returncode}.")
    else:
        result |= json.loads(said)
    return result


def _watched(process: subprocess.Popen[str], limit_gb: float | None) -> tuple[int, bool]:
    """Wait for a process; (its peak of anonymous memory, whether it was stopped for passing the limit)."""
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            break
        peak = max(peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
        if limit_gb is not None and peak > limit_gb * 1e9:
            psutil.Process(process.pid).kill()
            process.wait()
            return peak, True
        time.sleep(_POLL_S)
    process.wait()
    return peak, False


def _comparisons(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pruned against dense, for every form of which both were built."""
    found = []
    for form in dict.fromkeys(record["form"] for record in records):
        of_form = {r["variant"]: r for r in records if r["form"] == form and "stopped" not in r}
        for variant in [name for name in of_form if name != "dense" and "dense" in of_form]:
            found.append(_comparison(of_form["dense"], of_form[variant]))
    return found


def _comparison(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
    """One pruned build against the dense one of the same form."""
    ratios = {key: pruned[key] / dense[key] for key in ("cpu_s", "peak_rss_bytes", "engine_bytes")}
    weights_ratio = pruned["weights_bytes"] / dense["weights_bytes"]
    deviation = ratios["engine_bytes"] / weights_ratio - 1
    return {
        "form": dense["form"],
        "variant": pruned["variant"],
        "cpu_ratio": ratios["cpu_s"],
        "memory_ratio": ratios["peak_rss_bytes"],
        "engine_ratio": ratios["engine_bytes"],
        "weights_ratio": weights_ratio,
        "size_deviation": deviation,
        "kept": {
            "cpu": ratios["cpu_s"] <= COST_PROMISE,
            "memory": ratios["peak_rss_bytes"] <= COST_PROMISE,
            "size": abs(deviation) <= SIZE_PROMISE,
        },
    }


def _line(record: dict[str, Any]) -> str:
    name = f"{record['form']:14} {record['variant']:8}"
    if "stopped" in record:
        return f"{name} stopped after {record['process_s']} s: {record['stopped']}"
    return (
        f"{name} {record['seconds']:8.1f} s  {record['cpu_s']:8.1f} s CPU  "
        f"peak {record['peak_rss_bytes'] / 1e9:6.2f} GB (own {record['peak_own_bytes'] / 1e9:.2f})  "
        f"engine {record['engine_bytes'] / 1e6:9.1f} MB, weights {record['weights_bytes'] / 1e6:9.1f} MB, "
        f"{record['programs']['kernel_sources']} kernels as text"
    )


if __name__ == "__main__":
    main()
