"""The whole arrow: model -> calibrate -> score -> plan -> slice -> checkpoint -> onnx -> measure -> report.

:func:`prune_export` runs all of it; the other functions do one part of it again on a finished folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nirvana_deploy.base.artifact import read_json, require_free_bytes
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.calibrate.stage import calibrate, evaluation_windows
from nirvana_deploy.engine.stage import build_engine
from nirvana_deploy.engine.targets import BuilderOptions
from nirvana_deploy.export.decoder import GraphOptions
from nirvana_deploy.export.dtypes import dtype_named
from nirvana_deploy.export.stage import export
from nirvana_deploy.measure.benchmark import Workload
from nirvana_deploy.measure.stage import TasksOn, quality, refresh_quality, speed, tangent_kernel, tasks
from nirvana_deploy.measure.tasks import require_tasks
from nirvana_deploy.model.checkpoint import Checkpoint, model_record
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.output.layout import BENCHMARK_FILE, CHECKPOINT, PLAN_FILE
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.variants import DENSE, PRUNED, SCHEMES, variant_named
from nirvana_deploy.prune.plan import (
    PrunePlan,
    check_plan_fits,
    default_gamma,
    read_plan,
    removed_counts,
    write_plan,
)
from nirvana_deploy.prune.reconstruct import require_tokens
from nirvana_deploy.prune.saliency.gradient import saliency_named
from nirvana_deploy.prune.select import gamma_grid
from nirvana_deploy.prune.stage import Choices, decide, reconstruct_stage, score, select, slice_stage
from nirvana_deploy.quantize.int8.spec import read_record
from nirvana_deploy.quantize.stage import quantize as quantize_stage
from nirvana_deploy.quantize.stage import require_quantized
from nirvana_deploy.report.sensitivity import write_sensitivity
from nirvana_deploy.report.stage import write_pages
from nirvana_deploy.runtime.table import engine_runtimes
from nirvana_deploy.runtime.tensorrt.loading import tensorrt_module
from nirvana_deploy.verify.stage import verify

_AUTO_SALIENCIES = ("nirvana", "taylor")


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
    gamma: float | Literal["auto"] | None = None,
    allocation: str = "global",
    round_to: int = 8,
    calib: str = "pydoc",
    candidates: int | None = None,
    num_sequences: int = 32,
    seq_len: int = 128,
    seed: int = 0,
    micro_batch: int = 8,
    reconstruct: bool = False,
    eval_text: Path | str | None = None,
    dtype: str = "fp32",
    flavor: str = "portable",
    baseline: bool = True,
    run_benchmark: bool = True,
    quantize: Sequence[str] = (),
    quantize_head: bool = False,
    engines: Sequence[str] = (),
    threads: int | None = None,
    until: Literal["checkpoint", "report"] = "report",
    resume: bool = False,
    force: bool = False,
    command: str | None = None,
    progress: Progress = SILENT,
) -> Deployment:
    """Prune ``model``, export it to ONNX, verify it, measure it against the dense baseline, write a report.

    ``model`` is an alias, a hub id, a folder or a .gguf file; ``sparsity`` the share of decoder linear
    weights to remove; ``gamma`` None means M/A; ``allocation`` "global" or "uniform"; ``calib`` a source of
    calibration text, of which ``num_sequences`` windows of ``seq_len`` tokens are drawn by ``seed``.

    Where there is more than one candidate, the one whose masked model departs least (KL) from the dense one
    on held-out windows is taken: ``calib`` may be several sources with commas between, or "auto" (pydoc and
    self; for an encoder-decoder, which writes no text, pydoc); ``candidates`` sets are drawn from each (4
    for "auto", else 1); ``saliency`` may be several or "auto" (nirvana and taylor); ``gamma`` may be "auto"
    (a small grid).

    ``reconstruct`` refits what the cut leaves of the output projections by least squares on the calibration
    windows: no new parameter, no other shape.

    ``eval_text`` is a file to measure quality on instead of held-out windows. ``dtype`` ("fp32", "fp16",
    "bf16") and ``flavor`` ("portable", "gqa") are those of the ONNX graphs; bfloat16 has no arithmetic in
    ONNX Runtime's CPU, where its quality is computed in float32 and nothing is timed. ``baseline`` False
    leaves the dense model out of export and measurements, and with it everything relative. ``quantize`` lists
    schemes ("int8", "w8", "w4") in which the pruned model is quantized too, on the same calibration windows,
    each a variant of its own in the report, ``quantize_head`` with lm_head. ``engines`` lists runtimes
    ("tensorrt-rtx", "tensorrt") for which engines are built, in float16, of the dense, the pruned and each
    quantized model. ``until`` "checkpoint" stops after plan.json and checkpoint/; ``resume`` continues.

    Raises NirvanaError for the user's problems and VerificationError when the exported model does not
    compute what the checkpoint computes, or a quantized one does not run in integer kernels.
    """
    for scheme in quantize:
        look_up(scheme, {name: name for name in SCHEMES}, what="scheme")
    for engine in engines:
        look_up(engine, engine_runtimes(), what="engine")
        tensorrt_module(engine)
    saliencies = _AUTO_SALIENCIES if saliency == "auto" else _listed(saliency)
    for name in saliencies:
        saliency_named(name)
    graph = GraphOptions(dtype=dtype_named(dtype), flavor=flavor)
    source = resolve_model(model, progress=progress)
    checkpoint = Checkpoint.open(source.path)
    checkpoint.require_length(seq_len)
    shape = checkpoint.shape
    if until != "checkpoint":
        graph.require_fits(shape)
    if reconstruct:
        require_tokens(shape, num_sequences, seq_len)
    choices = Choices(
        corpora=_corpora(calib, shape),
        candidates=candidates or (4 if calib == "auto" else 1),
        saliencies=saliencies,
        gammas=_gammas(gamma, shape, sparsity=sparsity, round_to=round_to),
    )
    if run_benchmark and dtype == "bf16":
        run_benchmark = False
        progress.note("bf16 cannot be timed on the CPU: it has no bfloat16 arithmetic in ONNX Runtime")
    out = Path(out) if out is not None else Path(f"{source.name}-s{sparsity:g}")
    copies = reconstruct + (1 if until == "checkpoint" else 2 + baseline + len(quantize))
    parameters = shape.linear_parameters + shape.embedding_parameters
    require_free_bytes(out, 4 * copies * parameters, what="The output")
    options = {
        "model": model,
        "sparsity": sparsity,
        "saliency": saliency,
        "gamma": gamma if gamma is not None else choices.gammas[0],
        "allocation": allocation,
        "round_to": round_to,
        "calib": calib,
        "candidates": choices.candidates,
        "num_sequences": num_sequences,
        "seq_len": seq_len,
        "seed": seed,
        "micro_batch": micro_batch,
        "reconstruct": reconstruct,
        "eval_text": str(eval_text) if eval_text is not None else None,
    }
    if until == "report":
        options |= {
            "dtype": dtype,
            "flavor": flavor,
            "baseline": baseline,
            "benchmark": run_benchmark,
            "quantize": list(quantize),
            "engines": list(engines),
            "threads": threads,
        }
        if quantize:  # asked for at the first quantization, and the same from then on
            options["quantize_head"] = quantize_head
    run = Run.begin(
        out,
        options=options,
        model=model_record(source),
        command=command or "called from Python",
        resume=resume,
        force=force,
        progress=progress,
    )
    if choices.single:
        chosen_saliency, chosen_gamma = choices.saliencies[0], choices.gammas[0]
        calibrate(
            run,
            source,
            calib=choices.corpora[0],
            num_sequences=num_sequences,
            seq_len=seq_len,
            seed=seed,
            eval_text=eval_text,
        )
        score(run, source, saliency=chosen_saliency, seed=seed, micro_batch=micro_batch)
    else:
        chosen_saliency, chosen_gamma = select(
            run,
            source,
            choices=choices,
            sparsity=sparsity,
            allocation=allocation,
            round_to=round_to,
            num_sequences=num_sequences,
            seq_len=seq_len,
            seed=seed,
            micro_batch=micro_batch,
            eval_text=eval_text,
        )
    plan = decide(
        run,
        source,
        shape,
        sparsity=sparsity,
        gamma=chosen_gamma,
        allocation=allocation,
        round_to=round_to,
        saliency=chosen_saliency,
        seed=seed,
        reconstruct=reconstruct,
    )
    reconstruct_stage(run, source, plan)
    slice_stage(run, source, plan)
    if until == "checkpoint":
        return Deployment(out=run.out, plan=plan, manifest=run.manifest, benchmark=None, report=None)
    export(run, source, baseline=baseline, dtype=dtype, flavor=flavor)
    report = verify(run, source, baseline=baseline, threads=threads)
    quantized = {}
    if all(result.passed for result in report.values()):
        quantized = {
            scheme: quantize_stage(run, scheme, head=quantize_head, draw=write_sensitivity)
            for scheme in dict.fromkeys(quantize)
        }
        for engine in dict.fromkeys(engines):
            _build_engines(run, engine, quantize=quantize, baseline=baseline)
        quality(run, threads=threads)
        if run_benchmark:
            speed(run, workload=Workload(threads=threads))
    page = write_pages(run)
    for name, result in report.items():
        result.require_passed(run.out / variant_named(name).folder)
    for scheme, record in quantized.items():
        require_quantized(record, run.out / variant_named(f"{PRUNED}-{scheme}").folder)
    measured = run.out / BENCHMARK_FILE
    return Deployment(
        out=run.out,
        plan=plan,
        manifest=run.manifest,
        benchmark=read_json(measured) if run_benchmark else None,
        report=page,
    )


def _build_engines(run: Run, runtime: str, *, quantize: Sequence[str], baseline: bool) -> None:
    """Engines of all that the run made, in the precision that the runtime's fused attention takes."""
    options = BuilderOptions(runtime)
    for scheme in (None, *dict.fromkeys(quantize)):
        build_engine(run, quantize=scheme, options=options)
    if baseline:
        build_engine(run, variant=DENSE, options=options)


