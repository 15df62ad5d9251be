"""Everything that needs a GPU, in one command: the tests, then dense against pruned as engines.

    python benchmarks/gpu.py OUT [--work DIR] [--runtime tensorrt-rtx] [--prompt-tokens 128]
        [--new-tokens 128] [--repeats 15] [--recover 200k] [--json FILE] [--build-only]

OUT is a folder that `nirvana-deploy prune-export` made. For each runtime that is installed and each form of
the KV cache, dense and pruned are exported in fp16, built for this GPU, verified against ONNX Runtime at the
corners of their profiles, and timed in alternating rounds; the record holds every sample, GPU compute time
and device memory beside the latencies. Exits with 1 where a test fails or a comparison does not pass. The
batch is fixed to one, as for somebody who decodes alone: decode gets the kernels of a single row, for which
the engine stores its linears a second time (engine/build.py), so its size is not that of engine/stage.py.

--build-only stops before anything runs, and needs no GPU with tensorrt-rtx: it tries the first half.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.engine.build import engine_from_onnx
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.targets import RTX, BuilderOptions
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.benchmark import benchmark, variant_from_folder
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.output import stage
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.folder import recover_folder
from nirvana_deploy.recover.record import Recovered
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.table import engine_runtimes
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice
from nirvana_deploy.runtime.tensorrt.memory import plan_memory
from nirvana_deploy.runtime.tensorrt.record import EngineRecord
from nirvana_deploy.verify.cases import answers_of, engine_cases, prompts_for
from nirvana_deploy.verify.compare import compare_runners
from nirvana_deploy.verify.tolerance import device_tolerance

FORMS = {"concat": "portable", "in-place": "static-cache"}
DTYPE = "fp16"


@dataclass(frozen=True)
class Model:
    """One engine to measure, and what it came from."""

    name: str
    checkpoint: Path
    folder: Path
    engine: Path
    record: EngineRecord


def gpu_facts() -> dict[str, Any]:
    """What the numbers depend on; raises NirvanaError where there is no GPU."""
    with CudaDevice() as device:
        free, total = device.memory_bytes()
        facts = {
            "gpu": device.name,
            "compute_capability": device.compute_capability,
            "memory_bytes": total,
            "free_bytes": free,
        }
    for package in ("cuda-bindings", "tensorrt", "tensorrt-rtx-cu12", "onnxruntime", "onnxruntime-gpu"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return facts


def run_tests() -> dict[str, Any]:
    """The tests marked ``gpu``, in a process of their own."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/runtime/tensorrt/test_gpu.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    print(done.stdout)
    return {"passed": done.returncode == 0, "output": done.stdout}


def models_of(
    out: Path, work: Path, *, runtime: str, form: str, target: str | None, total_tokens: int
) -> list[Model]:
    """Export and build dense and pruned in one form for one runtime; what exists is used again."""
    checkpoints = {
        "dense": Path(read_json(out / "manifest.json")["model"]["path"]),
        "pruned": out / "checkpoint",
    }
    models = []
    for name, checkpoint in checkpoints.items():
        folder = work / f"onnx-{name}-{form}"
        if not folder.is_dir():
            slots = total_tokens if form == "in-place" else None
            onnx_from_checkpoint(
                Checkpoint.open(checkpoint), folder, dtype=DTYPE, flavor=FORMS[form], cache_tokens=slots
            )
        targets = (target,) if target is not None and runtime == RTX else None
        built = engine_from_onnx(
            folder,
            work / f"{runtime}-{form}",
            name=name,
            lengths=Lengths(max_batch=1, max_length=total_tokens),
            options=BuilderOptions(runtime, targets=targets),
        )
        print(
            f"{runtime} {form} {name}: {built.record.engine_bytes / 1e6:.1f} MB, built in "
            f"{built.record.build.seconds:.1f} s"
        )
        models.append(Model(name, checkpoint, folder, built.path, built.record))
    return models


def verified(model: Model, runtime: str) -> dict[str, Any]:
    """The engine against ONNX Runtime, which computes the same ONNX file in float32."""
    with (
        OrtDecoder(model.folder, in_float32=True) as reference,
        open_runner(model.engine, runtime=runtime) as runner,
    ):
        prompts, new_tokens = answers_of(model.record, prompts_for(model.checkpoint, runner.vocab_size))
        report = compare_runners(
            reference,
            runner,
            cases=engine_cases(model.record, vocab_size=runner.vocab_size),
            tolerance=device_tolerance(DTYPE, layers=len(reference.kv_heads)),
            prompts=prompts,
            new_tokens=new_tokens,
        )
    for check in report.checks:
        print(f"  {check.name}: {check.max_abs_diff:.2e} of {check.tolerance:.2e}")
    greedy = report.greedy[0]
    print(f"  greedy: {greedy.equal_prompts} equal and {greedy.ties} ties of {greedy.prompts} prompts")
    return report.to_json()


