"""Build an engine from an ONNX folder: parse, check, build into a stream, describe.

``tensorrt-rtx`` builds on a machine without a GPU. Building takes about twice the weights in memory; the
engine is written in blocks of 64 MB. ``tensorrt`` shares the code and builds for the GPU of its machine; it
has not been run. What decides size and cost of an engine: benchmarks/NOTES.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nirvana_deploy import __version__
from nirvana_deploy.base.artifact import sha256_of, whole_file, write_bytes, write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import cpu_seconds, peak_rss_bytes, reset_peak_rss, system_cpu_seconds
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import require_free_bytes, require_memory
from nirvana_deploy.engine.network import NetworkCheck, NetworkFacts, check_network, read_network
from nirvana_deploy.engine.precision import (
    MISSING_KERNEL,
    allow_decomposition,
    attention_without_kernel,
    notes_on_attention,
)
from nirvana_deploy.engine.profile import Profile, notes_on_rows, profiles_for, shapes_of
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.source import OnnxSource, OnnxTensor, read_source, require_parsable
from nirvana_deploy.engine.targets import RTX, BuilderOptions, configure
from nirvana_deploy.engine.trtexec import trtexec_command
from nirvana_deploy.engine.vendor import (
    PROGRESS_STEPS,
    BuilderLog,
    make_logger,
    make_monitor,
    make_writer,
    require_builder,
)
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import WeightSource
from nirvana_deploy.output.layout import DECODER_FILE, ENCODER_FILE, MODEL_FILE, is_seq2seq
from nirvana_deploy.runtime.tensorrt.interrupts import kept_interrupts, late_interrupts
from nirvana_deploy.runtime.tensorrt.loading import tensorrt_module
from nirvana_deploy.runtime.tensorrt.record import (
    ENGINE_SUFFIX,
    BuildCost,
    EngineRecord,
    LogDigest,
    ProfileRecord,
    TensorRecord,
    record_path,
)

_LESS_TO_BUILD = "End other programs, or store the weights in fewer bits: --quantize w8 or w4."
_SPARE_BYTES = 64_000_000  # for the programs and the log


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk."""

    path: Path
    record: EngineRecord
    check: NetworkCheck


def engine_from_onnx(
    folder: Path,
    out: Path,
    *,
    name: str = "model",
    file: str = MODEL_FILE,
    lengths: Lengths | None = None,
    shape: ModelShape | None = None,
    checkpoint: WeightSource | None = None,
    progress: Progress = SILENT,
    options: BuilderOptions | None = None,
) -> BuiltEngine:
    """Build ``folder``/``file`` into ``out``/``name``.engine, with its log and, last, its JSON record.

    ``lengths`` gives the profiles' sizes. ``shape`` and ``checkpoint`` are those that the graph was exported
    from: with them the parsed network is compared with the model too. ``options`` are the builder's: the
    runtime (``tensorrt-rtx``, when None), targets, workspace, weight streaming and the like.

    Raises NirvanaError for what the builder would refuse (contrib operators, profiles that the graph cannot
    take, an option that the runtime does not have), for a failed build with the builder's reason, and for a
    full disk; MissingExtraError without the package; VerificationError when the parsed network is not the
    one that was exported. Nothing that looks like an engine is left behind then.
    """
    options = options or BuilderOptions(RTX)
    source = read_source(folder / file)
    require_parsable(source)
    profiles = profiles_for(source, lengths or Lengths())
    trt = tensorrt_module(options.runtime)
    require_builder(options.runtime, trt.__version__)
    require_free_bytes(out, source.bytes_on_disk + _SPARE_BYTES, what="The engine")
    require_memory(2 * source.bytes_on_disk, what=f"Building {name}{ENGINE_SUFFIX}", hint=_LESS_TO_BUILD)
    log = BuilderLog()
    job = _Job(trt, source, profiles, options, log, out / f"{name}{ENGINE_SUFFIX}")
    record_path(job.engine).unlink(missing_ok=True)  # from here on the old engine is not whole
    try:
        facts, check, notes, cost = job.run(shape, checkpoint, progress)
    except NirvanaError:
        write_bytes(out / f"{name}.failed.log", log.text().encode())
        raise
    (out / f"{name}.failed.log").unlink(missing_ok=True)
    record = job.record(name, "encoder" if file == ENCODER_FILE else "decoder", facts, notes, cost)
    write_json(record_path(job.engine), record.to_json())
    return BuiltEngine(job.engine, record, check)


