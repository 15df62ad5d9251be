"""Prove ONNX folders against their checkpoints, and runtimes against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import CHECKPOINT, holds_model
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage
from nirvana_deploy.output.variants import DENSE, PRUNED, ModelVariant, variant_named
from nirvana_deploy.runtime.models import engines_of, models_for, place_of
from nirvana_deploy.runtime.onnxruntime.providers import open_on_cpu
from nirvana_deploy.runtime.registry import is_engine, open_runner
from nirvana_deploy.runtime.runner import CountsLinears
from nirvana_deploy.runtime.table import runtime_named
from nirvana_deploy.runtime.tensorrt.record import DECODER, read_engine_record
from nirvana_deploy.verify.against_torch import attentions_of, dtype_of_graph, verify_onnx
from nirvana_deploy.verify.cases import (
    NEW_TOKENS,
    Continued,
    answers_of,
    engine_cases,
    prompts_for,
    runtime_cases,
)
from nirvana_deploy.verify.compare import compare_runners
from nirvana_deploy.verify.report import VerifyReport
from nirvana_deploy.verify.tolerance import device_tolerance


def verify(
    run: Run,
    dense: Checkpoint,
    *,
    baseline: bool,
    threads: int | None,
    heard: dict[str, Continued] | None = None,
) -> Stage:
    """Prove both ONNX folders against their checkpoints; differences are a result, not an exception.

    What ONNX Runtime continues prompts with goes into ``heard``, by variant.
    """

    def work() -> dict[str, Any]:
        checkpoints = {PRUNED: run.out / CHECKPOINT}
        if baseline:
            checkpoints[DENSE] = dense.path
        reports = {}
        for name, checkpoint in checkpoints.items():
            folder = run.out / variant_named(name).folder
            with run.progress.within(name):
                own = {} if heard is None else heard.setdefault(name, {})
                reports[name] = verify_onnx(
                    checkpoint, folder, threads=threads, heard=own, progress=run.progress
                )
        return {name: report.to_json() for name, report in reports.items()}

    return Stage(stage.VERIFY, needs=(stage.CHECKPOINT, stage.ONNX, stage.DENSE_ONNX), makes=(), work=work)


def verified(run: Run) -> dict[str, VerifyReport]:
    """What the stage found, by variant."""
    return run.result(stage.VERIFY, dict[str, VerifyReport])


def compare_in(run: Run, runtime: str, *, threads: int | None) -> dict[str, VerifyReport]:
    """Every model in ``runtime``, by its path, against ONNX Runtime on the CPU, computing in float32.

    An engine is compared with the ONNX folder that it was built from where that lies beside it, else with
    its variant's; there are as many comparisons as engines.
    """
    paths: dict[Path, ModelVariant] = (
        engines_of(run, runtime)
        if runtime_named(runtime).takes == "engine"
        else {path: variant for variant, path in models_for(run, runtime).items()}
    )
    reports = {}
    for path, variant in paths.items():
        record = read_engine_record(path, check_bytes=False) if is_engine(path) else None
        beside = path.parent / f"{path.stem.removesuffix(f'-{DECODER}')}-onnx"
        folder = beside if holds_model(beside) else run.out / variant.folder
        with (
            open_on_cpu(folder, threads=threads, in_float32=True) as reference,
            open_runner(path, runtime=runtime, threads=threads) as runner,
        ):
            if isinstance(runner, CountsLinears):
                counts = ", ".join(f"{count} in {kind}" for kind, count in runner.linears().most_common())
                run.progress.note(f"Linears of {place_of(run, path)} in {runtime}: {counts}")
            vocab_size = runner.vocab_size
            prompts, new_tokens = prompts_for(run.out / CHECKPOINT, vocab_size), NEW_TOKENS
            cases = runtime_cases(vocab_size)
            if record is not None:
                prompts, new_tokens = answers_of(record, prompts)
                cases = engine_cases(record, vocab_size=vocab_size)
            reports[place_of(run, path)] = compare_runners(
                reference,
                runner,
                cases=cases,
                tolerance=device_tolerance(
                    record.dtype if record else dtype_of_graph(folder).name,
                    layers=attentions_of(run.out / CHECKPOINT),
                    quantization=variant.scheme,
                    rounds_inputs=runtime_named(runtime).rounds_inputs,
                ),
                prompts=prompts,
                new_tokens=new_tokens,
                progress=run.progress,
            )
    return reports
