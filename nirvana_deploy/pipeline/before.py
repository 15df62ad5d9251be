"""Before any work of a job: refuse what cannot be done, and say what is going to be done."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import Progress
from nirvana_deploy.base.recipe import fields_of, names_of
from nirvana_deploy.base.resources import require_free_bytes, require_memory
from nirvana_deploy.base.units import format_seconds
from nirvana_deploy.calibrate.mixture import files_of, parts_of
from nirvana_deploy.calibrate.stage import (
    evaluation_texts,
    segment_tokens,
    why_few_tokens,
    windows_wanted,
)
from nirvana_deploy.calibrate.texts import require_source
from nirvana_deploy.export.decoder import GraphOptions
from nirvana_deploy.export.dtypes import dtype_named
from nirvana_deploy.measure.recipe import Gate, Measurement, Workload
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.sources import local_paths
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import BENCHMARK
from nirvana_deploy.pipeline.job import SECTIONS, Job, all_fields, plain
from nirvana_deploy.prune.choosing.choices import Choices, choices_of, why_groups_stay
from nirvana_deploy.prune.curves.measure_curves import require_windows, scarce
from nirvana_deploy.prune.curves.operations import (
    curve_operations,
    operations_per_second,
    refit_operations,
)
from nirvana_deploy.prune.cutting import reads_curves, width_step
from nirvana_deploy.prune.recipe import REFIT
from nirvana_deploy.prune.refit.reconstruct import read_tokens, require_tokens, widest_input
from nirvana_deploy.prune.streaming.processes import count
from nirvana_deploy.recover.before import require_recovery, work_of
from nirvana_deploy.recover.learning.needs import Work, require_room, told_of_teacher
from nirvana_deploy.runtime.tensorrt.loading import tensorrt_module

Until = Literal["checkpoint", "quality", "report"]
_EQUATION_BYTES = 4 + 8
"""Per pair of inputs of a linear: their sum of products, and the system that is solved."""
_VERIFIED_BYTES = 4 + 4
"""Per parameter: both runtimes hold it in float32."""
UNTIMED = "bf16 cannot be timed on the CPU: it has no bfloat16 arithmetic in ONNX Runtime"
_RECORDED_AS = {"run_benchmark": "benchmark"}
"""Options whose name in the manifest is another."""


def checked(job: Job, dense: Checkpoint, until: Until, progress: Progress) -> Choices:
    """Refuse, before any work, what cannot be done."""
    for engine in job.engine.engines:
        tensorrt_module(engine)
    dense.require_length(job.calibration.seq_len)
    if job.measurement.run_benchmark and until != "checkpoint":
        _require_benchmark_fits(job.measurement, dense)
    if until != "checkpoint":
        graph = GraphOptions(dtype=dtype_named(job.export.dtype), flavor=job.export.flavor)
        graph.require_fits(dense.shape)
    if why := why_groups_stay(dense.shape):
        progress.note(f"Only FFN neurons go: {why}")
    choices = choices_of(job.calibration, job.pruning, dense.shape)
    for corpus in choices.corpora:
        for part in parts_of(corpus, writes_text=dense.shape.family.writes_text):
            require_source(part.source, dense.tokenizer)
    _require_comparison(job, until)
    _require_steps(job, choices)
    _require_settings(job, until)
    if job.recovery.recover is not None:
        text = job.calibration
        longest = segment_tokens(text, single=choices.single)
        require_recovery(job.recovery, dense, seq_len=text.seq_len, longest=longest)
        if told := told_of_teacher(work_of_job(job, dense.shape)):
            progress.note(told)
    evaluation_texts(job.calibration.eval_text, dense.tokenizer)
    windows = windows_wanted(job.calibration, dense.shape)
    if by_curves(job, choices):
        require_windows(windows)
    for said in _scarce_text(job, choices, dense.shape, windows):
        progress.note(said)
    if job.measurement.run_benchmark and untimed(job):
        progress.note(UNTIMED)
    return choices


def _scarce_text(job: Job, choices: Choices, shape: ModelShape, windows: int) -> Iterator[str]:
    """What to say of fewer tokens than would be good; raises NirvanaError for far too few to refit."""
    found = []
    if job.pruning.reconstruct:
        found += [
            require_tokens(shape, windows, job.calibration.seq_len),
            why_few_tokens(job.calibration, shape),
        ]
    if by_curves(job, choices):
        found.append(scarce(widest_input(shape), read_tokens(shape, windows, job.calibration.seq_len)))
    yield from (one for one in found if one is not None)


def _require_benchmark_fits(measurement: Measurement, dense: Checkpoint) -> None:
    tokens = measurement.prompt_tokens + measurement.new_tokens
    if dense.context_tokens is not None and tokens > dense.context_tokens:
        raise NirvanaError(
            f"The benchmark reads and writes {tokens} tokens, and the model's context is "
            f"{dense.context_tokens}.",
            hint="Pass --no-benchmark, and measure less afterwards: nirvana-deploy benchmark OUT "
            "--prompt-tokens N --new-tokens N",
        )


def _require_comparison(job: Job, until: Until) -> None:
    """Raise NirvanaError for limits on what a model loses against the dense one where that is left out."""
    if job.export.baseline or until == "checkpoint":
        return
    limits = [field for field in fields_of(Gate) if getattr(job.measurement, field.name) is not None]
    if limits:
        flags = " and ".join(f"--{field.name.replace('_', '-')}" for field in limits)
        raise NirvanaError(
            f"A limit on quality ({flags}) compares with the dense model, and --no-baseline leaves it out.",
            hint=f"Leave out --no-baseline, or {flags}.",
        )


def _require_steps(job: Job, choices: Choices) -> None:
    """Raise NirvanaError for several steps without recovery, or by scores."""
    steps = job.recovery.recover_steps
    if steps > 1 and job.recovery.recover is None:
        raise NirvanaError(
            f"--steps {steps} trains after each cut, and --recover is missing.",
            hint="Say how long to train in all, for instance --recover 30m, or leave --steps out.",
        )
    if steps > 1 and choices.saliencies != (REFIT,):
        preset = job.pruning.preset
        raise NirvanaError(
            f"--steps {steps} chooses units inside the refit of each step, and saliency "
            f"{','.join(choices.saliencies)} ranks those of the dense model, once.",
            hint=f"Leave {'--saliency' if preset == 'best' else f'--preset {preset}'} out, or --steps.",
        )
    if steps > 1 and count() > 1:  # the others open the model by its folder, and a step's is in memory alone
        raise NirvanaError(
            f"--steps {steps} refits what recovery made of the step before, which one of the {count()} "
            "processes has.",
            hint="Start nirvana-deploy without the launcher, or leave --steps out.",
        )


def _require_settings(job: Job, until: Until) -> None:
    """Raise NirvanaError for a ridge that is none, and for bfloat16 that calibration would have to run."""
    ridge = job.pruning.ridge
    if ridge != "auto" and not float(ridge) > 0:
        raise NirvanaError(f"--ridge must be a positive number or 'auto', got {ridge}.")
    if until != "checkpoint" and untimed(job) and job.quantization.quantize:
        raise NirvanaError(
            f"--quantize {','.join(job.quantization.quantize)} runs calibration text in ONNX Runtime, whose "
            "CPU kernels have no bfloat16.",
            hint="Export with --dtype fp16 or fp32, or leave --quantize out.",
        )


def within_context(job: Job, dense: Checkpoint) -> Job:
    """The job with held-out windows no longer than the model's context: their length is no user's choice."""
    if (most := dense.context_tokens) is None:
        return job
    asked = job.calibration
    fitting = replace(
        asked, heldout_len=min(asked.heldout_len, most), selection_len=min(asked.selection_len, most)
    )
    return replace(job, calibration=fitting)


def work_of_job(job: Job, shape: ModelShape) -> Work:
    """What decides how much memory and disk a job's recovery takes."""
    kept = 1 - job.pruning.sparsity
    return work_of(job.recovery, shape, kept=kept, seq_len=job.calibration.seq_len)


