"""Engines of an output folder, as stages of its run: each variant in the precision and KV form asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nirvana_deploy.base.artifact import claim, unclaim, whole_folder
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.lock import FolderLock
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import disk_errors, require_free_bytes
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.engine.build import BuiltEngine, engines_from_folder
from nirvana_deploy.engine.drop_branch import drop_cache_branch
from nirvana_deploy.engine.from_checkpoint import engines_from_checkpoint
from nirvana_deploy.engine.recipe import EngineBuild, EngineForm, Lengths
from nirvana_deploy.engine.targets import RTX, BuilderOptions
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import (
    CALIBRATION_FILE,
    CHECKPOINT,
    DECODER_FILE,
    ENGINES,
    is_seq2seq,
)
from nirvana_deploy.output.results import EngineResult, EnginesBuilt
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage
from nirvana_deploy.output.variants import DENSE, quantized_variant
from nirvana_deploy.quantize.graph.linears import RECORD_FILE
from nirvana_deploy.quantize.int8.spec import read_record
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.rewriting import QuantizeInputs
from nirvana_deploy.quantize.schemes import scheme_named
from nirvana_deploy.runtime.tensorrt.record import ENGINE_SUFFIX


def engine_name(form: EngineForm, runtime: str) -> str:
    """The variant's own name for the usual engine (RTX, fp16, concat); what differs is added to it."""
    name = f"{form.variant}-{form.quantize}" if form.quantize else form.variant
    for usual, chosen in (("fp16", form.dtype), ("concat", form.kv), (RTX, runtime)):
        name += "" if chosen == usual else f"-{chosen}"
    return name


def builder_options(recipe: EngineBuild) -> BuilderOptions:
    """What the builder is told; raises NirvanaError for an option that the runtime does not have."""
    targets = tuple(filter(None, (part.strip() for part in (recipe.target or "").split(","))))
    return BuilderOptions(
        runtime=recipe.runtime,
        targets=targets if recipe.target else None,
        workspace_bytes=recipe.workspace_bytes,
        weight_streaming=recipe.weight_streaming,
        strip_weights=recipe.strip_weights,
        hardware_compatible=recipe.hardware_compatible,
        version_compatible=recipe.version_compatible,
        timing_cache=recipe.timing_cache,
    )


def build_engine(
    run: Run,
    form: EngineForm,
    *,
    options: BuilderOptions,
    lengths: Lengths | None = None,
    name: str | None = None,
) -> Stage:
    """Build the engine of a model of the run into its folder ``engine``; two files for an encoder-decoder.

    An int8 engine takes the decisions of ``onnx-int8``, a w4 or w8 engine those of ``onnx-w4`` or ``onnx-w8``
    where it is there (block size, rounding), and the run's own calibration windows where the rounding needs
    them. :func:`engine_files` names what was built.
    """
    dense = form.variant == DENSE
    checkpoint = run.dense if dense else run.out / CHECKPOINT
    if not checkpoint.is_dir():
        raise NirvanaError(
            f"The checkpoint of {form.variant} is not at {checkpoint}.",
            hint="Make it again: repeat the prune-export command with --resume.",
        )
    name = name or engine_name(form, options.runtime)

    def work() -> EnginesBuilt:
        engines = engines_from_checkpoint(
            Checkpoint.open(checkpoint),
            run.out / ENGINES,
            name=name,
            dtype=form.dtype,
            kv=form.kv,
            quantize=_quantize_inputs(run, form),
            lengths=lengths,
            options=options,
            progress=run.progress,
        )
        return EnginesBuilt(tuple(_result(engine) for engine in engines))

    files = [f"{ENGINES}/{file}" for file in _files_of(name)]
    quantized = (quantized_variant(form.quantize, of=form.variant).stage,) if form.quantize else ()
    needs = (stage.SELECT, stage.CALIBRATE, *quantized) if dense else (stage.CHECKPOINT, *quantized)
    return Stage(
        stage.engine(name), needs=needs, makes=(*files, f"{ENGINES}/{name}-onnx"), work=work, of=name
    )