def engines_from_folder(
    folder: Path,
    out: Path,
    *,
    name: str,
    lengths: Lengths | None = None,
    shape: ModelShape | None = None,
    checkpoint: WeightSource | None = None,
    options: BuilderOptions | None = None,
    progress: Progress = SILENT,
) -> tuple[BuiltEngine, ...]:
    """Build every graph of ``folder``: ``name``, or ``name``-encoder and ``name``-decoder.

    Arguments as in :func:`engine_from_onnx`; ``shape`` is that of a decoder-only model.
    """
    files = {MODEL_FILE: name}
    if is_seq2seq(folder):
        files = {ENCODER_FILE: f"{name}-encoder", DECODER_FILE: f"{name}-decoder"}
    return tuple(
        engine_from_onnx(
            folder,
            out,
            name=of_file,
            file=file,
            lengths=lengths,
            shape=shape,
            checkpoint=checkpoint,
            options=options,
            progress=progress,
        )
        for file, of_file in files.items()
    )


@dataclass(frozen=True)
class _Job:
    """One build, and what it is made of."""

    trt: Any
    source: OnnxSource
    profiles: tuple[Profile, ...]
    options: BuilderOptions
    log: BuilderLog
    engine: Path

    def run(
        self, shape: ModelShape | None, checkpoint: WeightSource | None, progress: Progress
    ) -> tuple[NetworkFacts, NetworkCheck, list[str], BuildCost]:
        """Parse, check and build; the engine file is written."""
        trt, started = self.trt, time.perf_counter()
        cpu_started, system_started = cpu_seconds(), system_cpu_seconds()
        reset_peak_rss()
        logger = make_logger(trt, self.log)
        builder = trt.Builder(logger)
        network = builder.create_network(_strongly_typed(trt))
        parser = trt.OnnxParser(network, logger)
        with late_interrupts():
            parsed = parser.parse_from_file(str(self.source.path))
        if not parsed:
            raise self.failure("does not parse")
        parse_seconds = time.perf_counter() - started
        facts = read_network(trt, network)
        check = check_network(facts, self.source, shape=shape, checkpoint=checkpoint)
        reasons = attention_without_kernel(self.source, facts.attention, self.profiles)
        allow_decomposition(trt, network, list(reasons))
        notes = notes_on_attention(self.source, reasons, len(facts.attention))
        config = configure(trt, builder, self.options)
        for profile in self.shapes():
            _add_profile(builder, config, profile)
        if not self.write(builder, network, config, progress):
            if not self.log.mentions(MISSING_KERNEL):
                raise self.failure("cannot be built")
            allow_decomposition(trt, network, None)
            notes.append(
                "Every attention may be decomposed: a fused kernel was missing where one was expected."
            )
            if not self.write(builder, network, config, progress):
                raise self.failure("cannot be built")
        if self.options.timing_cache is not None:
            write_bytes(self.options.timing_cache, bytes(config.get_timing_cache().serialize()))
        cost = BuildCost(
            seconds=round(time.perf_counter() - started, 3),
            cpu_seconds=round(cpu_seconds() - cpu_started, 3),
            peak_rss_bytes=peak_rss_bytes(),
            parse_seconds=round(parse_seconds, 3),
            system_seconds=round(system_cpu_seconds() - system_started, 3),
        )
        return facts, check, notes, cost

    def write(self, builder: Any, network: Any, config: Any, progress: Progress) -> bool:
        """Build into the engine file, which appears whole; False when the builder failed."""
        errors: list[BaseException] = []
        try:
            with (
                progress.task(f"Building {self.engine.name}", PROGRESS_STEPS) as advance,
                whole_file(self.engine) as partial,
                partial.open("wb") as file,
            ):
                config.progress_monitor = make_monitor(self.trt, advance, errors)
                writer = make_writer(self.trt, file, errors)
                with kept_interrupts(errors.append):
                    built = builder.build_serialized_network_to_stream(network, config, writer)
                if errors:
                    raise errors[0]
                if not built:
                    raise _BuildError
        except _BuildError:
            return False
        return True

    def shapes(self) -> tuple[ProfileRecord, ...]:
        """The profiles as shapes of inputs."""
        return tuple(shapes_of(self.source, profile) for profile in self.profiles)

    def failure(self, what: str) -> NirvanaError:
        """The builder's reason as one of ours, with the next command."""
        reason = self.log.reason()
        kept = f"The builder's log: {self.engine.with_suffix('.failed.log')}"
        hint = next((text for sign, text in _REMEDIES if sign in reason), kept)
        return NirvanaError(f"{self.source.path} {what} with {self.options.runtime}: {reason}.", hint=hint)

    def record(
        self, name: str, part: str, facts: NetworkFacts, notes: list[str], cost: BuildCost
    ) -> EngineRecord:
        """Describe the finished engine; writes its log."""
        options, profiles = self.options, self.shapes()
        engine_bytes = self.engine.stat().st_size
        notes = [*notes, *notes_on_rows(profiles, facts.weights_bytes, engine_bytes)]
        log_file = self.engine.with_suffix(".log")
        onnx = Path(self.source.path.parent.name, self.source.path.name)  # records travel, the path doesn't
        write_bytes(log_file, self.log.text().encode())
        return EngineRecord(
            name=name,
            part=part,
            runtime=options.runtime,
            runtime_version=self.trt.__version__,
            targets=options.resolved_targets(),
            dtype=self.source.dtype,
            quantization=self.source.quantization,
            kv=self.source.kv,
            inputs=tuple(_tensor_record(one) for one in self.source.inputs),
            outputs=tuple(_with_alias(_tensor_record(one), self.source) for one in self.source.outputs),
            profiles=profiles,
            layers=facts.layers,
            weights_bytes=facts.weights_bytes,
            engine_file=self.engine.name,
            engine_bytes=engine_bytes,
            engine_sha256=sha256_of(self.engine),
            onnx_sha256=self.source.sha256(),
            weight_streaming=options.weight_streaming,
            stripped=options.strip_weights,
            workspace_bytes=options.workspace_bytes,
            build=cost,
            log=LogDigest(
                file=log_file.name,
                sha256=sha256_of(log_file),
                lines=len(self.log.lines),
                warnings=self.log.warnings(),
            ),
            versions={
                options.runtime: self.trt.__version__,
                "onnx": version("onnx"),
                "nirvana-deploy": __version__,
            },
            trtexec=trtexec_command(onnx, self.engine.name, options, profiles=profiles),
            notes=tuple(notes),
        )


