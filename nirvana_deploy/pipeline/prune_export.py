"""The whole arrow: model -> calibrate -> score -> plan -> checkpoint -> onnx -> measure -> report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json, typed
from nirvana_deploy.base.shown.html import html_table
from nirvana_deploy.calibrate.stage import calibrate, drawn_record
from nirvana_deploy.engine.stage import build_engine
from nirvana_deploy.engine.targets import BuilderOptions
from nirvana_deploy.export.stage import export
from nirvana_deploy.measure.answers import NEW_TOKENS
from nirvana_deploy.measure.contest.timing import require_all_timed
from nirvana_deploy.measure.gate import require_quality
from nirvana_deploy.measure.recipe import Measurement, Workload
from nirvana_deploy.measure.stage import answers, quality, speed
from nirvana_deploy.measure.units.stage import unit_cost
from nirvana_deploy.model.checkpoint import Checkpoint, model_record
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.output.layout import BENCHMARK_FILE, CHECKPOINT, RECIPE_FILE, REPORT_HTML
from nirvana_deploy.output.results import QualityMeasured
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import QUALITY, RECONSTRUCT, REPORT, WHOLE, Step, in_steps
from nirvana_deploy.output.variants import DENSE, variant_named
from nirvana_deploy.pipeline.before import (
    Until,
    checked,
    may_change,
    measured_anew,
    read_files,
    recorded_options,
    require_enough_memory,
    require_room_to_recover,
    require_space,
    run_beside,
    say_cost,
    within_context,
)
from nirvana_deploy.pipeline.forecast.stages import engine_forms, is_timed, quantized_models, stages_of
from nirvana_deploy.pipeline.given_curves import GivenCurves
from nirvana_deploy.pipeline.job import CutOptions, Job, all_fields, job_of, spelled_out
from nirvana_deploy.pipeline.recipe_file import write_recipe
from nirvana_deploy.prune import stage as prune
from nirvana_deploy.prune.choosing.choices import Choices
from nirvana_deploy.prune.curves.budget import UnitCost, require_feasible
from nirvana_deploy.prune.cutting import Cutter, budget_of, reads_curves
from nirvana_deploy.prune.plan import PrunePlan, check_plan_fits
from nirvana_deploy.prune.plan_file import read_plan
from nirvana_deploy.prune.recipe import REFIT
from nirvana_deploy.prune.refit.dense_states import DenseStates
from nirvana_deploy.prune.slicing import in_dense_shape
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.stage import quantize, require_quantized
from nirvana_deploy.recover.stage import Answers, Models, forget_another, recover, require_same
from nirvana_deploy.report.cards.folders import write_cards
from nirvana_deploy.report.sensitivity import write_sensitivity
from nirvana_deploy.report.stage import report
from nirvana_deploy.report.table import summary_table
from nirvana_deploy.report.verdict import Verdict
from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.verify.cases import PROMPTS, Continued
from nirvana_deploy.verify.stage import verified, verify


@dataclass(frozen=True)
class Deployment:
    """What :func:`prune_export` made."""

    out: Path
    plan: PrunePlan
    manifest: dict[str, Any]
    benchmark: dict[str, Any] | None
    report: Path | None
    """report.html"""

    def __repr__(self) -> str:
        told = "no report" if self.verdict is None else self.verdict.title
        return f"Deployment({str(self.out)!r}, sparsity {self.plan.sparsity:g}, {told})"

    def _repr_html_(self) -> str:
        """The verdict and the measured models, or the plan, for a notebook."""
        if self.benchmark is None:
            return html_table((), (), title=repr(self)) + self.plan._repr_html_()
        table = summary_table(self.benchmark)
        why = "" if self.verdict is None else self.verdict.why
        return html_table(table.headers, table.rows, title=repr(self), note=why)

    @property
    def verdict(self) -> Verdict | None:
        """Which model to ship, if any; None without a report."""
        stage = self.manifest["stages"].get(REPORT)
        return None if stage is None else typed(stage["result"], Verdict, "the verdict")


def prune_export(
    model: str,
    *,
    out: Path | str | None = None,
    until: Until = "report",
    resume: bool = False,
    force: bool = False,
    command: str | None = None,
    curves: Path | str | None = None,
    progress: Progress = SILENT,
    **options: Unpack[CutOptions],
) -> Deployment:
    """Prune ``model``, export it to ONNX, verify it, measure it against the dense baseline, write a report.

    ``model`` is an alias, a hub id, a folder or a .gguf file. ``until`` "checkpoint" stops after plan.json
    and checkpoint/, "quality" ahead of answers and timings; ``resume`` continues; ``force`` starts again.
    ``curves`` is an output folder of the same model, or its curves.safetensors: these are taken, and text is
    drawn as that folder says. Raises NirvanaError for the user's problems and VerificationError when the
    exported model does not compute what the checkpoint computes, or a quantized one does not run in integer
    kernels. ``options``, of which ``sparsity`` is required:
    """
    given = None if curves is None else GivenCurves.at(Path(curves))
    return run_job(
        job_of(model, options if given is None else given.calibrated_alike(options)),
        out=out,
        until=until,
        resume=resume,
        force=force,
        command=command,
        curves=given,
        progress=progress,
    )


def run_job(
    job: Job,
    *,
    out: Path | str | None = None,
    until: Until = "report",
    resume: bool = False,
    force: bool = False,
    command: str | None = None,
    beside: Sequence[Path] = (),
    curves: GivenCurves | None = None,
    progress: Progress = SILENT,
) -> Deployment:
    """Do what a job says; as :func:`prune_export`.

    ``beside`` are output folders of the same model: what would come out the same is taken from there.
    """
    if curves is not None and curves.folder is not None:
        beside = (*beside, curves.folder)
    source = resolve_model(job.model, progress=progress)
    dense = Checkpoint.open(source.path)
    job = within_context(job, dense)
    choices = checked(job, dense, until, progress)
    if curves is not None:
        curves.require_serves(job, choices, dense)
    out = Path(out) if out is not None else Path(f"{source.name}-s{job.pruning.sparsity:g}")
    require_space(job, out, dense.shape, until)
    if not resume:  # what is finished needs no more memory
        require_enough_memory(job, choices, dense.shape, until)
        require_room_to_recover(job, out, dense.shape)
    with Run.begin(
        out,
        options=recorded_options(job, choices, dense.shape, until),
        model=model_record(source),
        command=command or "called from Python",
        reads=(source.path, *read_files(job), *(() if curves is None else (curves.file,))),
        may_change=may_change(),
        resume=resume,
        force=force,
        progress=progress,
    ) as run:
        run.expected = stages_of(job, choices, until)
        run.beside = tuple(run_beside(folder, run) for folder in beside)
        require_same(run, job.recovery)
        run.drop(measured_anew(run.changed))
        with run.writing(RECIPE_FILE) as file:
            write_recipe(job, file)
        if not run.finished(RECONSTRUCT):
            say_cost(job, choices, dense.shape, progress, measures_curves=curves is None)
        return _deployed(run, job, dense, _prune(run, job, dense, choices, curves), until)


def _deployed(run: Run, job: Job, dense: Checkpoint, plan: PrunePlan, until: Until) -> Deployment:
    """From plan.json and checkpoint/ to the report."""
    if until == "checkpoint":
        write_cards(run.out, progress=run.progress)
        run.finish()
        return Deployment(out=run.out, plan=plan, manifest=run.manifest, benchmark=None, report=None)
    for stage in export(run, dense, job.export):
        run.run(stage)
    threads = job.measurement.threads
    heard: dict[str, Continued] = {}
    run.run(verify(run, dense, baseline=job.export.baseline, threads=threads, heard=heard))
    reports = verified(run)
    whole = all(found.passed for found in reports.values())
    timed = is_timed(job, until)
    if whole:
        _deploy(run, job, heard, timed=timed, until=until)
    if until == "report":
        run.run(report(run))
    else:
        write_cards(run.out, progress=run.progress)
    for name, found in reports.items():
        found.require_passed(run.out / variant_named(name).folder, of_input=name == DENSE)
    for of, scheme in quantized_models(job):
        require_quantized(run, scheme, of=of)
    run.finish()
    if whole:
        require_quality(run.result(QUALITY, QualityMeasured).variants, job.measurement)
    if timed and whole:
        require_all_timed(read_json(run.out / BENCHMARK_FILE, dict[str, Any]))
    return Deployment(
        out=run.out,
        plan=plan,
        manifest=run.manifest,
        benchmark=read_json(run.out / BENCHMARK_FILE, dict[str, Any]) if timed else None,
        report=run.out / REPORT_HTML if until == "report" else None,
    )


def prune_by_plan(
    model: str,
    *,
    plan: Path | str,
    out: Path | str,
    force: bool = False,
    command: str | None = None,
    progress: Progress = SILENT,
) -> PrunePlan:
    """Redo the cut of a plan.json alone: writes ``out``/plan.json and ``out``/checkpoint, scores nothing.

    Does not reconstruct (no calibration text); logs a note if the plan's model was. Raises NirvanaError when
    the plan is damaged or was made for a model of another shape.
    """
    plan, out = Path(plan), Path(out)
    decided = read_plan(plan)
    source = resolve_model(model, progress=progress)
    dense = Checkpoint.open(source.path)
    check_plan_fits(decided, dense.shape)
    if decided.reconstruct is not None:
        decided = replace(decided, reconstruct=None)
        progress.note("The plan's model was reconstructed after the cut; a plan alone gives the cut alone.")
    with Run.begin(
        out,
        options={"model": model, "plan": str(plan)},
        model=model_record(source),
        command=command or "called from Python",
        reads=(source.path, plan),
        force=force,
        progress=progress,
    ) as run:
        run.run(prune.given_plan(run, decided))
        run.run(prune.slice_model(run, dense, decided))
        write_cards(out, progress=progress)
        run.finish()
    return decided


def _prune(run: Run, job: Job, dense: Checkpoint, choices: Choices, given: GivenCurves | None) -> PrunePlan:
    """From the model to plan.json and checkpoint/."""
    recipe, seed = job.pruning, job.calibration.seed
    cutter = Cutter(
        dense,
        recipe,
        seed=seed,
        model_name=run.model_name,
        cost=_unit_cost(run, job, dense),
        spill_folder=run.out,
        progress=run.progress,
    )
    if choices.single:
        saliency, gamma = choices.saliencies[0], choices.gammas[0]
        run.run(calibrate(run, dense, replace(job.calibration, calib=choices.corpora[0])))
        if reads_curves(recipe, saliency):
            run.run(prune.curves(run, cutter, None if given is None else given.file))
    else:
        run.run(prune.select(run, cutter, choices, job.calibration))
        chosen = drawn_record(run)
        saliency, gamma = chosen["saliency"], chosen["gamma"]
    if saliency == REFIT:
        run.run(prune.allocate(run, cutter))
        return _cut_in_steps(run, job, cutter)
    seen = DenseStates()
    if choices.single:
        run.run(prune.score(run, cutter, saliency=saliency, states=seen))
    run.run(prune.plan(run, cutter, saliency=saliency, gamma=gamma))
    plan = prune.planned(run, reconstruct=recipe.reconstruct)
    if plan.reconstruct is not None:
        run.run(prune.reconstruct(run, cutter, plan, seen))
    _recover_and_slice(run, job, Models(dense, dense), plan)
    return plan


def _cut_in_steps(run: Run, job: Job, cutter: Cutter) -> PrunePlan:
    """Choose units inside the refit, recover, slice; in several steps, each cuts what the one before made."""
    dense = source = cutter.dense
    prune.forget_other_steps(run, job.recovery.recover_steps)
    for step in in_steps(job.recovery.recover_steps):
        run.run(prune.select_inside(run, cutter, source, step))
        plan = prune.planned(run, step, reconstruct=True)
        _recover_and_slice(run, job, Models(dense, source), plan, step)
        if not step.last:
            made = Checkpoint.open(step.folder(run.out) / CHECKPOINT)
            source = in_dense_shape(dense, plan, made)
    return plan


def _recover_and_slice(run: Run, job: Job, models: Models, plan: PrunePlan, step: Step = WHOLE) -> None:
    """Train the cut, if asked, and write the checkpoint."""
    recovery, text = job.recovery, job.calibration
    if recovery.recover is not None:
        forget_another(run, recovery, text, step)
        asked = Answers(PROMPTS, NEW_TOKENS)
        run.run(recover(run, models, plan, recovery, text, asked, step))
    run.run(prune.slice_model(run, models.source, plan, step))


def _unit_cost(run: Run, job: Job, dense: Checkpoint) -> UnitCost | None:
    """What a unit costs in what is going to be deployed; None: its linear weights."""
    if job.pruning.cost == "weights":
        return None
    scheme = next(iter(job.quantization.quantize), None)
    cost = unit_cost(
        run,
        dense,
        job.pruning.cost,
        export=job.export,
        scheme=scheme,
        workload=workload_of(job.measurement),
    )
    run.run(cost)
    found = run.result(cost.name, UnitCost)
    require_feasible(dense.shape, budget_of(job.pruning, dense.shape, found))
    return found


def workload_of(measurement: Measurement) -> Workload:
    """The request that a job measures."""
    return Workload(
        prompt_tokens=measurement.prompt_tokens,
        new_tokens=measurement.new_tokens,
        repeats=measurement.repeats,
        threads=measurement.threads,
    )


def _deploy(run: Run, job: Job, heard: dict[str, Continued], *, timed: bool, until: Until) -> None:
    """Quantize, build engines, and measure what was made."""
    for of, scheme in quantized_models(job):
        recipe = Quantization(scheme=scheme, head=job.quantization.quantize_head)
        run.run(quantize(run, recipe, draw=write_sensitivity, of=of))
    for runtime in dict.fromkeys(job.engine.engines):
        for form in engine_forms(job):
            run.run(build_engine(run, form, options=BuilderOptions(runtime)))
    measurement = job.measurement
    run.run(quality(run, Place(threads=measurement.threads)))
    if until == "report":
        run.run(answers(run, Place(threads=measurement.threads), heard))
    if timed:
        run.run(speed(run, workload_of(measurement)))


prune_export.__signature__ = spelled_out(prune_export)  # type: ignore[attr-defined]
prune_export.__doc__ = f"{prune_export.__doc__}\n" + "\n".join(
    f"    {field.name}: {field.option.help}" for field in all_fields()
)