def _files_of(name: str) -> list[str]:
    """What a build of ``name`` may write: of one engine, or of an encoder-decoder's two."""
    names = [name, f"{name}-encoder", f"{name}-decoder"]
    return [f"{one}{end}" for one in names for end in (ENGINE_SUFFIX, ".json", ".log", ".failed.log")]


def engine_files(run: Run, name: str) -> tuple[Path, ...]:
    """The engine files that the stage of ``name`` built: two of an encoder-decoder."""
    engines = run.result(stage.engine(name), EnginesBuilt).engines
    return tuple(run.out / ENGINES / f"{engine.name}{ENGINE_SUFFIX}" for engine in engines)


def engines_from_onnx_folder(
    folder: Path,
    out: Path,
    *,
    name: str | None = None,
    lengths: Lengths | None = None,
    options: BuilderOptions | None = None,
    progress: Progress = SILENT,
) -> tuple[Path, ...]:
    """Build an ONNX folder: a decoder's ``model.onnx`` as it is, or the two graphs of an encoder-decoder.

    Those are built from a copy beside the engines, ``name``-onnx, where the decoder has lost the input that
    no engine can have (``engine/drop_branch.py``).
    """
    name = name or folder.name
    new = not out.exists()
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with FolderLock(out), _claimed(out, _files_of(name)):
            if is_seq2seq(folder):
                folder = _for_engines(folder, out / f"{name}-onnx")
            built = engines_from_folder(
                folder, out, name=name, lengths=lengths, options=options, progress=progress
            )
    finally:
        if new:
            with suppress(OSError):  # it holds something
                out.rmdir()
    return tuple(engine.path for engine in built)


@contextmanager
def _claimed(out: Path, names: list[str]) -> Iterator[None]:
    """Mark ``names`` as ours; when the block fails, those alone that it has written."""
    claim(out, names)
    try:
        yield
    except BaseException:
        unclaim(out)
        raise


def _for_engines(folder: Path, copy: Path) -> Path:
    """Copy an encoder-decoder's ONNX folder, its decoder rewritten; returns ``copy``."""
    files = [path for path in folder.iterdir() if path.is_file()]
    require_free_bytes(copy.parent, sum(path.stat().st_size for path in files), what="The ONNX folder")
    with whole_folder(copy) as partial:
        for path in files:
            shutil.copyfile(path, partial / path.name)
        drop_cache_branch(partial / DECODER_FILE)
    return copy


def _quantize_inputs(run: Run, form: EngineForm) -> QuantizeInputs | None:
    """As the quantized ONNX folder of the variant was decided; by default where there is none."""
    if form.quantize is None:
        return None
    scheme, dense = scheme_named(form.quantize), form.variant == DENSE
    folder = run.out / quantized_variant(scheme.name, of=form.variant).folder
    record = read_record(folder) if (folder / RECORD_FILE).is_file() else None
    if record is None and scheme.engine_applies_decision:
        source, calib = (folder.with_name("onnx"), " --calib TEXT") if dense else (run.out, "")
        raise NirvanaError(
            f"An {scheme.name} engine takes the ranges of its activations from {folder}, which is not there.",
            hint=f"nirvana-deploy quantize {source} --scheme {scheme.name}{calib}"
            + (f" --out {folder}" if dense else ""),
        )
    if record is None or "weights" not in record:
        return QuantizeInputs(Quantization(scheme=scheme.name), decided=record)
    weights, windows = record["weights"], run.out / CALIBRATION_FILE
    calibrated = weights["rounding"] == "gptq" and windows.is_file()
    return QuantizeInputs(
        Quantization(
            scheme=scheme.name, block_size=weights["block_size"] or 32, rounding=weights["rounding"]
        ),
        calibration=read_windows(windows)["calibration"] if calibrated else None,
    )


def _result(engine: BuiltEngine) -> EngineResult:
    record = engine.record
    return EngineResult(
        name=record.name,
        dtype=record.dtype,
        quantization=record.quantization,
        kv=record.kv,
        runtime=f"{record.runtime} {record.runtime_version}",
        targets=tuple(record.targets),
        engine_bytes=record.engine_bytes,
        weights_bytes=record.weights_bytes,
        fused_attentions=record.layers.get("ATTENTION", 0),
        build_seconds=record.build.seconds,
        compared_constants=len(engine.check.compared_values),
    )
