"""A search: one job at several sparsities and precisions, which one to take, and why.

Each sparsity is an output folder of its own, made by the same stages as any other job; what does not depend
on the sparsity is made once and taken by the others. So a point of the search is what its recipe.toml makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from nirvana_deploy.base.artifact import sha256_of, write_bytes, write_json
from nirvana_deploy.base.errors import NirvanaError, VerificationError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.recipe import fields_of
from nirvana_deploy.base.shown.html import html_table
from nirvana_deploy.measure.gate import require_quality
from nirvana_deploy.measure.zero_shot.local_tasks import is_local
from nirvana_deploy.measure.zero_shot.tasks import require_tasks
from nirvana_deploy.model.checkpoint import model_record
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.output import owned
from nirvana_deploy.output.layout import (
    BENCHMARK_FILE,
    MANIFEST,
    PARTS,
    POINTS,
    QUALITY_FILE,
    SEARCH_CSV,
    SEARCH_FILE,
    SEARCH_HTML,
    TASKS_FILE,
)
from nirvana_deploy.output.record_kinds import QualityRecord
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.variants import DENSE
from nirvana_deploy.pipeline.before import UNTIMED, as_recorded, read_files, untimed
from nirvana_deploy.pipeline.job import Job, JobOptions, job_of, plain
from nirvana_deploy.pipeline.prune_export import workload_of
from nirvana_deploy.pipeline.searching.commands import commands_inside, commands_of
from nirvana_deploy.pipeline.searching.cuts import cuts_of, job_in, make_cuts, tried_options
from nirvana_deploy.pipeline.searching.points import found_in, points_on_tasks, timed_points
from nirvana_deploy.prune.choosing.choices import listed
from nirvana_deploy.report.pages.front import BRIEF, columns, rows, search_csv, search_page, search_record
from nirvana_deploy.search.front import Recommendation, recommend, worth_timing
from nirvana_deploy.search.parts import SCHEMA, Part, parts_in, place_of
from nirvana_deploy.search.point import Found, Point, file_of, key_of, read_found
from nirvana_deploy.search.recipe import (
    Search,
    Target,
    Where,
    precisions_of,
    require_place,
    shard_of,
    sparsities_of,
)
from nirvana_deploy.search.ways import ways_of

_WHERE = frozenset({"shard", *(field.name for field in fields_of(Where))})
"""Options of a search that say where it is made."""
_FREE = frozenset({"sparsity", "quantize", "baseline_quantized", "run_benchmark", "threads", "engines"})
"""Options of a job that its points do not have in common, or that change no result."""


@dataclass(frozen=True)
class Searched:
    """What a search found."""

    out: Path
    points: tuple[Found, ...]
    recommendation: Recommendation
    record: dict[str, Any]
    """The content of search.json."""
    page: Path | None
    """search.html; None for a part of a search."""
    commands: tuple[str, ...] = ()
    """To run the recommended point and to make it again, from where the search was begun."""

    def __repr__(self) -> str:
        taken = "none" if self.recommendation.point is None else self.recommendation.point.name
        return f"Searched({str(self.out)!r}, {len(self.points)} points, recommended: {taken})"

    def _repr_html_(self) -> str:
        """The points and which one to take, for a notebook."""
        headers, cells = columns(self.record, BRIEF), rows(self.record, BRIEF)
        return html_table(headers, cells, title=repr(self), note=self.record["verdict"])


def search_points(
    model: str,
    *,
    out: Path | str | None = None,
    recipe: Search | None = None,
    target: Target | None = None,
    base: Job | None = None,
    resume: bool = False,
    force: bool = False,
    command: str | None = None,
    progress: Progress = SILENT,
    **options: Unpack[JobOptions],
) -> Searched:
    """Try the points of ``recipe`` on ``model`` and say which one to take under ``target``.

    ``options`` are those of :func:`prune_export`, without ``sparsity`` and ``quantize``; what they leave out
    is as in ``base``. Writes search.json, search.csv, search.html, benchmark.json and a folder for each
    sparsity to ``out``. A point that fails is kept with its reason. A script that asks for several processes
    does so under ``if __name__ == "__main__"``: they are spawned. Raises NirvanaError for the user's problems
    and when every cut fails, VerificationError when the recommended point is not verified, and QualityError
    when it misses what the job requires, to which no other point is held.
    """
    recipe, target = recipe or Search(), target or Target()
    job, part = job_of_search(model, recipe, options, base=base), shard_of(recipe)
    _require_timed(job, recipe, target)
    source = resolve_model(model, progress=progress)
    out = Path(out) if out is not None else Path(f"{source.name}-search")
    shared = _shared(job, model_record(source))
    anew = force and not (resume and (out / MANIFEST).is_file())
    parts = parts_in(out, mixed=anew)
    with Run.begin(
        out,
        options={name: value for name, value in asdict(recipe).items() if name not in _WHERE}
        | shared["options"],
        model=model_record(source),
        command=command or "called from Python",
        reads=(source.path, *read_files(job)),
        may_change={"sparsities", "precisions", "ways", "tasks", "limit"},
        resume=resume,
        force=force,
        progress=progress,
    ) as run:
        key = key_of(shared)
        _adopt(run, parts)
        if anew:
            _forget_points(run)
            parts = {}
        if recipe.shard is not None:
            _write_part(run, parts, _part(source.name, shared, job, recipe))
        points = _points(run, job, key, recipe, anew=anew)
        if part[1] > 1:
            advice = recommend(points, target)
            record = search_record(source.name, points, advice, None, commands=())
            return Searched(out, tuple(points), advice, record, None)
        if not any(one.kl is not None for one in points):
            raise NirvanaError(f"Every point failed. The first: {points[0].failed}")
        timed, benchmark = _timed(run, points, job)
        points = _on_tasks(run, [timed.get(one.name, one) for one in points], recipe)
        advice = recommend(points, target)
        chosen = advice.point
        inside = [] if chosen is None else commands_inside(chosen, job_in(job, chosen.point.way), out)
        record = search_record(source.name, points, advice, benchmark, commands=inside)
        _write_pages(run, record)
        run.finish()
    if chosen is not None:
        _require_verified(chosen, out)
        _require_quality(out, chosen, job)
    here = () if chosen is None else tuple(commands_of(chosen, job, out))
    return Searched(out, tuple(points), advice, record, out / SEARCH_HTML, here)


def job_of_search(model: str, recipe: Search, options: Mapping[str, Any], *, base: Job | None = None) -> Job:
    """The job of a search, at its largest sparsity and in all precisions; refuses what cannot be searched."""
    for name in ("sparsity", "quantize", "baseline_quantized"):
        if name in options:
            raise NirvanaError(f"A search tries several: give it a recipe, not the option {name!r}.")
    if recipe.tasks is not None:
        _require_local(listed(recipe.tasks))
    require_place(recipe)
    schemes = [scheme for scheme in precisions_of(recipe) if scheme]
    tried = {"sparsity": max(sparsities_of(recipe)), "quantize": schemes}
    job = job_of(model, {**options, **tried}, base=base)
    if not job.export.baseline:
        raise NirvanaError(
            "A search compares with the dense model, and --no-baseline leaves it out.",
            hint="Leave --no-baseline out.",
        )
    return job


def _require_timed(job: Job, recipe: Search, target: Target) -> None:
    """Raise NirvanaError for a limit on time in a search that times nothing."""
    if not target.on_time:
        return
    if untimed(job):
        raise NirvanaError(
            f"A limit on time needs times. {UNTIMED}.", hint="Leave out the limit on time, or --dtype bf16."
        )
    dense = 0.0 in sparsities_of(recipe) and None in precisions_of(recipe)
    if not (dense and job.measurement.run_benchmark):
        raise NirvanaError(
            "A limit on time needs the dense model in float, timed beside the others.",
            hint="Add 0 to --sparsity and none to --precision, and leave --no-benchmark out.",
        )


def cuts_in(base: Job, recipe: Search) -> list[Point]:
    """The cuts of this part, in float; raises NirvanaError for none, and for a way that cannot be tried."""
    part, parts = shard_of(recipe)
    ways = ways_of(recipe.ways, tried_options())
    cuts = [Point(one, None, way) for way in ways for one in sparsities_of(recipe) if one][part::parts]
    if not cuts:
        raise NirvanaError(f"There are fewer cuts than parts: none is left for --shard {recipe.shard}.")
    for way in ways:
        job_in(base, way)
    return cuts


def _shared(job: Job, model: Mapping[str, Any]) -> dict[str, Any]:
    """What all points of a search have in common."""
    options = {name: plain(value) for name, value in job.options().items() if name not in _FREE}
    options["eval_text"] = as_recorded(job.calibration.eval_text)
    return {"files": model["files"], "options": options}


def _points(run: Run, base: Job, key: str, recipe: Search, *, anew: bool) -> list[Found]:
    """Every point of this part: from disk where it is there and not wanted ``anew``, else made."""
    schemes, cuts = precisions_of(recipe), cuts_in(base, recipe)  # before any work
    dense = [Point(0.0, scheme) for scheme in schemes if 0.0 in sparsities_of(recipe)]
    wanted = [*dense, *(replace(cut, scheme=scheme) for cut in cuts for scheme in schemes)]
    known = _known(run, key, wanted)
    first = next((replace(point, scheme=None) for point in known if point.sparsity), cuts[0])
    missing = dict.fromkeys(
        replace(point, scheme=None) if point.sparsity else first for point in wanted if point not in known
    )
    unknown = [point for point in wanted if point not in known]
    asked = cuts_of(run.out, base, cuts, missing, first)
    for cut, failure in make_cuts(asked, recipe, run.progress, anew=anew):
        name = cut.folder.name
        here = [point for point in unknown if name == (point.cut if point.sparsity else first.cut)]
        known |= _found(run, name, key, here, failure)
    lacking = [point for point in dense if known[point].failed is not None]
    if lacking and (other := _good_cut(known, cuts, first)) is not None:
        run.progress.note(f"{first.cut} did not give the dense model; {other.cut} does.")
        for cut, failure in make_cuts(cuts_of(run.out, base, cuts, [other], other), recipe, run.progress):
            known |= _found(run, cut.folder.name, key, lacking, failure)
    return [known[point] for point in wanted]


def _found(
    run: Run, folder: str, key: str, points: Sequence[Point], failure: NirvanaError | None
) -> dict[Point, Found]:
    """What the cut in ``folder``, which is through, says of ``points``; written down at once."""
    found = {point: found_in(run.out, folder, key, point, failed=failure) for point in points}
    for one in found.values():
        _write(run, one)
    if any(one.failed is None for one in found.values()):
        run.keep()
    return found


def _good_cut(known: Mapping[Point, Found], cuts: Sequence[Point], first: Point) -> Point | None:
    """The first cut but ``first`` of which some model was measured; it lies where its own points do."""
    good = {replace(point, scheme=None) for point, found in known.items() if found.failed is None}
    return next((cut for cut in cuts if cut in good and cut != first), None)


def _forget_points(run: Run) -> None:
    """Remove what an earlier search found, so that a killed one does not go on from it."""
    for name in run.manifest["makes"]:
        if name.startswith((f"{POINTS}/", f"{PARTS}/")):
            owned.remove(run.out, name)
            run.manifest["files"].pop(name, None)


def _part(model: str, shared: Mapping[str, Any], base: Job, recipe: Search) -> Part:
    """What this part of a search makes."""
    key, cuts = key_of(shared), cuts_in(base, recipe)
    points = [replace(cut, scheme=scheme) for cut in cuts for scheme in precisions_of(recipe)]
    return Part(
        schema=SCHEMA,
        shard=str(recipe.shard),
        key=key,
        model=model,
        files=shared["files"],
        options=shared["options"],
        cuts=tuple(cut.cut for cut in cuts),
        points=tuple(file_of(key, point) for point in points),
    )


def _write_part(run: Run, parts: Mapping[str, Part], part: Part) -> None:
    """Say in the folder what part of which search it holds; one that is resumed stays where it is."""
    before = next((name for name, one in parts.items() if one.shard == part.shard), None)
    with run.writing(before or place_of(part.shard, run.manifest["run"])) as path:
        write_json(path, asdict(part))


def _adopt(run: Run, parts: Mapping[str, Part]) -> None:
    """Let the manifest, which is that of the part copied last, know the files of all parts."""
    names = {*parts, *(name for part in parts.values() for name in part.points)}
    there = {name for name in names if (run.out / name).is_file()}
    run.manifest["makes"] = sorted(there.union(run.manifest["makes"]))
    run.manifest["files"] |= {name: sha256_of(run.out / name) for name in there}


def _known(run: Run, key: str, wanted: Sequence[Point]) -> dict[Point, Found]:
    """The points that were found before and did not fail, nor their verification."""
    known = {}
    for point in wanted:
        path = run.out / file_of(key, point)
        if path.is_file():
            found = read_found(path, key=key, point=point)
            sound = found.failed is None and found.unverified is None
            if sound and (run.out / found.folder / MANIFEST).is_file():
                known[point] = found
    return known


def _write_pages(run: Run, record: Mapping[str, Any]) -> None:
    with run.writing(SEARCH_FILE) as path:
        write_json(path, record)
    with run.writing(SEARCH_CSV) as path:
        write_bytes(path, search_csv(record).encode())
    with run.writing(SEARCH_HTML) as path:
        write_bytes(path, search_page(record).encode())


def _write(run: Run, found: Found) -> None:
    with run.writing(file_of(found.key, found.point)) as path:
        write_json(path, asdict(found))


def _timed(run: Run, points: Sequence[Found], base: Job) -> tuple[dict[str, Found], dict[str, Any] | None]:
    """Time the points that are worth it against the dense model."""
    worth = worth_timing(points)
    if not base.measurement.run_benchmark or not any(one.name == DENSE for one in worth):
        return {}, None
    if untimed(base):
        run.progress.note(UNTIMED)
        return {}, None
    timed, record = timed_points(run.out, worth, workload_of(base.measurement), progress=run.progress)
    with run.writing(BENCHMARK_FILE) as path:
        write_json(path, record)
    return {one.name: one for one in timed}, record


def _on_tasks(run: Run, points: list[Found], recipe: Search) -> list[Found]:
    """The points, those that are worth it with their zero-shot accuracy, if that is asked for."""
    if recipe.tasks is None:
        return points
    worth = worth_timing(points)
    asked = listed(recipe.tasks)
    found, record = points_on_tasks(run.out, worth, asked, limit=recipe.limit, progress=run.progress)
    with run.writing(TASKS_FILE) as path:
        write_json(path, record)
    scored = {one.name: one for one in found}
    return [scored.get(one.name, one) for one in points]


def _require_local(tasks: Sequence[str]) -> None:
    """Raise NirvanaError before any work for tasks whose examples cannot be averaged, or not be read."""
    require_tasks(tasks)
    if others := [name for name in tasks if not is_local(name)]:
        raise NirvanaError(
            f"--tasks {others[0]}: a search averages over .jsonl files, and this is none.",
            hint=f"Afterwards: nirvana-deploy evaluate OUT/s0.2 --tasks {others[0]}",
        )


def _require_verified(found: Found, out: Path) -> None:
    """Raise VerificationError where the recommended point failed its verification."""
    if found.unverified is not None:
        raise VerificationError(
            f"No verified point meets the budget; {found.name} failed: {found.unverified}",
            hint=f"{out / found.folder} is kept. Allow more, or try other --sparsity or --precision.",
        )


def _require_quality(out: Path, found: Found, job: Job) -> None:
    """Raise QualityError where the recommended point, a cut, misses a limit that the job requires."""
    if not found.sparsity:
        return
    known = read_json(out / found.folder / QUALITY_FILE, QualityRecord)["variants"]
    named = {name: quality for name, quality in known.items() if name in {DENSE, found.variant.name}}
    require_quality(named, job.measurement)