def by_curves(job: Job, choices: Choices) -> bool:
    """Whether curves are going to be measured."""
    return any(reads_curves(job.pruning, saliency) for saliency in choices.saliencies)


def say_cost(
    job: Job, choices: Choices, shape: ModelShape, progress: Progress, *, measures_curves: bool = True
) -> None:
    """Say how long curves and refit are going to take."""
    recipe = job.pruning
    tokens = windows_wanted(job.calibration, shape) * job.calibration.seq_len
    operations = job.recovery.recover_steps * refit_operations(shape, tokens) if recipe.reconstruct else 0.0
    measured = measures_curves and by_curves(job, choices)
    if measured:
        operations += curve_operations(shape, tokens)
    if operations:
        takes = format_seconds(operations / operations_per_second())
        work = "Curves and refit" if measures_curves else "The refit"
        quicker = " Quicker: --preset fast." if measured and job.pruning.preset != "fast" else ""
        progress.note(
            f"{work} on {tokens:,} calibration tokens: about {takes} for each candidate at the speed of this "
            f"machine's products.{quicker}"
        )


def untimed(job: Job) -> bool:
    """Whether ONNX Runtime's CPU computes the graphs in another type than theirs."""
    return job.export.dtype == "bf16"


def require_space(job: Job, out: Path, shape: ModelShape, until: Until) -> None:
    """Raise NirvanaError when the disk has no room for what the job writes."""
    later = 2 + job.export.baseline + len(job.quantization.quantize)
    on_the_way = 3 * (job.recovery.recover_steps - 1)
    copies = job.pruning.reconstruct + on_the_way + (1 if until == "checkpoint" else later)
    parameters = shape.linear_parameters + shape.embedding_parameters
    require_free_bytes(out, 4 * copies * parameters, what="The output")


