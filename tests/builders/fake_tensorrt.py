"""TensorRT without a GPU: an engine is a small file that names an ONNX folder, and runs it in ONNX Runtime.

It computes on the memory of a :class:`FakeDriver`, from the addresses it was given, when the stream gets
there; so the logits of a runner on it are right only if the runner's shapes, addresses, copies and order
are. It refuses what TensorRT refuses (shapes outside the profile, missing addresses, a cache output that
does not share its input's memory, outputs over inputs, work that would allocate during a capture), and
fills its scratch memory with junk in every pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from builders.fake_cuda import FakeDriver
from nirvana_deploy.base.artifact import sha256_of, write_json
from nirvana_deploy.runtime.tensorrt.record import (
    BuildCost,
    EngineRecord,
    LogDigest,
    ProfileRecord,
    TensorRecord,
    record_path,
)

MAGIC = "fake engine"
PASS_MS = 2.0
"""Device time of one pass."""
SCRATCH_BYTES = (4096, 2048, 1024)
"""Of profile 0, 1, ..."""
WEIGHTS_BYTES = 100_000

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]


class _Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class _Logger:
    Severity = _Severity

    def __init__(self) -> None:
        pass


class _Strategy(IntEnum):
    STATIC = 0
    USER_MANAGED = 2


class _Specialization(IntEnum):
    LAZY = 0
    EAGER = 1


class _Location(IntEnum):
    DEVICE = 0
    HOST = 1


def fake_module(driver: FakeDriver, *, runtime: str = "tensorrt-rtx", version: str = "1.7.1.116") -> Any:
    """What stands in for ``tensorrt`` or ``tensorrt_rtx``; its engines live on ``driver``'s device.

    ``passes`` of the result holds one list a context made: "run" or "captured" for every pass queued.
    """
    module = SimpleNamespace(
        __name__=runtime.replace("-", "_"),
        __version__=version,
        ILogger=_Logger,
        ExecutionContextAllocationStrategy=_Strategy,
        DynamicShapesKernelSpecializationStrategy=_Specialization,
        TensorLocation=_Location,
        passes=[],
        compilations=0,
    )
    module.Runtime = lambda logger: FakeRuntime(logger, driver=driver, module=module)
    return module


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, cache: Path) -> FakeDriver:
    """Make runners open a fake driver and a fake ``tensorrt``, with their kernel cache in ``cache``."""
    driver = FakeDriver()
    module = fake_module(driver)
    monkeypatch.setenv("NIRVANA_DEPLOY_CACHE", str(cache))
    monkeypatch.setattr("nirvana_deploy.runtime.tensorrt.cuda.load_driver", lambda: driver)
    for runner in ("decoder", "encoder_decoder"):
        name = f"nirvana_deploy.runtime.tensorrt.{runner}.tensorrt_module"
        monkeypatch.setattr(name, lambda runtime: module)
    return driver


class FakeRuntime:
    """IRuntime."""

    def __init__(self, logger: Any, *, driver: FakeDriver, module: Any) -> None:
        self._logger, self._driver, self._module = logger, driver, module

    def deserialize_cuda_engine(self, serialized_engine: Any) -> FakeEngine | None:
        try:
            content = json.loads(bytes(serialized_engine))
            assert content["magic"] == MAGIC
        except (ValueError, KeyError, AssertionError):
            self._logger.log(_Severity.WARNING, "Something that does not matter.")
            self._logger.log(_Severity.ERROR, "header.magicTag == kEXPECTED_MAGIC_TAG failed.")
            return None
        return FakeEngine(content, driver=self._driver, logger=self._logger, module=self._module)


class FakeEngine:
    """ICudaEngine."""

    def __init__(self, content: Any, *, driver: FakeDriver, logger: Any, module: Any) -> None:
        self.driver, self.logger, self.module = driver, logger, module
        self.in_place: bool = content["in_place"]
        self.profiles: list[Profile] = content["profiles"]
        self.capturable: bool = content["capturable"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(content["onnx"], options)
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.num_optimization_profiles = len(self.profiles)
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.compiled: set[str] = set()
        """Shapes that kernels were compiled for; ``module.compilations`` counts what was not cached."""
        driver.used_bytes += WEIGHTS_BYTES

    def __del__(self) -> None:
        self.driver.used_bytes -= WEIGHTS_BYTES

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_location(self, name: str) -> _Location:
        return _Location.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return [list(shape) for shape in self.profiles[profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        aliased = self.in_place and name.startswith("present.")
        return name.replace("present.", "past_key_values.") if aliased else None

    weight_streaming_budget_v2 = WEIGHTS_BYTES

    def get_weight_streaming_automatic_budget(self) -> int:
        return WEIGHTS_BYTES // 2

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return SCRATCH_BYTES[profile_index]

    def create_runtime_config(self) -> FakeRuntimeConfig:
        assert self.module.__name__ == "tensorrt_rtx"
        return FakeRuntimeConfig(self)

    def create_execution_context(self, how: Any) -> FakeContext:
        if self.module.__name__ == "tensorrt_rtx":
            assert how.dynamic_shapes_kernel_specialization_strategy == _Specialization.EAGER
            how = how.memory
        assert how == _Strategy.USER_MANAGED
        context = FakeContext(self)
        if self.module.__name__ == "tensorrt_rtx":
            context.is_stream_capturable = lambda stream: self.capturable
        return context


class FakeRuntimeConfig:
    """IRuntimeConfig."""

    dynamic_shapes_kernel_specialization_strategy = _Specialization.LAZY
    memory: _Strategy | None = None
    cache: FakeRuntimeCache | None = None

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def set_execution_context_allocation_strategy(self, strategy: _Strategy) -> None:
        self.memory = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache(self._engine)

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> None:
        self.cache = cache


class FakeRuntimeCache:
    """IRuntimeCache: the shapes that were compiled, as text."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def serialize(self) -> bytes:
        return json.dumps(sorted(self._engine.compiled)).encode()

    def deserialize(self, blob: bytes) -> bool:
        self._engine.compiled |= set(json.loads(blob))
        return True


