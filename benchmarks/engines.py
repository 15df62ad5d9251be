"""What building a TensorRT-RTX engine costs, pruned against dense: seconds, CPU, memory, bytes.

    python benchmarks/engines.py OUT [--forms fp16-concat,w4-in-place] [--also uniform] [--twins 64,288]
    python benchmarks/engines.py --shape 8b [--layers 8] [--only pruned] [--limit-gb 20]

OUT is a folder that `nirvana-deploy prune-export` made: its checkpoint and the dense model it came from are
built; --also cuts the same scores in other ways (each layer alike, or FFN widths in steps of 64). With
--shape both are random checkpoints in the shape of Llama-3-8B or Llama-3.2-1B, the pruned one cut by random
scores (so its layers differ, as they do in earnest). Each engine is built in a process of its own, variants
taking turns. Needs no GPU. --json puts the run into FILE, beside what is there of other models and forms.

The promises: the pruned build takes at most 0.8 of the dense build's CPU time and of its memory, and the
engines' bytes are in the proportion of the weights' bytes within 3 %. Exits with 1 when one is broken.
--twins builds narrow models of as many layers too, and says by them what could be kept at all
(engine_promises.py). Memory is the build's own: pages of the mapped ONNX file are not counted, since the
system can drop them; with them it is ``rss_ratio``. A build that needs more of it than --limit-gb is stopped,
and that is what is reported. int8 takes the decision in OUT/onnx-int8, and calibrates the other variants on
OUT's own windows with the same alpha.

What breaks the promises where a model is small, found by looking into the engines: an RTX engine carries each
kernel that was generated for it as source text, 0.16 MB apiece, since each brings a copy of the same
definitions (0.13 MB). Norms, rotary and the like have one text for all layers that are alike. The fused
attention has one for every layer and profile, identical to the letter (SmolLM2: 30 for prefill and 30 for
decode), and with a cache that grows so have the kernels that write present and repeat KV heads for the
prefill (59). The product SiLU(gate) * up has the FFN's width in its text: one for every distinct width and
profile, 50 more in SmolLM2 cut to layers that differ. Flattening that product, a prefill profile with a past,
and each option of the builder (optimization level, tactics, auxiliary streams, verbosity, targets,
compilation cache, user allocation) change none of it; one profile alone halves texts and CPU time, but leaves
decode the kernels of prefill. What does help is fewer distinct widths: FFN widths in steps of 64 or
`--allocation uniform`. CPU seconds of one and the same build differ by a fifth from run to run, hence
--repeats and the median. Where weights are gigabytes, most of the CPU time is the system's, for memory and
files (``system_s``), and goes with the state of the machine: the dense 1B build took 8 to 16 s. The part of
the builder itself hardly falls with the weights there either.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from engine_promises import comparison_line, comparisons, is_twin
from scale import SHAPES, write_random_checkpoint

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import measured_environment
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.engine.from_checkpoint import onnx_for_engine
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, config_json
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.output.layout import CALIBRATION_FILE, SCORES_FILE
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import make_plan
from nirvana_deploy.prune.saliency.units import UnitScores
from nirvana_deploy.prune.scores_file import read_scores
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.int8.spec import Int8Spec, read_spec, record_of
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.rewriting import QuantizeInputs
from nirvana_deploy.quantize.schemes import SCHEMES

LENGTH_TOKENS = 2048
OTHER_CUTS: dict[str, dict[str, Any]] = {
    "uniform": {"allocation": "uniform"},
    "round-64": {"round_to": 64},
}
"""Variant -> what its plan has of its own."""
_TWIN_WIDTH_STEP = 64
_POLL_S = 0.02


def main() -> None:
    """Build, print a table, and say whether the promises hold."""
    options = _options()
    environment = measured_environment(threads=1)
    builds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="nirvana-engines-") as temporary:
        work = Path(temporary)
        checkpoints = _checkpoints(options, work)
        specs = _int8_specs(options, checkpoints, work) if "int8" in options.forms else {}
        for form in options.forms.split(","):
            found = _measured(checkpoints, specs, form, options, work)
            builds += [{"variant": variant, "form": form, **build} for variant, build in found.items()]
            for build in builds[-len(found) :]:
                print(_line(build), flush=True)
    compared = comparisons(builds)
    for one in compared:
        print(comparison_line(one))
    kept = all(all(one["kept"].values()) for one in compared)
    if compared:
        print("Promises kept." if kept else "A promise is broken.")
    if options.json:
        _add_run(options, {"environment": environment, "builds": builds, "comparisons": compared})
    sys.exit(0 if kept else 1)


def _add_run(options: argparse.Namespace, run: dict[str, Any]) -> None:
    """Put a run into the record of all models; forms that it did not build stay as they were."""
    record = read_json(options.json) if options.json.is_file() else {"schema": 3, "runs": {}}
    name = options.shape or read_json(options.out / "manifest.json")["model"]["name"]
    if options.layers:
        name += f", {options.layers} layers"
    if options.only:
        name += f", {options.only} alone"
    forms = options.forms.split(",")
    for key, earlier in record["runs"].get(name, {}).items():
        if isinstance(earlier, list):
            run[key] = [one for one in earlier if one["form"] not in forms] + run[key]
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
        "--forms", default="fp16-concat", help="of fp16|bf16|int8|w8|w4-concat|in-place [fp16-concat]"
    )
    parser.add_argument("--also", help=f"other cuts by the scores of OUT, built too: {','.join(OTHER_CUTS)}")
    parser.add_argument("--only", choices=["dense", "pruned"])
    parser.add_argument("--twins", help="hidden sizes of narrow models to build too: 64,288")
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
    options.twins = [int(size) for size in options.twins.split(",")] if options.twins else []
    if options.twins and options.only:
        parser.error("--twins say what can be kept, so they need both models: leave out --only")
    if "int8" in options.forms and (options.out is None or not (options.out / "onnx-int8").is_dir()):
        parser.error("int8 takes OUT with an onnx-int8: nirvana-deploy quantize OUT --scheme int8")
    return options


def _checkpoints(options: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Variant -> checkpoint, the dense one first."""
    if options.out is not None:
        dense = Path(read_json(options.out / "manifest.json")["model"]["path"])
        found = {"dense": dense, "pruned": options.out / "checkpoint"}
        found |= {name: _cut_again(options.out, dense, work / name, name) for name in options.also}
        config = config_json(dense)
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
            slice_checkpoint(Checkpoint.open(found["dense"]), plan, found["pruned"])
        if options.only == "pruned":
            shutil.rmtree(found["dense"])
    found = {name: path for name, path in found.items() if options.only in (None, name)}
    for hidden in options.twins:
        found[f"twin-{hidden}"] = work / f"twin-{hidden}"
        write_random_checkpoint(found[f"twin-{hidden}"], _narrower(config, hidden))
    return found