def require_enough_memory(job: Job, choices: Choices, shape: ModelShape, until: Until) -> None:
    """Raise NirvanaError when the memory has no room for what the job holds at once, at the very least.

    That of recovery is asked for with its disk: :func:`require_room_to_recover`.
    """
    if job.pruning.reconstruct or by_curves(job, choices):
        widest = max(max(shape.head_dim * layer.query_heads, layer.ffn_width) for layer in shape.layers)
        require_memory(_EQUATION_BYTES * widest**2, what=f"Fitting the output of {widest:,} inputs")
    if until != "checkpoint":
        kept = 1.0 if job.export.baseline else 1 - job.pruning.sparsity
        parameters = kept * shape.linear_parameters + shape.embedding_parameters
        require_memory(
            _VERIFIED_BYTES * parameters,
            what="Verifying the model, in torch and in ONNX Runtime at once,",
            hint="Stop at the checkpoint, which takes a layer at a time: nirvana-deploy prune. Or leave the "
            "dense model out: --no-baseline.",
        )


def require_room_to_recover(job: Job, out: Path, shape: ModelShape) -> None:
    """Raise NirvanaError when memory or disk have no room for the job's recovery, if it has one."""
    if job.recovery.recover is not None:
        require_room(work_of_job(job, shape), out)


def recorded_options(job: Job, choices: Choices, shape: ModelShape, until: Until) -> dict[str, Any]:
    """The options as the manifest knows them: what concerns the result, with the numbers of defaults."""
    sections = ("pruning", "calibration", "recovery") if until == "checkpoint" else SECTIONS
    options = job.options(sections) | {
        "candidates": choices.candidates,
        "num_sequences": windows_wanted(job.calibration, shape),
        "round_to": width_step(job.pruning, shape),
    }
    if job.pruning.gamma is None:
        options["gamma"] = choices.gammas[0]
    options["eval_text"] = as_recorded(job.calibration.eval_text)
    if not job.quantization.quantize:  # asked for at the first quantization, and the same from then on
        options.pop("quantize_head", None)
    return {"model": job.model} | {_RECORDED_AS.get(key, key): plain(value) for key, value in options.items()}


def as_recorded(eval_text: Sequence[Path]) -> object:
    """Texts as manifests hold them: None, one, or a list, since older folders know one at most."""
    texts = plain(tuple(eval_text))
    return texts if len(eval_text) > 1 else next(iter(texts), None)


def run_beside(out: Path, run: Run) -> Run:
    """The run of a folder beside; raises NirvanaError unless it is of the same model."""
    other = Run.open(out)
    if other.manifest["model"]["files"] != run.manifest["model"]["files"]:
        raise NirvanaError(
            f"{out} cannot serve {run.out}: its model is another.",
            hint="Search into another folder: --out DIR; or name curves of this model.",
        )
    return other


def read_files(job: Job) -> tuple[Path, ...]:
    """The user's files that a job reads."""
    return (
        *local_paths(job.model),
        *files_of(job.calibration.calib),
        *files_of(job.recovery.recover_text),
        *job.calibration.eval_text,
    )


def may_change() -> frozenset[str]:
    """The recorded options that a resumed run may change."""
    names = (field.name for field in all_fields() if field.option.resumable)
    return frozenset(_RECORDED_AS.get(name, name) for name in names)


def measured_anew(changed: Collection[str]) -> tuple[str, ...]:
    """The stages that say something else once the options ``changed`` do, which a resumed run may change."""
    return () if set(names_of(Workload)).isdisjoint(changed) else (BENCHMARK,)