class _BuildError(Exception):
    """The builder said no; why is in its log."""


_REMEDIES = (
    ("HW-specific datatypes: fp8", "fp8 needs Ada or newer: --target sm89,sm120"),
    ("workspace limit", "Pass a larger --workspace, or none."),
    ("CUDA_SUCCESS", "Engines without weights need a GPU to be built; build with the weights here."),
)


def _strongly_typed(trt: Any) -> int:
    """Always: needed by 10.x, a no-op in 11, where nothing else is left."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _add_profile(builder: Any, config: Any, shapes: ProfileRecord) -> None:
    profile = builder.create_optimization_profile()
    for name, ends in shapes.shapes.items():
        profile.set_shape(name, *ends)
    if config.add_optimization_profile(profile) < 0:
        raise NirvanaError(f"The builder refuses the profile {shapes.name!r}: {dict(shapes.shapes)}.")


def _tensor_record(one: OnnxTensor) -> TensorRecord:
    return TensorRecord(one.name, one.dtype, tuple(d if isinstance(d, int) else None for d in one.dimensions))


def _with_alias(record: TensorRecord, source: OnnxSource) -> TensorRecord:
    """An output of an in-place cache with the input that it shares its memory with."""
    if source.kv != "in-place" or not record.name.startswith("present."):
        return record
    return replace(record, alias="past_key_values." + record.name.removeprefix("present."))
