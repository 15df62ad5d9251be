"""The stages that a job runs, known before it begins: what ``run_job`` does, as data.

``tests/pipeline/test_stages.py`` compares it with the stages that jobs ran.
"""

from __future__ import annotations

from collections.abc import Iterator

from nirvana_deploy.engine.recipe import EngineForm
from nirvana_deploy.engine.stage import engine_name
from nirvana_deploy.output import stage
from nirvana_deploy.output.stage import in_steps
from nirvana_deploy.output.variants import DENSE, PRUNED, quantized_variant
from nirvana_deploy.pipeline.before import Until, untimed
from nirvana_deploy.pipeline.job import Job
from nirvana_deploy.prune.choosing.choices import Choices
from nirvana_deploy.prune.cutting import reads_curves
from nirvana_deploy.prune.recipe import REFIT


def stages_of(job: Job, choices: Choices, until: Until) -> tuple[str, ...]:
    """Names of the stages of a job whose models are verified, in order."""
    return (*_pruning(job, choices), *(() if until == "checkpoint" else _deploying(job, until)))


def _pruning(job: Job, choices: Choices) -> Iterator[str]:
    recipe = job.pruning
    if recipe.cost != "weights":
        yield stage.UNIT_COST
    if choices.single:
        yield stage.CALIBRATE
        if reads_curves(recipe, choices.saliencies[0]):
            yield stage.CURVES
        if choices.saliencies[0] != REFIT:
            yield stage.SCORE
    else:
        yield stage.SELECT
    yield stage.PLAN
    for step in in_steps(job.recovery.recover_steps):
        if recipe.reconstruct:
            yield step.named(stage.RECONSTRUCT)
        if job.recovery.recover is not None:
            yield step.named(stage.RECOVER)
        yield step.named(stage.CHECKPOINT)


def _deploying(job: Job, until: Until) -> Iterator[str]:
    yield stage.ONNX
    if job.export.baseline:
        yield stage.DENSE_ONNX
    yield stage.VERIFY
    for of, scheme in quantized_models(job):
        yield quantized_variant(scheme, of=of).stage
    for runtime in dict.fromkeys(job.engine.engines):
        for form in engine_forms(job):
            yield stage.engine(engine_name(form, runtime))
    yield stage.QUALITY
    if until == "report":
        yield stage.ANSWERS
        if is_timed(job, until):
            yield stage.BENCHMARK
        yield stage.REPORT


def quantized_models(job: Job) -> Iterator[tuple[str, str]]:
    """What is quantized, and how."""
    both = job.export.baseline and job.quantization.baseline_quantized
    for scheme in dict.fromkeys(job.quantization.quantize):
        yield PRUNED, scheme
        if both:
            yield DENSE, scheme


def engine_forms(job: Job) -> Iterator[EngineForm]:
    """What engines are built of, for each runtime."""
    for scheme in (None, *dict.fromkeys(job.quantization.quantize)):
        yield EngineForm(quantize=scheme)
    if job.export.baseline:
        yield EngineForm(variant=DENSE)


def is_timed(job: Job, until: Until) -> bool:
    """Whether the models are timed against each other."""
    return job.measurement.run_benchmark and not untimed(job) and until == "report"