def _narrower(config: dict[str, Any], hidden: int) -> dict[str, Any]:
    """As many layers, heads and tokens of the vocabulary, in ``hidden`` channels; the FFN as narrow."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    width = config["intermediate_size"] * hidden // config["hidden_size"]
    narrow = config | {
        "hidden_size": hidden,
        "intermediate_size": max(_TWIN_WIDTH_STEP, width // _TWIN_WIDTH_STEP * _TWIN_WIDTH_STEP),
        "head_dim": head_dim,
    }
    if config["model_type"] == "llama":  # the same network; its configuration takes no such widths
        narrow |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    return narrow


def _cut_again(out: Path, dense: Path, folder: Path, name: str) -> Path:
    """The checkpoint of OUT's scores and sparsity, cut in another way."""
    said = read_json(out / "manifest.json")["options"]
    own = {"allocation": said["allocation"], "round_to": said["round_to"], **OTHER_CUTS[name]}
    gamma = said["gamma"] if own["allocation"] == "global" else None
    shape, scores = Checkpoint.open(dense).shape, read_scores(out / SCORES_FILE)
    plan = make_plan(shape, scores, sparsity=said["sparsity"], gamma=gamma, saliency=said["saliency"], **own)
    slice_checkpoint(Checkpoint.open(dense), plan, folder)
    return folder


