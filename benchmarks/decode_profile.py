"""Where the time of a decode step goes, beside what the memory allows: the profile behind decode_speed.py.

    python benchmarks/decode_profile.py WORK [--steps 100] [--threads N] [--json FILE]

WORK is the --work folder of decode_speed.py. Every variant takes the same step, one token behind a prompt,
in ONNX Runtime with the cache in place: all in turns without the profiler, for the time of a step, then each
with it, for the share of every operator (measure/roofline/profile.py). Others may use the machine, so the
fastest tenth of the steps counts (p10). The profiler costs microseconds a node, so nodes add up to more than
a step: they show proportions.

``bytes`` are the stored weights that a step reads (all but embedding rows and rotary tables), ``bound`` the
time that reading them takes at the measured memory bandwidth.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nirvana_deploy  # noqa: F401  first: it switches ONNX Runtime's telemetry off

# isort: split
import numpy as np
import onnx
import onnxruntime

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import default_threads, measured_environment
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.measure.roofline.profile import events_of, passes_of, summed

VARIANTS = ("dense", "dense-int8", "dense-w8", "dense-w4", "builder-int4", "pruned-int8", "pruned-w4")
WARM_UP = 20
_LOOKED_UP = {"Gather", "GatherBlockQuantized", "GroupQueryAttention"}
"""Operators that read a few rows of their initializers."""


def main() -> None:
    """Measure, print a table for each variant, and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, help="[physical cores]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    threads = options.threads or default_threads()
    folders = {name: options.work / name for name in VARIANTS if (options.work / name).is_dir()}
    environment = measured_environment(threads=threads)
    bandwidth = environment["memory_bandwidth_gb_per_s"]
    steps_ms = alternating(folders, options.prompt_tokens, steps=options.steps, threads=threads)
    rows: dict[str, Any] = {}
    for name, folder in folders.items():
        low, middle = np.quantile(steps_ms[name], [0.1, 0.5])
        weights = weights_read(folder)
        rows[name] = {
            "step_ms": {"min": min(steps_ms[name]), "p10": float(low), "p50": float(middle)},
            "bytes": weights,
            "bound_ms": weights / bandwidth / 1e6,
            "gb_per_s": weights / float(low) / 1e6,
            "profile": profiled(folder, options.prompt_tokens, steps=options.steps, threads=threads),
        }
        print(table(name, rows[name]), flush=True)
    record = {
        "schema": 2,
        "environment": environment,
        "prompt_tokens": options.prompt_tokens,
        "steps": options.steps,
        "variants": rows,
    }
    if options.json:
        write_json(options.json, record)


def session_of(folder: Path, *, threads: int, profile: Path | None = None) -> Any:
    """A session of the folder's graph with the settings of this package's runner."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 3
    if profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(folder / "model.onnx", settings, providers=["CPUExecutionProvider"])


def stepper(folder: Path, session: Any, prompt_tokens: int) -> Callable[[], None]:
    """One token behind ``prompt_tokens``, with past and present in one buffer."""
    given = {
        "input_ids": np.array([[5]]),
        "attention_mask": np.ones((1, prompt_tokens + 1), dtype=np.int64),
    }
    head_dim = read_json(folder / "genai_config.json")["model"]["decoder"]["head_size"]
    binding, generator = session.io_binding(), np.random.default_rng(0)
    values = []
    for node in session.get_inputs():
        array = given.get(node.name)
        if array is None:
            shape = (1, node.shape[1], prompt_tokens + 64, head_dim)
            array = generator.standard_normal(shape).astype(np.float32)
        values.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_input(node.name, values[-1])
        if node.name.startswith("past_key_values."):
            binding.bind_ortvalue_output(node.name.replace("past_key_values", "present"), values[-1])
    binding.bind_output("logits")

    def step(keep: object = values) -> None:
        session.run_with_iobinding(binding)

    return step


def alternating(
    folders: dict[str, Path], prompt_tokens: int, *, steps: int, threads: int
) -> dict[str, list[float]]:
    """Milliseconds of every step, by variant; they take turns of ten steps in random order."""
    steppers = {
        name: stepper(folder, session_of(folder, threads=threads), prompt_tokens)
        for name, folder in folders.items()
    }
    found: dict[str, list[float]] = {name: [] for name in steppers}
    generator = np.random.default_rng(0)
    for turn in range(-(-steps // 10) + 1):
        for name in generator.permutation(list(steppers)):
            steppers[name]()  # the weights of the last variant leave the caches
            for _ in range(10):
                start = time.perf_counter()
                steppers[name]()
                if turn:  # the first turn warms up
                    found[name].append(1e3 * (time.perf_counter() - start))
    return found


def profiled(folder: Path, prompt_tokens: int, *, steps: int, threads: int) -> dict[str, Any]:
    """Where a step's time goes; other programs' graphs, which the package's runner does not take, too."""
    took_ms = []
    with tempfile.TemporaryDirectory() as scratch:
        session = session_of(folder, threads=threads, profile=Path(scratch) / "profile")
        step = stepper(folder, session, prompt_tokens)
        for _ in range(WARM_UP + steps):
            start = time.perf_counter()
            step()
            took_ms.append(1e3 * (time.perf_counter() - start))
        passes = list(passes_of(events_of(Path(session.end_profiling()))))
    vocab_size = session.get_outputs()[0].shape[-1]
    return summed([passes[WARM_UP:]], took_ms[WARM_UP:], vocab_size)


def weights_read(folder: Path) -> int:
    """Bytes of the stored weights that one step reads whole."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    read = {name for node in graph.node if node.op_type not in _LOOKED_UP for name in node.input}
    total = 0
    for tensor in graph.initializer:
        if tensor.name in read:
            bits = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
            total += int(np.prod(tensor.dims, dtype=np.int64)) * bits // 8
    return total


def table(name: str, row: dict[str, Any]) -> str:
    """For people."""
    took, profile = row["step_ms"], row["profile"]
    nodes = sum(one["nodes"] for one in profile["operators"])
    lines = [
        f"{name}: step {took['p10']:.2f} ms (min {took['min']:.2f}, p50 {took['p50']:.2f}), {nodes} nodes, "
        f"{row['bytes'] / 1e6:.0f} MB of weights: {row['gb_per_s']:.0f} GB/s, bound {row['bound_ms']:.2f} ms"
    ]
    for one in profile["operators"][:8]:
        lines.append(f"    {one['operator']:36}{one['nodes']:5}{one['ms']:8.3f} ms")
    lines.append(f"    {'between operators':41}{profile['between_ms']:8.3f} ms")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
