"""The stages that measure a finished folder; ``evaluate`` and ``benchmark`` run each again alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.calibrate.stage import drawn_record
from nirvana_deploy.calibrate.windows import TokenWindows
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.measure.answers import NEW_TOKENS, Heard, Texts, answers_of
from nirvana_deploy.measure.benchmark import (
    SCHEMA,
    Variant,
    benchmark,
    require_memory_for,
    variant_from_folder,
)
from nirvana_deploy.measure.evaluation_text import (
    EvaluationText,
    calibration_kinds,
    held_out_text,
    text_of,
    trained_kinds,
    unseen_text,
)
from nirvana_deploy.measure.ntk.study import measure_ntk
from nirvana_deploy.measure.quality import quality_of
from nirvana_deploy.measure.recipe import Analysis, Evaluation, Workload
from nirvana_deploy.measure.roofline.explained import Explained
from nirvana_deploy.measure.rounds.elsewhere import earlier_benchmark, with_other_runtimes
from nirvana_deploy.measure.workloads.named import NamedWorkload
from nirvana_deploy.measure.workloads.session import measure_sweep, measure_workload
from nirvana_deploy.measure.workloads.sweep import Sweep
from nirvana_deploy.measure.zero_shot.tasks import evaluate_tasks
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import manifest as manifests
from nirvana_deploy.output import stage
from nirvana_deploy.output.kinds.workloads import WorkloadsRecord
from nirvana_deploy.output.layout import (
    ANSWERS_FILE,
    BENCHMARK_FILE,
    CALIBRATION_FILE,
    CHECKPOINT,
    MODEL_FILE,
    NTK_FILE,
    PLAN_FILE,
    QUALITY_FILE,
    TASKS_FILE,
    WORKLOADS_FILE,
)
from nirvana_deploy.output.record_kinds import BenchmarkRecord, Quality, QualityRecord
from nirvana_deploy.output.results import AnswersWritten, QualityMeasured, Timed, WorkloadsTimed
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage
from nirvana_deploy.output.variants import DENSE, PRUNED, ModelVariant, variants_of
from nirvana_deploy.prune.plan_file import read_plan, shape_of
from nirvana_deploy.runtime.models import models_for, place_of
from nirvana_deploy.runtime.onnxruntime.providers import open_on_cpu
from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.runtime.registry import is_engine, open_runner
from nirvana_deploy.runtime.runner import Runner
from nirvana_deploy.runtime.text import load_text_side, tokenizer_folder
from nirvana_deploy.verify.cases import PROMPTS


class _Measured(TypedDict):
    """What each measurement records, whatever else."""

    variants: dict[str, Any] | list[str]


_MEASUREMENTS = (stage.QUALITY, stage.ANSWERS, stage.BENCHMARK, stage.WORKLOADS, stage.TASKS)
_NOTHING_DENSE = {"kl_vs_dense": None, "kl_standard_error": None, "top1_agreement": None}
"""What a measurement without the dense baseline cannot say."""


def quality(run: Run, place: Place, *, windows: TokenWindows | None = None) -> Stage:
    """Perplexity of the models, and KL against dense: on ``windows``, else on the held-out ones.

    Where these are all of kinds that the model was calibrated or trained on, also on a text that it was not.
    They run in ``place.runtime``, ONNX Runtime on the CPU when it is None.
    """

    def work() -> QualityMeasured:
        cut = Checkpoint.open(run.out / CHECKPOINT)
        known = _known_kinds(run, cut)
        text, beside = _evaluation_texts(run, cut, windows, known)
        models = models_for(run, place.runtime)
        require_memory_for(models.values())
        with ExitStack() as stack:
            opened = {v.name: stack.enter_context(_opened(run, path, place)) for v, path in models.items()}
            found = _qualities(run, models, opened, text)
            for other in beside:
                for name, quality in _qualities(run, models, opened, other).items():
                    found[name]["parts"] |= quality["parts"]
        result = QualityMeasured(
            source=text.source,
            window_tokens=text.tokens.shape[1],
            variants=cast(dict[str, Quality], found),
            calibrated={kind: kind in known for one in (text, *beside) for kind in one.kinds},
        )
        write_json(run.out / QUALITY_FILE, asdict(result))
        return result

    return Stage(
        stage.QUALITY,
        needs=(stage.SELECT, stage.CALIBRATE, *_measured(run)),
        makes=(QUALITY_FILE,),
        work=work,
        always=_outdated(run, stage.QUALITY, place),
    )


def _evaluation_texts(
    run: Run, cut: Checkpoint, windows: TokenWindows | None, known: frozenset[str]
) -> tuple[EvaluationText, tuple[EvaluationText, ...]]:
    """The text that quality is quoted on; the unseen one beside it unless it has a kind beside ``known``."""
    if windows is None:
        text = held_out_text(run.out / CALIBRATION_FILE, drawn_record(run))
    else:
        text = text_of(windows)
    return text, () if text.has_a_kind_beside(known) else (unseen_text(text, cut.tokenizer),)


def _known_kinds(run: Run, cut: Checkpoint) -> frozenset[str]:
    """The kinds of text that the model was calibrated or trained on."""
    drawn = run.has(stage.SELECT) or run.has(stage.CALIBRATE)
    known = calibration_kinds(drawn_record(run)) if drawn else frozenset[str]()
    if run.has(stage.RECOVER):
        trained = run.result(stage.RECOVER, dict[str, Any])["options"]["recover_text"]
        known |= trained_kinds(trained, writes_text=cut.shape.family.writes_text)
    return known


def _qualities(
    run: Run, models: Iterable[ModelVariant], opened: Mapping[str, Runner], text: EvaluationText
) -> dict[str, dict[str, Any]]:
    """Quality of each model on one text, also by kind."""
    baseline, *others = opened
    found = quality_of(
        opened[baseline],
        {name: opened[name] for name in others},
        text.tokens,
        baseline_name=baseline,
        parents={v.name: v.parent for v in models if v.parent is not None and v.parent in opened},
        kinds=text.kinds,
        progress=run.progress,
    )
    if baseline != DENSE:
        for one in found.values():
            for numbers in (one, *one["parts"].values()):
                numbers |= _NOTHING_DENSE
    return found


def answers(run: Run, place: Place, heard: Heard | None = None) -> Stage:
    """What the models write after a few prompts, greedily; in ``place`` as :func:`quality`.

    One that does not write text from nothing is not asked, and the record says so; nor one ``heard`` before.
    """

    def work() -> AnswersWritten:
        models = models_for(run, place.runtime)
        family = shape_of(run.out, next(iter(models))).family
        if family.writes_text:
            result = AnswersWritten(NEW_TOKENS, PROMPTS, _written(run, models, place, heard or {}))
        else:
            nothing: Texts = {variant.name: () for variant in models}
            why = f"{family.name} transforms a text; it does not continue one."
            result = AnswersWritten(NEW_TOKENS, (), nothing, skipped=why)
        write_json(run.out / ANSWERS_FILE, asdict(result))
        return result

    return Stage(
        stage.ANSWERS,
        needs=_measured(run),
        makes=(ANSWERS_FILE,),
        work=work,
        always=_outdated(run, stage.ANSWERS, place),
    )


def _written(run: Run, models: Mapping[ModelVariant, Path], place: Place, heard: Heard) -> Texts:
    """The continuations of each model, one model in memory at a time."""
    text_side, stops = load_text_side(tokenizer_folder(next(iter(models.values()))))
    found = {}
    with run.progress.task("Answers", len(models) * len(PROMPTS)) as advance:
        for v, path in models.items():
            known = heard.get(v.name, {}) if place.runtime is None and path == run.out / v.folder else {}
            found[v.name] = answers_of(partial(_opened, run, path, place), known, text_side, stops, advance)
    return found


def _measured(run: Run) -> tuple[str, ...]:
    """The stages that make what is measured."""
    return tuple(variant.stage for variant in variants_of(run))


def heldout_windows(run: Run) -> tuple[NDArray[np.int64], str]:
    """The windows [M, T] that calibration set aside, and where they come from."""
    return read_windows(run.out / CALIBRATION_FILE)["heldout"], drawn_record(run)["evaluation_source"]


def speed(
    run: Run, workload: Workload, analysis: Analysis | None = None, *, runtime: str | None = None
) -> Stage:
    """Measure the models against each other in ``runtime`` and write benchmark.json, quality included.

    On the CPU in ONNX Runtime, each model's time stands beside what the machine's ceilings allow.
    """

    path = run.out / BENCHMARK_FILE
    before = earlier_benchmark(path) if run.has(stage.BENCHMARK) else None

    def work() -> Timed:
        variants = timed_variants(run, runtime)
        explain = Explained(workload, analysis or Analysis(), runtime, run.progress)
        baseline = variants[0].name
        result = benchmark(variants, workload=workload, baseline=baseline, lost={}, progress=run.progress)
        result = explain.of(result, {variant.name: variant for variant in variants})
        _place(run, result)
        write_json(path, _with_quality(run, with_other_runtimes(result, before)))
        return Timed(
            variants=tuple(variant["name"] for variant in result["variants"]),
            comparisons=tuple(result["comparisons"]),
        )

    return Stage(
        stage.BENCHMARK,
        needs=(stage.QUALITY, *_measured(run)),
        makes=(BENCHMARK_FILE,),
        work=work,
        always=_outdated(run, stage.BENCHMARK, Place(runtime=runtime)),
    )


def timed_variants(run: Run, runtime: str | None) -> list[Variant]:
    """The models of the folder as they are timed, the baseline first."""
    return [
        variant_from_folder(
            v.name,
            run.out / v.folder,
            shape_of(run.out, v),
            float_arithmetic=v.scheme is None,
            runtime=runtime,
            path=path,
        )
        for v, path in models_for(run, runtime).items()
    ]


def _place(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """``result`` with paths as records have them."""
    for variant in result["variants"]:
        variant["path"] = place_of(run, Path(variant["path"]))
    return result


def traffic(
    run: Run,
    workloads: Sequence[NamedWorkload],
    sweeps: Sequence[Sweep],
    *,
    threads: int | None,
    runtime: str | None = None,
) -> Stage:
    """Time the models under workloads and along sweeps, and write workloads.json.

    What it has of other workloads and axes stays: a result takes the place of an earlier one of its name.
    """
    path, before = run.out / WORKLOADS_FILE, WorkloadsRecord()
    if run.has(stage.WORKLOADS) and path.is_file():
        before = read_json(path, WorkloadsRecord, schema=SCHEMA)

    def work() -> WorkloadsTimed:
        variants = timed_variants(run, runtime)
        named: dict[str, Any] = {one["name"]: one for one in before.get("workloads", [])}
        swept: dict[str, Any] = {one["axis"]: one for one in before.get("sweeps", [])}
        for workload in workloads:
            found = measure_workload(variants, workload, threads=threads, progress=run.progress)
            named[workload.name] = _place(run, found)
        for sweep in sweeps:
            swept[sweep.axis] = _place(run, measure_sweep(variants, sweep, progress=run.progress))
        write_json(
            path, {"schema": SCHEMA, "workloads": list(named.values()), "sweeps": list(swept.values())}
        )
        return WorkloadsTimed(tuple(named), tuple(swept))

    return Stage(stage.WORKLOADS, needs=_measured(run), makes=(WORKLOADS_FILE,), work=work)


def _outdated(run: Run, name: str, place: Place) -> bool:
    """Whether a stage measured other variants than the folder holds now."""
    if not run.has(name):
        return False
    return set(run.result(name, _Measured)["variants"]) != {v.name for v in models_for(run, place.runtime)}


def drop_measurements(run: Run, model: str) -> None:
    """Drop what was measured with the model of the stage ``model``, which is another now."""
    made = manifests.made_from(run.manifest, model)
    gone = [name for name in _MEASUREMENTS if name in made]
    if gone:
        run.progress.note(f"Dropped, as they were measured on the model before: {', '.join(gone)}")
        run.drop(gone)


def refresh_quality(run: Run) -> None:
    """Put the quality measured last into benchmark.json, where there is one."""
    path = run.out / BENCHMARK_FILE
    if path.is_file() and run.has(stage.BENCHMARK):
        write_json(path, _with_quality(run, dict(read_json(path, BenchmarkRecord))))
        run.rehash(stage.BENCHMARK)


def _with_quality(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    path = run.out / QUALITY_FILE
    found: QualityRecord = read_json(path, QualityRecord) if path.exists() else {"variants": {}}
    for variant in result["variants"]:
        variant["quality"] = found["variants"].get(variant["name"])
    evaluation = {"source": found.get("source"), "window_tokens": found.get("window_tokens")}
    return {**result, "evaluation": evaluation}


def tangent_kernel(run: Run, *, windows: int) -> Stage:
    """Compare the tangent kernels of dense, pruned and randomly cut model on the first held-out windows.

    Its result is ntk.json. Raises NirvanaError when the folder has no held-out windows, or the dense model
    is gone.
    """
    if not (run.out / CALIBRATION_FILE).is_file():
        raise NirvanaError(
            f"{run.out} has no {CALIBRATION_FILE}, whose held-out windows --ntk is measured on.",
            hint="Prune from a model instead of a plan: nirvana-deploy prune MODEL --sparsity 0.4",
        )
    dense = dense_checkpoint(run)

    def work() -> dict[str, Any]:
        tokens, source = heldout_windows(run)
        plan, checkpoint = read_plan(run.out / PLAN_FILE), Checkpoint.open(dense)
        study = measure_ntk(checkpoint, plan, tokens[:windows], progress=run.progress)
        result = {**study.to_json(), "source": source}
        write_json(run.out / NTK_FILE, result)
        return result

    needs = (stage.PLAN, stage.RECONSTRUCT)
    return Stage(stage.TANGENT_KERNEL, needs=needs, makes=(NTK_FILE,), work=work)


def tasks(
    run: Run,
    names: Sequence[str],
    *,
    limit: int | None,
    include_path: Path | None = None,
    on: str | None = None,
    batch_size: int = Evaluation.batch_size,
) -> Stage:
    """Run tasks of lm-evaluation-harness on the models of the folder; its result is tasks.json.

    ``on`` "onnx" means every variant that is deployed, "checkpoint" what they were made from, "both" both;
    None is "onnx" where the folder has ONNX models. A checkpoint's results stand under "dense checkpoint" and
    "pruned checkpoint" where the ONNX ones stand beside them.
    """
    variants = [variant for variant in variants_of(run) if (run.out / variant.folder / MODEL_FILE).is_file()]
    on = on or ("onnx" if variants else "checkpoint")
    models = {} if on == "checkpoint" else {v.name: run.out / v.folder for v in variants}
    if on == "onnx" and not models:
        raise NirvanaError(
            f"{run.out} has no ONNX model to run tasks on.",
            hint="Run them on the checkpoints, --tasks-on checkpoint, or finish the folder: "
            "nirvana-deploy prune-export ... --resume",
        )
    if on != "onnx":
        suffix = " checkpoint" if models else ""
        models |= {f"{DENSE}{suffix}": dense_checkpoint(run), f"{PRUNED}{suffix}": run.out / CHECKPOINT}

    def work() -> dict[str, Any]:
        result = evaluate_tasks(
            models,
            names,
            limit=limit,
            include_path=include_path,
            batch_size=batch_size,
            progress=run.progress,
        )
        write_json(run.out / TASKS_FILE, result)
        return result

    return Stage(stage.TASKS, needs=(stage.CHECKPOINT, *_measured(run)), makes=(TASKS_FILE,), work=work)


def dense_checkpoint(run: Run) -> Path:
    """The model that was pruned; raises NirvanaError when it is not where it was."""
    path = run.dense
    if not path.is_dir():
        of_folder = str(run.manifest["model"].get("origin")).startswith("folder ")
        again = f"nirvana-deploy prune {run.manifest['options']['model']} --sparsity 0.4 --out OTHER"
        raise NirvanaError(
            f"The dense model is no longer at {path}, and this compares with it.",
            hint="Put it back there." if of_folder else f"Fetch it again: {again}",
        )
    return path


def _opened(run: Run, path: Path, place: Place) -> Runner:
    """A runner; a bfloat16 model that no other runtime was named for is computed in float32 on the CPU."""
    if place.runtime is None and not is_engine(path) and run.manifest["options"].get("dtype") == "bf16":
        return open_on_cpu(path, threads=place.threads, in_float32=True)
    return open_runner(path, runtime=place.runtime, threads=place.threads)
