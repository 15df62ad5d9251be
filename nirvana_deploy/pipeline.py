"""The whole arrow: model -> calibrate -> score -> plan -> slice -> checkpoint -> onnx -> measure -> report.

:func:`prune_export` runs all of it; the other functions do one part of it again on a finished folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nirvana_deploy.artifact import read_json, require_free_bytes
from nirvana_deploy.errors import VerificationError
from nirvana_deploy.export.verify import VerifyReport, verify_onnx
from nirvana_deploy.measure.benchmark import Workload
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.progress import SILENT, Progress
from nirvana_deploy.prune.plan import (
    PrunePlan,
    check_plan_fits,
    default_gamma,
    read_plan,
    removed_counts,
    write_plan,
)
from nirvana_deploy.prune.saliency import saliency_named
from nirvana_deploy.run import Run
from nirvana_deploy.stages import (
    BENCHMARK_FILE,
    CHECKPOINT,
    PLAN_FILE,
    calibrate,
    checked_shape,
    decide,
    export,
    folder_of,
    model_record,
    quality,
    refresh_quality,
    score,
    slice_stage,
    speed,
    verify,
    write_pages,
)


@dataclass(frozen=True)
class Deployment:
    """What :func:`prune_export` made."""

    out: Path
    plan: PrunePlan
    manifest: dict[str, Any]
    benchmark: dict[str, Any] | None
    report: Path | None
    """report.html"""


def prune_export(
    model: str,
    *,
    sparsity: float,
    out: Path | str | None = None,
    saliency: str = "nirvana",
    gamma: float | None = None,
    round_to: int = 8,
    calib: str = "pydoc",
    num_sequences: int = 32,
    seq_len: int = 128,
    seed: int = 0,
    micro_batch: int = 8,
    eval_text: Path | str | None = None,
    baseline: bool = True,
    run_benchmark: bool = True,
    threads: int | None = None,
    until: Literal["checkpoint", "report"] = "report",
    resume: bool = False,
    force: bool = False,
    command: str | None = None,
    progress: Progress = SILENT,
) -> Deployment:
    """Prune ``model``, export it to ONNX, verify it, measure it against the dense baseline, write a report.

    ``model`` is an alias, a hub id, a folder or a .gguf file; ``sparsity`` the share of decoder linear
    weights to remove; ``gamma`` None means M/A; ``calib`` a source of calibration text, of which
    ``num_sequences`` windows of ``seq_len`` tokens are drawn by ``seed``; ``eval_text`` a file to measure
    quality on instead of held-out windows of the calibration source. ``baseline`` False leaves the dense
    model out of export and measurements, and with it everything relative. ``until`` "checkpoint" stops
    after plan.json and checkpoint/; ``resume`` continues from there.

    Raises NirvanaError for the user's problems and VerificationError when the exported model does not
    compute what the checkpoint computes.
    """
    saliency_named(saliency)
    source = resolve_model(model, progress=progress)
    shape = checked_shape(source.path, seq_len=seq_len)
    gamma = default_gamma(shape) if gamma is None else gamma
    removed_counts(shape, sparsity=sparsity, gamma=gamma, round_to=round_to)  # refuse before any work
    out = Path(out) if out is not None else Path(f"{source.name}-s{sparsity:g}")
    copies = 1 if until == "checkpoint" else 2 + baseline
    parameters = shape.linear_parameters + shape.embedding_parameters
    require_free_bytes(out, 4 * copies * parameters, what="The output")
    options = {
        "model": model,
        "sparsity": sparsity,
        "saliency": saliency,
        "gamma": gamma,
        "allocation": "global",
        "round_to": round_to,
        "calib": calib,
        "num_sequences": num_sequences,
        "seq_len": seq_len,
        "seed": seed,
        "micro_batch": micro_batch,
        "eval_text": str(eval_text) if eval_text is not None else None,
    }
    if until == "report":
        options |= {"baseline": baseline, "benchmark": run_benchmark, "threads": threads}
    run = Run.begin(
        out,
        options=options,
        model=model_record(source),
        command=command or "called from Python",
        resume=resume,
        force=force,
        progress=progress,
    )
    calibrate(
        run,
        source,
        calib=calib,
        num_sequences=num_sequences,
        seq_len=seq_len,
        seed=seed,
        eval_text=eval_text,
    )
    score(run, source, saliency=saliency, seed=seed, micro_batch=micro_batch)
    plan = decide(
        run,
        source,
        shape,
        sparsity=sparsity,
        gamma=gamma,
        round_to=round_to,
        saliency=saliency,
        seed=seed,
    )
    slice_stage(run, source, plan)
    if until == "checkpoint":
        return Deployment(out=run.out, plan=plan, manifest=run.manifest, benchmark=None, report=None)
    export(run, source, baseline=baseline)
    report = verify(run, source, baseline=baseline, threads=threads)
    if all(result.passed for result in report.values()):
        quality(run, threads=threads)
        if run_benchmark:
            speed(run, workload=Workload(threads=threads))
    page = write_pages(run)
    for name, result in report.items():
        result.require_passed(run.out / folder_of(name))
    measured = run.out / BENCHMARK_FILE
    return Deployment(
        out=run.out,
        plan=plan,
        manifest=run.manifest,
        benchmark=read_json(measured) if run_benchmark else None,
        report=page,
    )


def prune_by_plan(
    model: str,
    *,
    plan: Path,
    out: Path,
    force: bool = False,
    command: str | None = None,
    progress: Progress = SILENT,
) -> PrunePlan:
    """Redo the cut of a plan.json alone: writes ``out``/plan.json and ``out``/checkpoint, scores nothing.

    Raises NirvanaError when the plan is damaged or was made for a model of another shape.
    """
    decided = read_plan(plan)
    source = resolve_model(model, progress=progress)
    check_plan_fits(decided, checked_shape(source.path))
    run = Run.begin(
        out,
        options={"model": model, "plan": str(plan)},
        model=model_record(source),
        command=command or "called from Python",
        force=force,
        progress=progress,
    )
    run.stage("plan", [PLAN_FILE], lambda: write_plan(decided, run.out / PLAN_FILE))
    slice_stage(run, source, decided)
    return decided


@dataclass(frozen=True)
class FolderCheck:
    """What :func:`verify_folder` found."""

    out: Path
    damaged: list[str]
    """Files that are missing or whose sha256 differs from the manifest's."""
    reports: dict[str, VerifyReport]

    def require_passed(self) -> None:
        """Raise VerificationError unless every file and every comparison is as it should be."""
        if self.damaged:
            raise VerificationError(
                f"{self.out}: {len(self.damaged)} files differ from the manifest or are missing: "
                f"{', '.join(self.damaged[:3])}{', ...' if len(self.damaged) > 3 else ''}.",
                hint="Make them again: repeat the prune-export command with --resume.",
            )
        for name, report in self.reports.items():
            report.require_passed(self.out / folder_of(name))


