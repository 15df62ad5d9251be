"""From an engine file and its record to an engine that TensorRT will run, or the reason why not.

What can be said without a GPU is said first: a file that is not the one its record describes, a package
that is missing, a version that cannot read it. Then the GPU is opened and compared with the targets, and
only then TensorRT reads the file; its own words are kept for the message.
"""

from __future__ import annotations

import importlib
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError, pip_install
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.runtime.table import engine_runtimes
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice
from nirvana_deploy.runtime.tensorrt.interrupts import late_interrupts
from nirvana_deploy.runtime.tensorrt.record import EngineRecord

_NATIVE = "native"
"""The target of an engine that was built for the GPU of the building machine."""


def tensorrt_module(runtime: str) -> Any:
    """The Python module of ``tensorrt`` or ``tensorrt-rtx``; raises MissingExtraError without it."""
    row = look_up(runtime, engine_runtimes(), what="engine")
    try:
        return importlib.import_module(row.module)
    except ModuleNotFoundError as error:
        if error.name != row.module:
            raise
        raise MissingExtraError(
            f"An engine of {runtime}", package=runtime, extra=row.extra or runtime
        ) from None


def version_compatible(record: EngineRecord) -> bool:
    """Whether an engine may be read by later versions than its own."""
    return "--versionCompatible" in record.trtexec.split()


def require_version(record: EngineRecord, installed: str) -> None:
    """Refuse an engine that the installed version cannot read.

    TensorRT reads engines of its own version, unless they were built to be version compatible; TensorRT-RTX
    those of its own major and minor version.
    """
    if version_compatible(record):
        return
    parts = 2 if record.runtime == "tensorrt-rtx" else 3
    built, found = (version.split(".")[:parts] for version in (record.runtime_version, installed))
    if built != found:
        package = "tensorrt-rtx-cu12" if record.runtime == "tensorrt-rtx" else "tensorrt"
        raise NirvanaError(
            f"{record.engine_file} was built by {record.runtime} {record.runtime_version}; "
            f"{installed} is installed, and an engine is read by {'.'.join(built)} alone.",
            hint=f"Build it again, or: {pip_install()} '{package}=={record.runtime_version}'",
        )


def require_target(record: EngineRecord, device: CudaDevice) -> None:
    """Refuse a GPU that the engine was not built for; ``native`` engines are left to TensorRT's own check."""
    if record.targets != (_NATIVE,) and device.compute_capability not in record.targets:
        raise NirvanaError(
            f"{record.engine_file} was built for {', '.join(record.targets)}; "
            f"this machine's {device.name} is {device.compute_capability}.",
            hint=f"nirvana-deploy build-engine DIR --engine {record.runtime} "
            f"--target {device.compute_capability} --force",
        )


def require_weights(record: EngineRecord) -> None:
    """Refuse an engine that was stripped of its weights."""
    if record.stripped:
        raise NirvanaError(
            f"{record.engine_file} holds no weights: it was built stripped, to be refitted before use.",
            hint="Build it with its weights: nirvana-deploy build-engine DIR --force",
        )


@dataclass(frozen=True)
class LoadedEngine:
    """An engine on a device, and what keeps it alive."""

    module: Any
    """``tensorrt`` or ``tensorrt_rtx``."""
    runtime: Any
    engine: Any
    """ICudaEngine."""
    log: RuntimeLog


class RuntimeLog:
    """What TensorRT said: its errors, for messages."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def reason(self) -> str:
        """The first error that was not told yet; forgets all."""
        first = self.errors[0] if self.errors else "it gives no reason"
        self.errors.clear()
        return first.strip().rstrip(".")


def load_engine(path: Path, record: EngineRecord, *, module: Any, device: CudaDevice) -> LoadedEngine:
    """Let TensorRT read ``path``; raises NirvanaError with its words where it does not.

    ``record`` must be the one of ``path`` and ``device`` current; both are checked by the caller.
    """
    log = RuntimeLog()
    runtime = module.Runtime(_logger(module, log))
    if version_compatible(record):
        runtime.engine_host_code_allowed = True  # such an engine brings its own runtime along
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob,
        late_interrupts(),
    ):
        engine = runtime.deserialize_cuda_engine(blob)
    if engine is None:
        raise NirvanaError(
            f"{record.runtime} {module.__version__} does not read {path} on {device.name}: {log.reason()}.",
            hint="Build it again on this machine: nirvana-deploy build-engine DIR --force",
        )
    _require_as_recorded(engine, record, module)
    if record.weight_streaming:  # before contexts: what stays on the host decides their scratch memory
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return LoadedEngine(module=module, runtime=runtime, engine=engine, log=log)


def _logger(module: Any, log: RuntimeLog) -> Any:
    """A TensorRT logger that keeps errors and prints nothing."""
    serious = (module.ILogger.Severity.INTERNAL_ERROR, module.ILogger.Severity.ERROR)

    class Logger(module.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in serious:
                log.errors.append(message)

    return Logger()


def _require_as_recorded(engine: Any, record: EngineRecord, module: Any) -> None:
    """Compare the engine's own I/O, profiles and aliases with the record, which all planning rests on."""
    found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    wanted = {tensor.name for tensor in (*record.inputs, *record.outputs)}
    if found != wanted:
        _disagree(record, f"tensors {sorted(found ^ wanted)[:4]}")
    if engine.num_optimization_profiles != len(record.profiles):
        _disagree(record, f"{engine.num_optimization_profiles} profiles, not {len(record.profiles)}")
    for index, profile in enumerate(record.profiles):
        for name, shapes in profile.shapes.items():
            own = tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
            if own != tuple(tuple(shape) for shape in shapes):
                _disagree(record, f"profile {profile.name!r} of {name}: {own}")
    for output in record.outputs:
        if output.alias is not None and engine.get_aliased_input_tensor(output.name) != output.alias:
            _disagree(record, f"{output.name} does not share the memory of {output.alias}")
    for name in wanted:
        if engine.get_tensor_location(name) != module.TensorLocation.DEVICE:
            _disagree(record, f"{name} is expected on the host")


def _disagree(record: EngineRecord, what: str) -> None:
    raise NirvanaError(
        f"{record.engine_file} is not what its record says: {what}.",
        hint="Build it again: nirvana-deploy build-engine DIR --force",
    )