def timed(models: list[Model], runtime: str, workload: Workload) -> dict[str, Any]:
    """Dense against pruned, taking turns."""
    variants = [
        variant_from_folder(
            model.name,
            model.folder,
            shape_from_config(read_json(model.checkpoint / "config.json")),
            runtime=runtime,
            path=model.engine,
        )
        for model in models
    ]
    result = benchmark(variants, workload=workload)
    for variant in result["variants"]:
        on_device = variant["decode_device_ms"]["p50"]
        print(
            f"  {variant['name']:7} TTFT {variant['ttft_ms']['p50']:.2f} ms, TPOT "
            f"{variant['tpot_ms']['p50']:.3f} ms ({on_device:.3f} on the GPU), "
            f"{variant['peak_device_bytes'] / 1e6:.0f} MB of device memory"
        )
    (comparison,) = result["comparisons"]
    print(
        f"  pruned decodes {comparison['tpot_speedup']:.3f}x as fast "
        f"(bound {comparison['bound_tpot_speedup']:.3f}x)"
    )
    return result


def measured(models: list[Model], runtime: str, workload: Workload) -> dict[str, Any]:
    """Verification, memory plan and times of one form in one runtime."""
    return {
        "engines": {model.name: model.record.to_json() for model in models},
        "planned_bytes": {model.name: asdict(plan_memory(model.record)) for model in models},
        "verified": {model.name: verified(model, runtime) for model in models},
        "benchmark": timed(models, runtime, workload),
    }


def recovered(out: Path, work: Path, budget: str) -> dict[str, Any]:
    """The course of a training of a copy of OUT, with tokens a second and the most device memory."""
    import torch

    shutil.copytree(out, work / "recovered", ignore=shutil.ignore_patterns("gpu", "engine"))
    torch.cuda.reset_peak_memory_stats()
    recover_folder(work / "recovered", recover=budget)
    with Run.open(work / "recovered") as run:
        done = run.result(stage.RECOVER, Recovered)
    return {
        **asdict(done),
        "tokens_per_second": done.tokens_per_second,
        "peak_device_bytes": torch.cuda.max_memory_allocated(),
    }


def all_passed(record: Mapping[str, Any]) -> bool:
    """Whether the tests and every comparison passed."""
    reports = [r for found in record["runs"].values() for r in found["verified"].values()]
    return bool(record["tests"]["passed"] and reports and all(report["passed"] for report in reports))


def main(arguments: list[str] | None = None) -> int:
    """Run, print, record; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=None, help="for ONNX folders and engines [OUT/gpu]")
    parser.add_argument("--runtime", action="append", choices=list(engine_runtimes()), default=None)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--recover", metavar="TIME|TOKENS", help="train a copy of OUT, too: 200k, for one")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--build-only", action="store_true")
    options = parser.parse_args(arguments)
    work = options.work or options.out / "gpu"
    total_tokens = max(256, options.prompt_tokens + options.new_tokens)
    workload = Workload(
        prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens, repeats=options.repeats
    )
    runtimes = options.runtime or [name for name, row in engine_runtimes().items() if find_spec(row.module)]
    try:
        facts = None if options.build_only else gpu_facts()
        target = None if facts is None else facts["compute_capability"]
        record: dict[str, Any] = {"environment": facts, "workload": asdict(workload), "runs": {}}
        if facts is not None:
            print(f"{facts['gpu']} ({target})")
            record["tests"] = run_tests()
        for runtime in runtimes:
            for form in FORMS:
                models = models_of(
                    options.out, work, runtime=runtime, form=form, target=target, total_tokens=total_tokens
                )
                if facts is not None:
                    record["runs"][f"{runtime} {form}"] = measured(models, runtime, workload)
        if facts is not None and options.recover:
            record["recovery"] = recovered(options.out, work, options.recover)
    except NirvanaError as error:
        print(error, file=sys.stderr)
        return 1
    if options.build_only:
        print("Built only: nothing was run, verified or timed.")
        return 0
    write_json(options.json or options.out / "gpu.json", record)
    return 0 if all_passed(record) else 1


if __name__ == "__main__":
    sys.exit(main())