def verify_folder(out: Path, *, threads: int | None = None, progress: Progress = SILENT) -> FolderCheck:
    """Check an output folder: sha256 of every file, then ONNX against checkpoint; changes nothing."""
    run = Run.open(out, progress=progress)
    damaged = [file for name in run.manifest["stages"] for file in run.damaged(name)]
    dense = Path(run.manifest["model"]["path"])
    checkpoints = {"pruned": out / CHECKPOINT, "dense": dense}
    reports = {
        name: verify_onnx(checkpoint, out / folder_of(name), threads=threads, progress=progress)
        for name, checkpoint in checkpoints.items()
        if checkpoint.is_dir() and (out / folder_of(name)).is_dir() and not damaged
    }
    return FolderCheck(out=out, damaged=damaged, reports=reports)


def benchmark_folder(out: Path, *, workload: Workload, progress: Progress = SILENT) -> dict[str, Any]:
    """Measure an output folder again; rewrites benchmark.json and the report, returns benchmark.json."""
    run = Run.open(out, progress=progress)
    speed(run, workload=workload, redo=True)
    write_pages(run)
    result: dict[str, Any] = read_json(out / BENCHMARK_FILE)
    return result


def evaluate_folder(
    out: Path, *, eval_text: Path | None = None, threads: int | None = None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Measure quality of an output folder again; rewrites quality.json, benchmark.json and the report."""
    run = Run.open(out, progress=progress)
    result = quality(run, threads=threads, eval_text=eval_text, redo=True)
    refresh_quality(run)
    write_pages(run)
    return result
