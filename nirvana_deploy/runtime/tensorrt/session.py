"""One engine on a device: its token inputs, a context for each profile, the time of each pass.

What a decoder's engine and the two of an encoder-decoder have in common; what they remember between passes,
and where results go, is their runners' affair.

An execution context holds shapes, so each profile has one of its own, and each batch size of a captured
pass too: what a graph was captured from must not change. They share one scratch buffer, which is safe
because all of them run on one stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.runtime.tensorrt.context import Context
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice, CudaError, DeviceBuffer
from nirvana_deploy.runtime.tensorrt.kernel_cache import KernelCache
from nirvana_deploy.runtime.tensorrt.kv_cache import Shape, first_misfit
from nirvana_deploy.runtime.tensorrt.loading import LoadedEngine, load_engine
from nirvana_deploy.runtime.tensorrt.memory import ITEM_BYTES
from nirvana_deploy.runtime.tensorrt.record import EngineRecord


class Session:
    """The engine ``path`` on ``device``, which the caller has compared with ``record``.

    ``inputs_bytes`` are the inputs that come from the host, with the most that each may take;
    ``result_bytes`` is the size of page-locked memory for results, larger ones take other memory. ``hint``
    says what to lower where the device has no room. ``kernels`` keeps what TensorRT-RTX compiles.
    """

    graph_refused: str | None = None
    """Why passes are not repeated as a CUDA graph, where that was tried and refused."""

    def __init__(
        self,
        path: Path,
        record: EngineRecord,
        *,
        module: Any,
        device: CudaDevice,
        inputs_bytes: Mapping[str, int],
        result_bytes: int = 0,
        kernels: KernelCache | None,
        hint: str,
    ) -> None:
        self._record, self._device, self._kernels = record, device, kernels
        self._contexts: dict[tuple[int, int], Context] = {}
        self._loaded: LoadedEngine | None = load_engine(path, record, module=module, device=device)
        try:
            self._allocate(inputs_bytes, result_bytes, hint)
        except BaseException:
            self.close()
            raise

    def _allocate(self, inputs_bytes: Mapping[str, int], result_bytes: int, hint: str) -> None:
        assert self._loaded is not None
        record, device = self._record, self._device
        scratch_bytes = max(
            self._loaded.engine.get_device_memory_size_for_profile_v2(index)
            for index in range(len(record.profiles))
        )
        self.inputs = {name: device.allocate(size, name, hint=hint) for name, size in inputs_bytes.items()}
        """Buffers of what comes from the host."""
        self._staging = {name: device.pinned(size) for name, size in inputs_bytes.items()}
        self._dtypes = {tensor.name: tensor.dtype for tensor in record.inputs}
        self._scratch = device.allocate(scratch_bytes, "engine's scratch memory", hint=hint)
        self._host_result = device.pinned(result_bytes)
        self._start, self._end = device.event(), device.event()
        self._passes_ms: list[float] = []

    def close(self) -> None:
        """Let the engine go, before the device: TensorRT frees its own memory in the same context."""
        if self._kernels is not None:
            self._kernels.save()
        self._contexts.clear()
        self._loaded = None

    def queue(
        self,
        feeds: Mapping[str, NDArray[np.int64]],
        shapes: Mapping[str, Shape],
        addresses: Mapping[str, int],
        *,
        repeats: bool = False,
    ) -> None:
        """Queue one pass on the tightest profile; :meth:`result` or :meth:`wait` comes before the next.

        ``feeds`` are copied in from the host; ``shapes`` and ``addresses`` are those of all other inputs,
        and the addresses of all outputs. ``repeats``: passes of this batch size never differ in shapes and
        addresses, so the second is captured as a CUDA graph and repeated from then on. Raises NirvanaError
        where no profile takes the shapes.
        """
        shapes = {**{name: array.shape for name, array in feeds.items()}, **shapes}
        profile = self._profile(shapes)
        for name, array in feeds.items():
            self._copy_in(name, array)
        context = self._context(profile, shapes["input_ids"][0] if repeats else 0)
        context.bind(shapes, {**{name: self.inputs[name].address for name in feeds}, **addresses})
        if repeats and context.graph is None and context.runs and self.graph_refused is None:
            try:
                context.capture()
            except (CudaError, NirvanaError) as error:
                self.graph_refused = str(error)
        self._device.record(self._start)
        context.run()
        self._device.record(self._end)

    def result(self, shape: Shape, buffer: DeviceBuffer, *, dtype: str) -> NDArray[np.float32]:
        """Wait for the pass and return what it wrote to ``buffer`` as float32, in memory of its own."""
        size_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        fits = size_bytes <= len(self._host_result)
        host = self._host_result[:size_bytes] if fits else np.empty(size_bytes, dtype=np.uint8)
        self._device.copy_out(host, buffer)
        self.wait()
        return as_float32(host, dtype).reshape(shape)

    def wait(self) -> None:
        """Wait for the pass, and note its time."""
        self._device.synchronize()
        self._passes_ms.append(self._device.elapsed_ms(self._start, self._end))

    def taken_ms(self) -> tuple[float, ...]:
        """Device time of every pass since the last call of this: without copies and host time."""
        passes_ms, self._passes_ms = tuple(self._passes_ms), []
        return passes_ms

    def _profile(self, shapes: Mapping[str, Shape]) -> int:
        """The tightest profile that takes ``shapes`` (a decode pass may fit prefill's too)."""
        misfits = []
        profiles = enumerate(self._record.profiles)
        for index, profile in sorted(profiles, key=lambda one: one[1].shapes["input_ids"][2][1]):
            misfit = first_misfit(shapes, profile.shapes)
            if misfit is None:
                return index
            name, shape, low, high = misfit
            misfits.append(f"{profile.name!r} takes {name} of {list(low)} to {list(high)}, not {list(shape)}")
        raise NirvanaError(
            f"No profile of {self._record.engine_file} takes this pass: {'; '.join(misfits)}.",
            hint="nirvana-deploy build-engine DIR --max-batch N --max-length N --force",
        )

    def _context(self, profile: int, repeated_batch: int) -> Context:
        """The context of a profile, or of a repeated pass of that many sequences."""
        key = profile, repeated_batch
        if key not in self._contexts:
            assert self._loaded is not None, "the session was closed"
            self._contexts[key] = Context(
                self._loaded, profile, device=self._device, scratch=self._scratch, kernels=self._kernels
            )
        return self._contexts[key]

    def _copy_in(self, name: str, array: NDArray[np.int64]) -> None:
        """Through page-locked memory, which is free again: every pass ends with a wait."""
        values = array.astype(self._dtypes[name], copy=False)
        staged = self._staging[name][: values.nbytes].view(self._dtypes[name])
        staged[:] = values.ravel()
        self._device.copy_in(self.inputs[name], staged)


def as_float32(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Bytes of a tensor of ``dtype`` as a new float32 array; bfloat16 is the upper half of a float32."""
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.dtype(dtype)).astype(np.float32)


def kernel_cache_of(record: EngineRecord, device: CudaDevice, folder: Path | None) -> KernelCache | None:
    """Where the kernels of one engine on one GPU are kept in ``folder``; None keeps none."""
    if folder is None:
        return None
    return KernelCache(folder / f"{record.engine_sha256[:16]}-{device.compute_capability}.bin")