def _int8_specs(options: argparse.Namespace, checkpoints: dict[str, Path], work: Path) -> dict[str, Int8Spec]:
    """Variant -> the int8 decision: OUT's own, or calibrated by its windows; a twin has the dense one's."""
    own = read_spec(options.out / "onnx-int8")
    windows = read_windows(options.out / CALIBRATION_FILE)["calibration"]
    specs = {}
    for variant, checkpoint in checkpoints.items():
        if variant == "pruned":
            specs[variant] = own
        elif is_twin(variant):
            specs[variant] = _spec_of_twin(specs["dense"], config_json(checkpoint)["hidden_size"])
        else:
            onnx_from_checkpoint(Checkpoint.open(checkpoint), work / "float")
            quantize_onnx(
                work / "float",
                work / "int8",
                Quantization(scheme="int8", smooth=own.alpha or "none"),
                calibration=windows,
            )
            specs[variant] = read_spec(work / "int8")
            shutil.rmtree(work / "float")
            shutil.rmtree(work / "int8")
    return specs


def _spec_of_twin(dense: Int8Spec, hidden: int) -> Int8Spec:
    """As many outlier channels as the dense model has, so that the graph has the same nodes; no folds."""
    linears = {
        name: replace(linear, outliers=tuple(range(min(len(linear.outliers), hidden // 2))))
        for name, linear in dense.linears.items()
    }
    return replace(dense, linears=linears, smoothing={})


def _measured(
    checkpoints: dict[str, Path],
    specs: dict[str, Int8Spec],
    form: str,
    options: argparse.Namespace,
    work: Path,
) -> dict[str, dict[str, Any]]:
    """Variant -> of its builds in ``form``, taking turns, the one of median CPU time."""
    precision, _, kv = form.partition("-")
    for variant, checkpoint in checkpoints.items():
        onnx_for_engine(
            Checkpoint.open(checkpoint),
            work / f"onnx-{variant}",
            dtype=precision if precision in ("fp16", "bf16") else "fp16",
            kv=kv,
            quantize=_inputs(precision, specs.get(variant)),
            cache_tokens=LENGTH_TOKENS,
        )
    samples: dict[str, list[dict[str, Any]]] = {variant: [] for variant in checkpoints}
    for _ in range(options.repeats):
        for variant, of_variant in samples.items():
            of_variant.append(_built(work / f"onnx-{variant}", work / "engine", options.limit_gb))
            shutil.rmtree(work / "engine", ignore_errors=True)
    for variant in checkpoints:
        shutil.rmtree(work / f"onnx-{variant}")
    return {variant: _middle(of_variant) for variant, of_variant in samples.items()}


def _inputs(precision: str, spec: Int8Spec | None) -> QuantizeInputs | None:
    """A float precision is not quantized; int8 has its decision, the others are rounded plainly."""
    if precision in ("fp16", "bf16"):
        return None
    recipe = Quantization(scheme=precision, rounding="plain")
    if SCHEMES[precision].engine_applies_decision and spec is not None:
        return QuantizeInputs(recipe, decided=record_of(scheme=precision, int8=spec.to_json()))
    return QuantizeInputs(recipe)


def _middle(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The build of median CPU time, with the median of memory, and what all of them took."""
    if any("stopped" in sample for sample in samples):
        return samples[-1]
    middle = sorted(samples, key=lambda sample: sample["cpu_s"])[len(samples) // 2]
    for field in ("cpu_s", "system_s", "peak_own_bytes", "peak_rss_bytes"):
        taken = [sample[field] for sample in samples]
        middle = middle | {field: sorted(taken)[len(taken) // 2], f"{field}_samples": taken}
    return middle


def _built(onnx: Path, engine: Path, limit_gb: float | None) -> dict[str, Any]:
    """One build in a new process; what that process says of itself."""
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
