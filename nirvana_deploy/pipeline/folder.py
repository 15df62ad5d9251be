"""Single stages again, on a finished output folder; each rewrites the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Unpack

from nirvana_deploy.base.artifact import claim, sha256_of
from nirvana_deploy.base.errors import LaterVersionError, NirvanaError
from nirvana_deploy.base.ownership.marker import require_apart
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.shown.html import Record, html_table
from nirvana_deploy.calibrate.stage import WINDOW_TOKENS, text_windows
from nirvana_deploy.engine.recipe import EngineBuild, EngineForm, Lengths
from nirvana_deploy.engine.stage import (
    build_engine,
    builder_options,
    engine_files,
    engine_name,
    engines_from_onnx_folder,
)
from nirvana_deploy.measure.gate import require_quality
from nirvana_deploy.measure.recipe import Analysis, Evaluation, Traffic, Workload
from nirvana_deploy.measure.rounds.watch import wait_until_idle
from nirvana_deploy.measure.stage import (
    answers,
    drop_measurements,
    quality,
    refresh_quality,
    speed,
    tangent_kernel,
    tasks,
    timed_variants,
    traffic,
)
from nirvana_deploy.measure.zero_shot.tasks import require_tasks
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import (
    BENCHMARK_FILE,
    CHECKPOINT,
    ENGINES,
    MANIFEST,
    RECIPE_FILE,
    REPORT_HTML,
    REPORT_MARKDOWN,
    WORKLOADS_FILE,
)
from nirvana_deploy.output.records import read_records
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import in_steps
from nirvana_deploy.output.undamaged import require_undamaged
from nirvana_deploy.output.variants import quantized_variant
from nirvana_deploy.pipeline.before import Until
from nirvana_deploy.pipeline.forecast.forecast import Planned, forecast
from nirvana_deploy.pipeline.job import Job, JobOptions, job_of
from nirvana_deploy.pipeline.presets import with_recovery
from nirvana_deploy.pipeline.prune_export import Deployment, run_job
from nirvana_deploy.pipeline.recipe_file import read_recipe
from nirvana_deploy.pipeline.traffic import require_context, require_served, traffic_asked
from nirvana_deploy.prune.choosing.choices import listed
from nirvana_deploy.quantize.coverage import Coverage
from nirvana_deploy.quantize.int8.spec import read_record
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.stage import quantize, require_quantized
from nirvana_deploy.report.cards.folders import write_cards
from nirvana_deploy.report.pages.workloads import workloads_table
from nirvana_deploy.report.report import write_report, write_unread
from nirvana_deploy.report.sensitivity import write_sensitivity
from nirvana_deploy.report.stage import report
from nirvana_deploy.report.table import Table, quality_table, summary_table
from nirvana_deploy.runtime.models import models_for
from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.runtime.tensorrt.record import ENGINE_SUFFIX


def quantize_folder(out: Path | str, recipe: Quantization, *, progress: Progress = SILENT) -> Record:
    """Quantize the pruned model of an output folder into ``onnx-<scheme>``, in place of an earlier one.

    Calibrates on the windows that the folder was pruned with. Returns the content of quantization.json;
    ``benchmark`` and ``evaluate`` measure the new variant; where it replaces another model, what was measured
    with that one goes. Raises NirvanaError for a folder without ONNX model, VerificationError as
    ``quantize_onnx`` does.
    """
    out = Path(out)
    with Run.open(out, writing=True, progress=progress) as run:
        if not run.has(stage.ONNX):
            raise NirvanaError(
                f"{out} has a checkpoint and no ONNX model yet.",
                hint="Export it first: repeat its prune command as prune-export, with --resume.",
            )
        made = quantize(run, recipe, draw=write_sensitivity)
        before = _graphs(run, made.name)
        run.run(made, redo=True)
        if before and _graphs(run, made.name) != before:
            drop_measurements(run, made.name)
        run.run(report(run))
        require_quantized(run, recipe.scheme)
    record = read_record(out / quantized_variant(recipe.scheme).folder)
    line = Coverage(**record["coverage"]).line
    return Record(record, line=line, html=lambda: html_table((), (), title=line))


def _graphs(run: Run, made: str) -> dict[str, str]:
    """The files that a runtime reads of the stage ``made`` -> their sha256; none where it has not run."""
    files: dict[str, str] = run.manifest["stages"][made]["files"] if run.has(made) else {}
    return {file: sha256 for file, sha256 in files.items() if file.endswith((".onnx", ".data"))}


def recover_folder(
    out: Path | str,
    *,
    command: str | None = None,
    progress: Progress = SILENT,
    **options: Unpack[JobOptions],
) -> Deployment:
    """Train the pruned model of an output folder, and make anew what was made from it.

    ``options`` are those of recovery, of which ``recover`` says how long, and ``preset``, for what it says of
    recovery; all others are as the folder's recipe.toml says. Raises NirvanaError as ``prune_export`` does.
    """
    out = Path(out)
    job, until = _recovery(out, options, progress)
    return run_job(job, out=out, until=until, resume=True, command=command, progress=progress)


def forecast_recovery(
    out: Path | str, *, progress: Progress = SILENT, **options: Unpack[JobOptions]
) -> Planned:
    """What :func:`recover_folder` is going to take; writes nothing."""
    out = Path(out)
    job, until = _recovery(out, options, progress)
    steps = in_steps(job.recovery.recover_steps)
    again = [step.named(stage.RECOVER) for step in steps]
    return forecast(job, out=out, until=until, resume=True, again=again, progress=progress)


def _recovery(out: Path, options: Mapping[str, Any], progress: Progress) -> tuple[Job, Until]:
    with Run.open(out) as run:
        until: Until = "report" if run.has(stage.ONNX) else "checkpoint"
        if run.has(stage.PLAN) and not (out / RECIPE_FILE).is_file():
            raise NirvanaError(
                f"{out} was cut by a plan alone, and nothing says what its model was calibrated on.",
                hint="Make one that can be recovered: nirvana-deploy prune-export MODEL --sparsity 0.4 "
                "--recover 30m",
            )
        model = run.manifest["model"].get("path", "")
    base = read_recipe(out / RECIPE_FILE)
    job = job_of(base.model, with_recovery(options), base=base)
    if not Path(model).is_dir():
        progress.note(f"{model} is gone; looking for {base.model} again")
        _find_again(out, base.model, model, progress)
    return job, until


def _find_again(out: Path, named: str, path: str, progress: Progress) -> None:
    """Raise NirvanaError where the dense model of a folder is not at ``path`` nor where its name says."""
    try:
        resolve_model(named, progress=progress)
    except NirvanaError as error:
        raise NirvanaError(
            f"The dense model that {out} was cut from, and is trained toward, is gone. {error.message}",
            hint=f"Put it back at {path}, and repeat the command."
            + (f" {error.hint}" if error.hint and error.hint not in error.message else ""),
        ) from error


def benchmark_folder(
    out: Path | str,
    workload: Workload | None = None,
    analysis: Analysis | None = None,
    *,
    runtime: str | None = None,
    progress: Progress = SILENT,
) -> Record:
    """Measure an output folder again in ``runtime`` [onnxruntime-cpu]; returns benchmark.json.

    ``analysis`` says whether the models are profiled too, and whether the machine's ceilings are measured
    anew. A model that fails is in ``failed``, and raises nothing while another one was timed. Raises
    NirvanaError for a profile of another runtime than ONNX Runtime on the CPU, and for a model whose files
    were changed since the manifest.
    """
    out = Path(out)
    with Run.open(out, writing=True, progress=progress) as run:
        _require_undamaged(run, runtime)
        run.run(speed(run, workload or Workload(), analysis, runtime=runtime), redo=True)
        run.run(report(run))
    record = read_json(out / BENCHMARK_FILE, dict[str, Any])
    return _shown([one["name"] for one in record["variants"]], record, summary_table)


def benchmark_workloads(
    out: Path | str,
    asked: Traffic,
    workload: Workload | None = None,
    *,
    runtime: str | None = None,
    progress: Progress = SILENT,
) -> Record:
    """Time an output folder under the workloads and along the sweeps ``asked`` for; returns workloads.json.

    ``workload`` says what stays along a sweep, how many rounds it has, and the threads of both. Raises
    NirvanaError for nothing asked, an unknown name, lengths beyond the model's context, a model that no
    server takes where a workload asks one, and a model whose files were changed since the manifest, before
    any work. A model that fails is in ``failed``.
    """
    out, base, again = Path(out), workload or Workload(), f"nirvana-deploy benchmark {out}"
    workloads, sweeps = traffic_asked(asked, base, again=again)
    with Run.open(out, writing=True, progress=progress) as run:
        most = Checkpoint.open(out / CHECKPOINT).context_tokens
        require_context((workloads, sweeps), most, again=again)
        _require_undamaged(run, runtime)
        require_served(workloads, timed_variants(run, runtime))
        if base.wait_until_idle:
            wait_until_idle(max_minutes=base.max_minutes, progress=progress)
        asked_for = [*(((one,), ()) for one in workloads), *(((), (one,)) for one in sweeps)]
        for some in asked_for:  # each is written when it is through: what fails later takes nothing with it
            run.run(traffic(run, *some, threads=base.threads, runtime=runtime), redo=True)
        run.run(report(run))
    record = read_json(out / WORKLOADS_FILE, dict[str, Any])
    names = [*(one["name"] for one in record["workloads"]), *(one["axis"] for one in record["sweeps"])]
    return _shown(names, record, workloads_table)


def _require_undamaged(run: Run, runtime: str | None) -> None:
    """Raise NirvanaError where a model is not the one that the manifest lists."""
    for path in models_for(run, runtime).values():
        require_undamaged(path, done="timed", progress=run.progress)


def _shown(names: Iterable[str], record: Mapping[str, Any], table: Callable[[Any], Table]) -> Record:
    """A record that prints as the names of its models, and in a notebook as a table."""

    def html() -> str:
        cells = table(record)
        return html_table(cells.headers, cells.rows)

    return Record(record, line=", ".join(names), html=html)


def evaluate_folder(
    out: Path | str,
    recipe: Evaluation | None = None,
    place: Place | None = None,
    *,
    progress: Progress = SILENT,
) -> Record:
    """Measure quality of an output folder again; rewrites quality.json, answers.json,
    benchmark.json and the report.

    On the text of the recipe, else on the held-out windows. The tangent kernel and the tasks are measured
    when the recipe asks for them; a folder without ONNX model is measured by these two alone. Returns
    quality.json with ``ntk`` and ``tasks`` added. Raises QualityError where the recipe requires more.
    """
    recipe = recipe or Evaluation()
    names = listed(recipe.tasks or "")
    if names:
        require_tasks(names)
    with Run.open(Path(out), writing=True, progress=progress) as run:
        return _evaluated(run, recipe, place or Place(), names)


def _evaluated(run: Run, recipe: Evaluation, place: Place, names: Sequence[str]) -> Record:
    result: dict[str, Any] = {}
    if run.has(stage.ONNX) or not (recipe.ntk or names):
        result = _quality(run, recipe, place)
    if recipe.ntk:
        kernel = run.run(tangent_kernel(run, windows=recipe.ntk_windows), redo=True)
        result = {**result, "ntk": kernel}
    if names:
        asked = tasks(
            run,
            names,
            limit=recipe.limit,
            include_path=recipe.task_folder,
            on=recipe.tasks_on,
            batch_size=recipe.batch_size,
        )
        result = {**result, "tasks": run.run(asked, redo=True)}
    run.run(report(run))
    require_quality(result.get("variants", {}), recipe)
    return _shown(result.get("variants", {}), result, quality_table)


def _quality(run: Run, recipe: Evaluation, place: Place) -> dict[str, Any]:
    windows = None
    if recipe.eval_text:
        checkpoint = Checkpoint.open(run.out / CHECKPOINT)
        checkpoint.require_length(recipe.window_tokens or WINDOW_TOKENS, option="--window")
        windows = text_windows(
            recipe.eval_text,
            checkpoint.tokenizer,
            run.progress,
            seq_len=recipe.window_tokens,
            max_sequences=recipe.max_windows,
        )
    result = run.run(quality(run, place, windows=windows), redo=True)
    run.run(answers(run, place), redo=True)
    refresh_quality(run)
    return result


def report_folder(out: Path | str, *, progress: Progress = SILENT) -> tuple[Path, Path]:
    """Write report.md, report.html and the model cards of a folder again; returns the first two.

    A folder without manifest, of records alone, has its report marked. Raises NirvanaError for a folder
    without records, and for a report that somebody else wrote; LaterVersionError for records of a later
    version, which a page in the place of the report then says.
    """
    out = Path(out)
    try:
        return _reported(out, progress)
    except LaterVersionError as error:
        with suppress(NirvanaError):  # the page is somebody else's
            _say_unread(out, error)
        raise


def _say_unread(out: Path, problem: LaterVersionError) -> None:
    """Leave no report of earlier records beside those of a later version."""
    pages = (REPORT_MARKDOWN, REPORT_HTML)
    if not (out / MANIFEST).is_file():
        claim(out, pages)
        write_unread(out, problem)
        return
    try:
        with Run.open(out, writing=True) as run:
            run.drop([stage.REPORT])
            with run.writing(REPORT_MARKDOWN), run.writing(REPORT_HTML):
                write_unread(out, problem)
    except LaterVersionError:  # nothing may be claimed in its manifest
        manifest = read_json(out / MANIFEST, dict[str, Any])
        if set(pages).issubset(manifest.get("makes", ())) and not _is_listed(out, REPORT_HTML):
            write_unread(out, problem)


def _is_listed(out: Path, name: str) -> bool:
    """Whether the manifest, of whatever version, has the sha256 of a file as it is now."""
    return (out / name).is_file() and sha256_of(out / name) in (out / MANIFEST).read_text(encoding="utf-8")


def _reported(out: Path, progress: Progress) -> tuple[Path, Path]:
    if not (out / MANIFEST).is_file():
        read_records(out)
        claim(out, (REPORT_MARKDOWN, REPORT_HTML))
        return write_report(out, progress=progress)
    with Run.open(out, writing=True, progress=progress) as run:
        if run.has(stage.REPORT):
            run.run(report(run))
        else:
            run.claim((REPORT_MARKDOWN, REPORT_HTML))  # both, or neither is touched
            with run.writing(REPORT_MARKDOWN), run.writing(REPORT_HTML):
                write_report(out, progress=progress)
            write_cards(out, progress=progress)
    return out / REPORT_MARKDOWN, out / REPORT_HTML


def build_engines(
    folder: Path | str,
    form: EngineForm | None = None,
    lengths: Lengths | None = None,
    build: EngineBuild | None = None,
    *,
    out: Path | str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> tuple[Path, ...]:
    """Build the engine of a model of an output folder, or of an ONNX folder into ``out`` [its ``engine``].

    Returns the engine files: two of an encoder-decoder. Raises NirvanaError when one of that name is there
    and ``force`` is not given.
    """
    folder, out = Path(folder), None if out is None else Path(out)
    form, lengths, build = form or EngineForm(), lengths or Lengths(), build or EngineBuild()
    options = builder_options(build)
    is_output = (folder / MANIFEST).is_file()
    if is_output and out is not None:
        raise NirvanaError(
            "The engine of an output folder lies in it.", hint="Leave out --out; --name names it."
        )
    where = out or folder / ENGINES
    own = engine_name(form, build.runtime) if is_output else folder.resolve().name
    name = build.name or own
    if Path(name).name != name:
        raise NirvanaError(f"--name {name} is no name of a file.", hint="Leave out folders, '.' and '..'.")
    if out is not None:
        require_apart(out, reads=[folder], replaced=False)
    if not force:
        _require_no_engine(where, name)
    if not is_output:
        return engines_from_onnx_folder(
            folder, where, name=name, lengths=lengths, options=options, progress=progress
        )
    with Run.open(folder, writing=True, progress=progress) as run:
        run.run(build_engine(run, form, options=options, lengths=lengths, name=name), redo=True)
        return engine_files(run, name)


def _require_no_engine(folder: Path, name: str) -> None:
    for pattern in (f"{name}{ENGINE_SUFFIX}", f"{name}-*coder{ENGINE_SUFFIX}"):
        for existing in sorted(folder.glob(pattern)):
            raise NirvanaError(
                f"{existing} exists already.", hint="Pass --force to replace it, or --name NAME."
            )