def _listed(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated option, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _corpora(calib: str, shape: ModelShape) -> tuple[str, ...]:
    """The sources to draw from; a file may have a comma in its name. An encoder-decoder writes no text."""
    if calib == "auto":
        return ("pydoc",) if shape.family.encoder_decoder else ("pydoc", "self")
    return (calib,) if Path(calib).exists() else _listed(calib)


def _gammas(
    gamma: float | Literal["auto"] | None, shape: ModelShape, *, sparsity: float, round_to: int
) -> tuple[float, ...]:
    """The gammas to try; raises NirvanaError, before any work, for one that cannot meet the sparsity."""
    if gamma == "auto":
        gammas = gamma_grid(shape, sparsity=sparsity, round_to=round_to)
    else:
        gammas = (default_gamma(shape) if gamma is None else gamma,)
    for one in gammas:
        removed_counts(shape, sparsity=sparsity, gamma=one, round_to=round_to)
    return gammas


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

    It reads no text and so reconstructs nothing; a note says so where the plan's own model was.
    Raises NirvanaError when the plan is damaged or was made for a model of another shape.
    """
    decided = read_plan(plan)
    source = resolve_model(model, progress=progress)
    check_plan_fits(decided, Checkpoint.open(source.path).shape)
    if decided.reconstruct is not None:
        decided = replace(decided, reconstruct=None)
        progress.note("The plan's model was reconstructed after the cut; a plan alone gives the cut alone.")
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


def quantize_folder(
    out: Path,
    *,
    scheme: str,
    smooth: float | Literal["auto", "none"] | None = None,
    ranges: str = "minmax",
    keep_fp: int = 0,
    sensitivity: bool = False,
    head: bool = False,
    block_size: int = 32,
    rounding: str | None = None,
    writing: str = "ort",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Quantize the pruned model of an output folder into ``onnx-<scheme>``, in place of an earlier one.

    Calibrates on the windows that the folder was pruned with; options as in ``quantize_onnx``. Returns the
    content of quantization.json; ``benchmark`` and ``evaluate`` measure the new variant. Raises NirvanaError
    for a folder without ONNX model, VerificationError as ``quantize_onnx`` does.
    """
    run = Run.open(out, progress=progress)
    if "onnx" not in run.manifest["stages"]:
        raise NirvanaError(
            f"{out} has a checkpoint and no ONNX model yet.",
            hint="Export it first: repeat its prune command as prune-export, with --resume.",
        )
    record = quantize_stage(
        run,
        scheme,
        smooth=smooth,
        ranges=ranges,
        keep_fp=keep_fp,
        sensitivity=sensitivity,
        head=head,
        block_size=block_size,
        rounding=rounding,
        writing=writing,
        draw=write_sensitivity,
        redo=True,
    )
    write_pages(run)
    folder = out / variant_named(f"{PRUNED}-{scheme}").folder
    require_quantized(record, folder)
    return read_record(folder)


def benchmark_folder(
    out: Path, *, workload: Workload, runtime: str | None = None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Measure an output folder again in ``runtime`` [onnxruntime-cpu].

    Rewrites benchmark.json and the report, returns benchmark.json.
    """
    run = Run.open(out, progress=progress)
    speed(run, workload=workload, runtime=runtime, redo=True)
    write_pages(run)
    result: dict[str, Any] = read_json(out / BENCHMARK_FILE)
    return result


def evaluate_folder(
    out: Path,
    *,
    eval_text: Path | None = None,
    window_tokens: int | None = None,
    max_windows: int | None = None,
    ntk_windows: int | None = None,
    task_names: Sequence[str] = (),
    task_limit: int | None = None,
    task_folder: Path | None = None,
    tasks_on: TasksOn | None = None,
    threads: int | None = None,
    runtime: str | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure quality of an output folder again; rewrites quality.json, benchmark.json and the report.

    On ``eval_text`` in windows of ``window_tokens`` tokens [256], at most ``max_windows`` of them [16]; else
    on the held-out windows; in ``runtime`` [onnxruntime-cpu]. ``ntk_windows`` also measures the tangent
    kernels on so many held-out windows, ``task_names`` runs tasks of lm-evaluation-harness on ``task_limit``
    examples each [all], those of ``task_folder`` among them, on the models that ``tasks_on`` says [the ONNX
    ones]. A folder without ONNX model is measured by these two alone. Returns quality.json with ``ntk`` and
    ``tasks`` added.
    """
    run = Run.open(out, progress=progress)
    result: dict[str, Any] = {}
    if task_names:
        require_tasks(task_names)
    if "onnx" in run.manifest["stages"] or not (ntk_windows or task_names):
        windows = None
        if eval_text is not None:
            checkpoint = Checkpoint.open(out / CHECKPOINT)
            checkpoint.require_length(window_tokens or 1)
            windows = evaluation_windows(
                eval_text,
                checkpoint.tokenizer,
                progress,
                seq_len=window_tokens,
                max_sequences=max_windows,
            )
        result = quality(run, threads=threads, windows=windows, runtime=runtime, redo=True)
        refresh_quality(run)
    if ntk_windows:
        result = {**result, "ntk": tangent_kernel(run, windows=ntk_windows)}
    if task_names:
        found = tasks(run, task_names, limit=task_limit, include_path=task_folder, on=tasks_on)
        result = {**result, "tasks": found}
    write_pages(run)
    return result
