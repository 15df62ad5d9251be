"""A job with a budget in place of a sparsity: the sparsity is found by measuring cuts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError, QualityError
from nirvana_deploy.base.ownership.marker import require_apart
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.output import owned
from nirvana_deploy.output.layout import MANIFEST, TARGET_FILE
from nirvana_deploy.output.run import Run, require_free
from nirvana_deploy.pipeline.before import UNTIMED, read_files, untimed
from nirvana_deploy.pipeline.job import Job, JobOptions, job_of
from nirvana_deploy.pipeline.prune_export import Deployment, run_job, workload_of
from nirvana_deploy.pipeline.searching.points import found_in, timed_points
from nirvana_deploy.prune.curves.budget import largest_sparsity_of
from nirvana_deploy.prune.cutting import budget_of, reads_curves, width_step
from nirvana_deploy.prune.plan import default_gamma, largest_sparsity
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.search.load import loads
from nirvana_deploy.search.meeting import best_of, nearest_of, next_sparsity, shortfall
from nirvana_deploy.search.point import Found, Point, said
from nirvana_deploy.search.recipe import Target

TRIALS = "-trials"
"""What the folder of the cuts that are tried is called, behind the name of the output folder."""
_FIRST = 0.2
"""The sparsity that is tried first."""


@dataclass(frozen=True)
class _Timing:
    """What timing a trial found, in its folder."""

    schema: int
    workload: Workload
    trials: tuple[Found, ...]


@dataclass(frozen=True)
class Met:
    """A job whose sparsity was found."""

    deployment: Deployment
    chosen: Found
    trials: tuple[Found, ...]
    shortfall: str | None = None
    """How far from the limit it is, and why no trial is nearer; None within 5 %."""

    def __repr__(self) -> str:
        return f"Met({said(self.chosen)}, {len(self.trials)} tried, {self.deployment!r})"

    def _repr_html_(self) -> str:
        return self.deployment._repr_html_()


def meet_target(
    model: str,
    target: Target,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    command: str | None = None,
    progress: Progress = SILENT,
    **options: Unpack[JobOptions],
) -> Met:
    """Do the job of ``options`` at the sparsity that meets ``target``, within 5 % of its limit.

    Limits on quality alone: the most sparse model that meets them; limits on time or size: the least sparse.
    They are those of the one scheme of ``quantize``, if any. Cuts are tried in a folder beside ``out``, which
    goes when all is done. Raises NirvanaError where no sparsity meets the target, with what comes nearest,
    and QualityError where the one that is found misses what the job requires.
    """
    job = job_of_target(model, target, options)
    source = resolve_model(model, progress=progress)
    out = Path(out) if out is not None else Path(folder_named(source.name, target))
    dense = Checkpoint.open(source.path)
    if resume and (out / TARGET_FILE).is_file():
        raise NirvanaError(
            f"{out} is finished.", hint=f"Measure it again: nirvana-deploy benchmark {out}, or evaluate {out}"
        )
    most = _most(job.pruning, dense.shape)
    trials, folder = _tried(job, target, out, most, resume=resume, force=force, progress=progress)
    chosen = best_of(trials, target)
    if chosen is None:
        raise _unmet(trials, target, out)
    short = shortfall(trials, chosen, target, most=most)
    progress.note(" ".join(filter(None, [f"{said(chosen)} meets the budget.", short])))
    record = {
        "schema": 1,
        "target": target.asked,
        "chosen": chosen.name,
        "shortfall": short,
        "trials": [vars(one) for one in trials],
    }
    try:
        done = run_job(
            _at(job, chosen.sparsity),
            out=out,
            resume=resume,
            force=force,
            command=command,
            beside=(folder / chosen.folder,),
            progress=progress,
        )
    except QualityError:  # it is made all the same
        _finish(out, folder, trials, record)
        raise
    _finish(out, folder, trials, record)
    return Met(done, chosen, tuple(trials), short)


def _finish(out: Path, folder: Path, trials: Sequence[Found], record: Mapping[str, Any]) -> None:
    """Write down what was tried, and remove it."""
    with Run.open(out, writing=True) as run, run.writing(TARGET_FILE) as path:
        write_json(path, record)
    _discard(folder, trials)


def job_of_target(model: str, target: Target, options: Mapping[str, Any]) -> Job:
    """The job at the sparsity that is tried first; raises NirvanaError for what does not go with a budget."""
    if options.get("sparsity") is not None:
        raise NirvanaError(
            f"--sparsity {options['sparsity']} and a budget say two things.",
            hint="Leave one of them out: with a budget the sparsity is found by measuring.",
        )
    if target.max_perplexity_ratio == 1 or target.max_kl == 0:
        raise NirvanaError(
            "A budget of no loss at all leaves nothing to cut.", hint="For example --max-kl 0.1"
        )
    given = {name: value for name, value in options.items() if name != "sparsity"}
    job = job_of(model, {**given, "sparsity": _FIRST})
    if len(set(job.quantization.quantize)) > 1:
        raise NirvanaError(
            f"A budget is one model's, and --quantize names {len(job.quantization.quantize)} schemes.",
            hint="Name one of them, or compare them: nirvana-deploy search MODEL",
        )
    if target.on_time and untimed(job):
        raise NirvanaError(
            f"A limit on time needs times. {UNTIMED}.",
            hint="Limit quality or size, or leave out --dtype bf16.",
        )
    measured = replace(job.export, baseline=True)
    return replace(job, export=measured, quantization=replace(job.quantization, baseline_quantized=True))


def _tried(
    job: Job, target: Target, out: Path, most: float, *, resume: bool, force: bool, progress: Progress
) -> tuple[list[Found], Path]:
    """The dense model and the cuts that were tried, and the folder that they are in."""
    folder = folder_of_trials(job, out, resume=resume, force=force)
    scheme = next(iter(job.quantization.quantize), None)
    first: Path | None = None
    trials: list[Found] = []
    tried: float | None = min(_FIRST, most)
    while tried is not None:
        place = f"s{tried:g}"
        with progress.within(place), suppress(QualityError):  # of what is chosen, not of what is tried
            run_job(
                _at(job, tried),
                out=folder / place,
                until="quality",
                resume=resume and (folder / place / MANIFEST).is_file(),
                force=force,
                beside=(first,) if first else (),
                progress=progress,
            )
        first = first or folder / place
        points = [Point(0.0), Point(0.0, scheme), Point(tried, scheme)]
        found = [found_in(folder, place, "", point) for point in dict.fromkeys(points)]
        if target.on_time:
            found = _timed(folder / place, found, workload_of(job.measurement), resume, progress)
        trials = [*(trials or found[-2:-1]), found[-1]]
        load = loads(found[-1], target)
        used = [f"{share:.0%} of its {kind}" for kind, share in vars(load).items() if share is not None]
        progress.note(f"Sparsity {tried:g} takes {' and '.join(used)} budget: {said(found[-1])}")
        tried = next_sparsity(trials, target, most=most)
    return trials, folder


def folder_of_trials(job: Job, out: Path, *, resume: bool, force: bool) -> Path:
    """Where cuts are tried; raises NirvanaError unless that, and ``out``, may be written."""
    require_apart(out, reads=read_files(job), replaced=False)
    require_free(out, resume=resume, force=force)
    folder = out.with_name(f"{out.name}{TRIALS}")
    if folder.is_dir() and owned.occupied(folder) and not (resume or force):
        raise NirvanaError(
            f"{folder} exists already. It holds cuts that were tried for {out.name}.",
            hint="Pass --resume to go on from them, --force to start again, or another --out DIR.",
        )
    return folder


def _timed(
    place: Path, found: list[Found], workload: Workload, resume: bool, progress: Progress
) -> list[Found]:
    """The points of the cut in ``place``, timed; a resumed search keeps the times that it went by."""
    path = place / TARGET_FILE
    if resume and path.is_file():
        kept = read_json(path, _Timing, schema=1)
        before = [replace(one, tpot_ms=None, speedup=None, speedup_interval=None) for one in kept.trials]
        if kept.workload == workload and before == found:
            return list(kept.trials)
    timed, _ = timed_points(place.parent, found, workload, progress=progress)
    with Run.open(place, writing=True) as run, run.writing(TARGET_FILE) as file:
        write_json(file, asdict(_Timing(1, workload, tuple(timed))))
    return timed


def _most(recipe: Pruning, shape: ModelShape) -> float:
    """The largest sparsity that the recipe allows."""
    if reads_curves(recipe, recipe.saliency):
        largest = largest_sparsity_of(shape, budget_of(recipe, shape))
    else:
        gamma = recipe.gamma if isinstance(recipe.gamma, float) else default_gamma(shape)
        largest = largest_sparsity(shape, gamma=gamma, round_to=width_step(recipe, shape))
    return math.floor(1e4 * largest) / 1e4


def _at(job: Job, sparsity: float) -> Job:
    return replace(job, pruning=replace(job.pruning, sparsity=sparsity))


def folder_named(model: str, target: Target) -> str:
    """The default name of an output folder: smollm2-max-kl-0.2."""
    return "-".join(
        [model, *(f"{option.removeprefix('--')}-{limit}" for option, limit in target.typed.items())]
    )


def _unmet(trials: list[Found], target: Target, out: Path) -> NirvanaError:
    dense = trials[0]
    asked = ", ".join(f"{option} {limit}" for option, limit in target.typed.items())
    load = loads(dense, target)
    if load.met and load.cost is not None:
        return NirvanaError(
            f"{dense.name} meets {asked} as it is ({said(dense)}): there is nothing to cut.",
            hint="Deploy it: nirvana-deploy export MODEL, or ask for more.",
        )
    if load.quality is not None and load.quality > 1 and load.cost is None:
        return NirvanaError(
            f"No sparsity meets {asked}: without any cut, {said(dense)}.",
            hint="Ask for less, or leave out --quantize.",
        )
    return NirvanaError(
        f"No sparsity meets {asked}. Nearest: {said(nearest_of(trials, target))}.",
        hint=f"Ask for less, or see what there is: nirvana-deploy search MODEL. The cuts that were tried are "
        f"in {out.name}{TRIALS}.",
    )


def _discard(folder: Path, trials: Sequence[Found]) -> None:
    """Remove the cuts that were tried, and nothing else."""
    for name in dict.fromkeys(one.folder for one in trials):
        owned.discard(folder / name)
    owned.remove_empty(folder)