class FakeContext:
    """IExecutionContext."""

    is_stream_capturable: Callable[[int], bool]

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self._driver = engine, engine.driver
        self.profile: int | None = None
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.passes: list[str] = []
        engine.module.passes.append(self.passes)
        self._settled = False  # one run since the last change: no deferred work left
        self._captured = False

    def set_device_memory(self, memory: int, size: int) -> None:
        self.scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return 0 <= profile_index < len(self._engine.profiles)

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self._change()
        assert self.profile is not None, "a profile comes before shapes"
        low, _, high = self._engine.profiles[self.profile][name]
        if any(not a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return self._refuse(f"{name}: {shape} is outside [{low}, {high}] of profile {self.profile}")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._change()
        self.addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        missing = (self._engine.inputs.keys() | self._engine.outputs.keys()) - self.addresses.keys()
        if missing or self._engine.inputs.keys() - self.shapes.keys():
            return self._refuse(f"not bound: {sorted(missing)}")
        assert self.profile is not None
        if self.scratch[1] < SCRATCH_BYTES[self.profile] or not self._driver.holds(*self.scratch):
            return self._refuse("too little device memory")
        if self._driver.capturing and not self._settled:
            self._driver.capture_is_invalid = True
            return self._refuse("deferred work of the first run cannot be captured")
        if self._engine.in_place:
            for name, address in self.addresses.items():
                alias = self._engine.get_aliased_input_tensor(name)
                if alias is not None and self.addresses[alias] != address:
                    return self._refuse(f"{name} must have the address of {alias}")
        shape = str(self.shapes["input_ids"])
        if shape not in self._engine.compiled:
            self._engine.module.compilations += 1
            self._engine.compiled.add(shape)
        self.passes.append("captured" if self._driver.capturing else "run")
        self._captured = self._captured or self._driver.capturing
        self._settled = True
        shapes, addresses, scratch = dict(self.shapes), dict(self.addresses), self.scratch
        self._driver.queue(lambda: self._compute(shapes, addresses, scratch), ms=PASS_MS)
        return True

    def _compute(self, shapes: dict[str, Shape], addresses: dict[str, int], scratch: tuple[int, int]) -> None:
        self._driver.write(scratch[0], b"\xab" * scratch[1])
        feeds, taken = {}, []
        for name, node in self._engine.inputs.items():
            array = np.zeros(shapes[name], dtype=_DTYPES[node.type])
            data = self._driver.read(addresses[name], array.nbytes)
            feeds[name] = np.frombuffer(data, dtype=array.dtype).reshape(shapes[name])
            taken.append((name, addresses[name], array.nbytes))
        results: list[NDArray[Any]] = self._engine.session.run(list(self._engine.outputs), feeds)
        for name, result in zip(self._engine.outputs, results, strict=True):
            alias = self._engine.get_aliased_input_tensor(name)
            for other, address, size_bytes in taken:
                overlaps = (
                    address < addresses[name] + result.nbytes and addresses[name] < address + size_bytes
                )
                assert not overlaps or other == alias, f"{name} is written over {other}"
            self._driver.write(addresses[name], np.ascontiguousarray(result).tobytes())

    def _change(self) -> None:
        assert not self._captured, "a context changes from which a graph was captured"
        self._settled = False

    def _refuse(self, why: str) -> bool:
        self._engine.logger.log(_Severity.ERROR, f"IExecutionContext: Error Code 3: {why}")
        return False


_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
_NAMES = {kind: np.dtype(dtype).name for kind, dtype in _DTYPES.items()}


def decoder_profiles(
    onnx_folder: Path, *, batch_size: int, step_tokens: int, total_tokens: int
) -> list[ProfileRecord]:
    """A prefill profile (1 to ``step_tokens`` new ones, any past) and a decode profile (1 new one)."""
    model = onnx.load(onnx_folder / "model.onnx", load_external_data=False)
    return [
        ProfileRecord(name=name, shapes=_profile(model, batch_size, new, total_tokens))
        for name, new in (("prefill", step_tokens), ("decode", 1))
    ]


def _profile(model: Any, batch_size: int, new_tokens: int, total_tokens: int) -> Profile:
    most = {
        "input_ids": (batch_size, new_tokens),
        "position_ids": (batch_size, new_tokens),
        "attention_mask": (batch_size, total_tokens),
        "write_indices": (batch_size,),
    }
    shapes: Profile = {}
    for value in model.graph.input:
        if value.name in most:
            high = most[value.name]
            shapes[value.name] = ((1,) * len(high), high, high)
            continue
        _, heads, slots, dim = (d.dim_value for d in value.type.tensor_type.shape.dim)
        low, high = (slots, slots) if slots else (0, total_tokens - 1)
        shapes[value.name] = (
            (1, heads, low, dim),
            (batch_size, heads, high, dim),
            (batch_size, heads, high, dim),
        )
    return shapes


def write_fake_engine(
    path: Path,
    onnx_folder: Path,
    *,
    profiles: list[ProfileRecord],
    runtime: str = "tensorrt-rtx",
    version: str = "1.7.1.116",
    targets: tuple[str, ...] = ("sm86", "sm89"),
    capturable: bool = True,
    stripped: bool = False,
    file: str = "model.onnx",
    part: str = "decoder",
) -> Path:
    """Write an engine file that :func:`fake_module` deserializes, and the record beside it."""
    session = onnxruntime.InferenceSession(onnx_folder / file)
    in_place = "write_indices" in {node.name for node in session.get_inputs()}
    path.write_text(
        json.dumps(
            {
                "magic": MAGIC,
                "onnx": str(onnx_folder / file),
                "in_place": in_place,
                "profiles": [profile.shapes for profile in profiles],
                "capturable": capturable,
            }
        )
    )

    def tensor(node: Any, *, output: bool) -> TensorRecord:
        shape = tuple(size if isinstance(size, int) else None for size in node.shape)
        aliased = output and in_place and node.name.startswith("present.")
        alias = node.name.replace("present.", "past_key_values.") if aliased else None
        return TensorRecord(name=node.name, dtype=_NAMES[node.type], shape=shape, alias=alias)

    record = EngineRecord(
        name=path.stem,
        part=part,
        runtime=runtime,
        runtime_version=version,
        targets=targets,
        dtype="fp32",
        quantization=None,
        kv="in-place" if in_place else "none" if part == "encoder" else "concat",
        inputs=tuple(tensor(node, output=False) for node in session.get_inputs()),
        outputs=tuple(tensor(node, output=True) for node in session.get_outputs()),
        profiles=tuple(profiles),
        layers={},
        weights_bytes=WEIGHTS_BYTES,
        engine_file=path.name,
        engine_bytes=path.stat().st_size,
        engine_sha256=sha256_of(path),
        onnx_sha256={},
        weight_streaming=False,
        stripped=stripped,
        workspace_bytes=None,
        build=BuildCost(seconds=0.0, cpu_seconds=0.0, peak_rss_bytes=0, parse_seconds=0.0),
        log=LogDigest(file="none", sha256="", lines=0, warnings=()),
        versions={},
        trtexec="",
        notes=(),
    )
    write_json(record_path(path), record.to_json())
    return path
