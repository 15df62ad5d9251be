"""Decode speed of quantized models in onnxruntime-genai, beside its own int4 build of the dense model.

    python benchmarks/decode_speed.py OUT [--work DIR] [--rounds 15] [--threads N] [--json FILE]

OUT is a folder that `nirvana-deploy prune-export` made. Dense and pruned model are exported in the gqa
flavor and quantized with the head (int8, w8, w4; plain rounding: speed does not depend on the codes), and
onnxruntime-genai's model builder makes its own int4 of the dense one. What is in --work already is used
again. All variants then generate in turns, in one process, each round in another order; of every decode step
the time is kept. Ratios are those of medians over all rounds, with p10 and p90 of the ratio of one round.

Promises: dense int8 2.5 and dense w4 3.5 times as fast as dense fp32, pruned w4 1.3 times as fast as
the builder's int4. Exits with 1 when one is broken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nirvana_deploy  # noqa: F401  first: it switches ONNX Runtime's telemetry off

# isort: split
import numpy as np
import onnxruntime_genai
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import default_threads, measured_environment
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization

PROMISES = (("dense-int8", "dense", 2.5), ("dense-w4", "dense", 3.5), ("pruned-w4", "builder-int4", 1.3))
BUILDER = "builder-int4"


def main() -> None:
    """Make what is missing, measure, print the table, and say whether the promises hold."""
    options = _options()
    threads = options.threads or default_threads()
    with tempfile.TemporaryDirectory(prefix="nirvana-decode-") as temporary:
        folders = variants(options.out, options.work or Path(temporary))
        prompt = read_windows(options.out / "calibration.safetensors")["heldout"].reshape(-1)
        step_ms = measured_steps(
            folders,
            prompt[: options.prompt_tokens],
            new_tokens=options.new_tokens,
            rounds=options.rounds,
            threads=threads,
        )
        weights = {name: _weights_bytes(folder) for name, folder in folders.items()}
    record = {
        "schema": 1,
        "environment": measured_environment(threads=threads),
        "runtime": f"onnxruntime-genai {onnxruntime_genai.__version__}",
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "variants": {
            name: summary(steps) | {"weights_bytes": weights[name]} for name, steps in step_ms.items()
        },
        "promises": [speedup(step_ms, fast, slow) | {"promise": least} for fast, slow, least in PROMISES],
    }
    print(table(record))
    if options.json:
        write_json(options.json, record)
    sys.exit(0 if all(row["speedup"] >= row["promise"] for row in record["promises"]) else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the models here [a temporary folder]")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="[physical cores]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def variants(out: Path, work: Path) -> dict[str, Path]:
    """The ONNX folders to compare, made in ``work`` unless they are there."""
    dense = Path(read_json(out / "manifest.json")["model"]["path"])
    calibration = read_windows(out / "calibration.safetensors")["calibration"][:4]
    folders: dict[str, Path] = {}
    for name, checkpoint in (("dense", dense), ("pruned", out / "checkpoint")):
        folders[name] = work / name
        if not folders[name].exists():
            onnx_from_checkpoint(Checkpoint.open(checkpoint), folders[name], flavor="gqa")
        for scheme in ("int8", "w8", "w4"):
            target = folders[f"{name}-{scheme}"] = work / f"{name}-{scheme}"
            if target.exists():
                continue
            if scheme == "int8":
                quantize_onnx(
                    folders[name],
                    target,
                    Quantization(scheme=scheme, head=True, smooth="none"),
                    calibration=calibration,
                )
            else:
                quantize_onnx(folders[name], target, Quantization(scheme=scheme, head=True, rounding="plain"))
    folders[BUILDER] = work / BUILDER
    if not folders[BUILDER].exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(dense)]
        command += ["-o", str(folders[BUILDER]), "-p", "int4", "-e", "cpu", "-c", str(work / "cache")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folders


def measured_steps(
    folders: Mapping[str, Path], prompt: NDArray[np.int64], *, new_tokens: int, rounds: int, threads: int
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of every decode step, [rounds, new_tokens] by variant; a first round is not counted."""
    models = {name: _loaded(folder, threads) for name, folder in folders.items()}
    found: dict[str, list[list[float]]] = {name: [] for name in models}
    generator = np.random.default_rng(0)
    for number in range(rounds + 1):
        for name in generator.permutation(list(models)):
            steps = _decode_ms(models[name], prompt, new_tokens)
            if number:
                found[name].append(steps)
    return {name: np.array(steps) for name, steps in found.items()}


def _loaded(folder: Path, threads: int) -> Any:
    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    return onnxruntime_genai.Model(config)


def _decode_ms(model: Any, prompt: NDArray[np.int64], new_tokens: int) -> list[float]:
    parameters = onnxruntime_genai.GeneratorParams(model)
    length = len(prompt) + new_tokens + 1
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt.astype(np.int32))
    generator.generate_next_token()
    steps = []
    for _ in range(new_tokens):
        start = time.perf_counter()
        generator.generate_next_token()
        steps.append(1e3 * (time.perf_counter() - start))
    return steps


def summary(steps: NDArray[np.float64]) -> dict[str, float]:
    """Of all steps of a variant."""
    low, middle, high = np.quantile(steps, [0.1, 0.5, 0.9])
    return {
        "p10_ms": float(low),
        "p50_ms": float(middle),
        "p90_ms": float(high),
        "min_ms": float(steps.min()),
    }


def speedup(steps: Mapping[str, NDArray[np.float64]], fast: str, slow: str) -> dict[str, Any]:
    """How many times as fast ``fast`` is: by medians over all rounds, and the spread over single rounds."""
    of_round = np.median(steps[slow], axis=1) / np.median(steps[fast], axis=1)
    low, high = np.quantile(of_round, [0.1, 0.9])
    return {
        "fast": fast,
        "slow": slow,
        "speedup": float(np.median(steps[slow]) / np.median(steps[fast])),
        "speedup_p10_p90": [float(low), float(high)],
    }


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.onnx*"))


def table(record: Mapping[str, Any]) -> str:
    """For people."""
    environment = record["environment"]
    dense = record["variants"]["dense"]["p50_ms"]
    lines = [
        f"{environment['cpu']}, {environment['threads']} threads, load {environment['load_average_1min']}; "
        f"{record['runtime']}, {record['rounds']} rounds of {record['new_tokens']} steps behind "
        f"{record['prompt_tokens']} tokens",
        f"{'':14}{'MB':>8}{'p10 ms':>9}{'p50 ms':>9}{'p90 ms':>9}{'min ms':>9}{'x dense':>9}",
    ]
    for name, v in record["variants"].items():
        lines.append(
            f"{name:14}{v['weights_bytes'] / 1e6:>8.1f}{v['p10_ms']:>9.2f}{v['p50_ms']:>9.2f}"
            f"{v['p90_ms']:>9.2f}{v['min_ms']:>9.2f}{dense / v['p50_ms']:>9.2f}"
        )
    for row in record["promises"]:
        low, high = row["speedup_p10_p90"]
        kept = "kept" if row["speedup"] >= row["promise"] else "BROKEN"
        lines.append(
            f"{row['fast']} against {row['slow']}: {row['speedup']:.2f}x "
            f"(p10-p90 of rounds {low:.2f}-{high:.2f}), "
            f"promise {row['promise']}x: {kept}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
