"""One NVIDIA GPU through the CUDA driver API: buffers, copies, events, graphs, one stream.

A thin typed layer over ``cuda.bindings.driver``, whose functions return ``(status, values...)``. Work is
ordered on one stream, :meth:`CudaDevice.close` frees every allocation, and a failed status becomes a
sentence. :class:`Driver` is the part of the module in use, so that a fake can replace it. Tested on the
real binding as far as that goes without a driver; **it has not run on a GPU yet**.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.units import format_bytes

_SUCCESS = 0
_OUT_OF_MEMORY = 2
_NO_DEVICE = 100
_ONNX_RUNS_HERE = (
    "Engines are built and inspected without a GPU; run one on the machine that has it. Here the ONNX folder "
    "runs: nirvana-deploy verify OUT"
)


class Driver(Protocol):
    """The functions of ``cuda.bindings.driver`` that are used; each returns ``(CUresult, values...)``.

    Handles (device, context, stream, event, graph, pointer) are passed back as they came.
    """

    CUdevice_attribute: Any
    CUstream_flags: Any
    CUevent_flags: Any
    CUstreamCaptureMode: Any

    def cuInit(self, Flags: int) -> tuple[Any, ...]: ...
    def cuDeviceGetCount(self) -> tuple[Any, ...]: ...
    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]: ...
    def cuDeviceGetName(self, length: int, dev: Any) -> tuple[Any, ...]: ...
    def cuDeviceGetAttribute(self, attrib: Any, dev: Any) -> tuple[Any, ...]: ...
    def cuDevicePrimaryCtxRetain(self, dev: Any) -> tuple[Any, ...]: ...
    def cuDevicePrimaryCtxRelease(self, dev: Any) -> tuple[Any, ...]: ...
    def cuCtxSetCurrent(self, ctx: Any) -> tuple[Any, ...]: ...
    def cuMemGetInfo(self) -> tuple[Any, ...]: ...
    def cuMemAlloc(self, bytesize: int) -> tuple[Any, ...]: ...
    def cuMemFree(self, dptr: Any) -> tuple[Any, ...]: ...
    def cuMemAllocHost(self, bytesize: int) -> tuple[Any, ...]: ...
    def cuMemFreeHost(self, p: Any) -> tuple[Any, ...]: ...
    def cuMemcpyHtoDAsync(
        self, dstDevice: Any, srcHost: Any, ByteCount: int, hStream: Any
    ) -> tuple[Any, ...]: ...
    def cuMemcpyDtoHAsync(
        self, dstHost: Any, srcDevice: Any, ByteCount: int, hStream: Any
    ) -> tuple[Any, ...]: ...
    def cuMemsetD8Async(self, dstDevice: Any, uc: int, N: int, hStream: Any) -> tuple[Any, ...]: ...
    def cuStreamCreate(self, Flags: int) -> tuple[Any, ...]: ...
    def cuStreamDestroy(self, hStream: Any) -> tuple[Any, ...]: ...
    def cuStreamSynchronize(self, hStream: Any) -> tuple[Any, ...]: ...
    def cuEventCreate(self, Flags: int) -> tuple[Any, ...]: ...
    def cuEventDestroy(self, hEvent: Any) -> tuple[Any, ...]: ...
    def cuEventRecord(self, hEvent: Any, hStream: Any) -> tuple[Any, ...]: ...
    def cuEventElapsedTime(self, hStart: Any, hEnd: Any) -> tuple[Any, ...]: ...
    def cuStreamBeginCapture(self, hStream: Any, mode: Any) -> tuple[Any, ...]: ...
    def cuStreamEndCapture(self, hStream: Any) -> tuple[Any, ...]: ...
    def cuGraphInstantiate(self, hGraph: Any, flags: int) -> tuple[Any, ...]: ...
    def cuGraphLaunch(self, hGraphExec: Any, hStream: Any) -> tuple[Any, ...]: ...
    def cuGraphExecDestroy(self, hGraphExec: Any) -> tuple[Any, ...]: ...
    def cuGraphDestroy(self, hGraph: Any) -> tuple[Any, ...]: ...
    def cuGetErrorName(self, error: Any) -> tuple[Any, ...]: ...
    def cuGetErrorString(self, error: Any) -> tuple[Any, ...]: ...


class CudaError(NirvanaError):
    """The driver refused a call; ``name`` is its own name for the reason."""

    def __init__(self, message: str, *, name: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.name = name


@dataclass(frozen=True)
class DeviceBuffer:
    """Memory of the device."""

    what: str
    """For messages: "key of layer 3"."""
    address: int
    size_bytes: int


class CudaDevice:
    """One GPU, its primary context and one stream. A context manager: what was made is freed with the block.

    ``driver`` stands in for ``cuda.bindings.driver``. Raises MissingExtraError without cuda-bindings, and
    NirvanaError where there is no driver or no GPU.
    """

    name: str
    """The vendor's, for example ``NVIDIA L4``."""
    compute_capability: str
    """``sm89``."""
    stream: int
    """Handle of the stream that everything is ordered on."""

    def __init__(self, *, index: int = 0, driver: Driver | None = None) -> None:
        self._driver = driver if driver is not None else load_driver()
        self._releases: list[Callable[[], object]] = []
        self._device = _first_call(self._driver, index)
        context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._releases.append(lambda: self._driver.cuDevicePrimaryCtxRelease(self._device))
        self._call("cuCtxSetCurrent", context)
        name: bytes = self._call("cuDeviceGetName", 256, self._device)
        self.name = name.split(b"\0")[0].decode(errors="replace")  # the binding pads with blanks behind it
        attributes = self._driver.CUdevice_attribute
        major, minor = (
            self._call("cuDeviceGetAttribute", getattr(attributes, name), self._device)
            for name in (
                "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
                "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
            )
        )
        self.compute_capability = f"sm{major}{minor}"
        flags = int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._stream = self._call("cuStreamCreate", flags)
        self._releases.append(lambda: self._driver.cuStreamDestroy(self._stream))
        self.stream = int(self._stream)
        self._free_at_start_bytes = self.memory_bytes()[0]
        self._least_free_bytes = self._free_at_start_bytes

    def __enter__(self) -> CudaDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def settle(self) -> None:
        """Wait for the stream whatever became of its work: ahead of freeing what the work used."""
        if self._releases:
            self._driver.cuStreamSynchronize(self._stream)

    def close(self) -> None:
        """Wait for the stream, then free everything in reverse order; a second call does nothing."""
        self.settle()
        while self._releases:
            self._releases.pop()()

    def memory_bytes(self) -> tuple[int, int]:
        """(free, total) of the device, all processes together."""
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def peak_bytes(self) -> int:
        """The most that the device's free memory has shrunk since this object was made, as far as looked at.

        Looked at after each allocation and each call of this. Without the CUDA context itself (some hundred
        MB, there before the first look); with whatever other processes took meanwhile.
        """
        self._least_free_bytes = min(self._least_free_bytes, self.memory_bytes()[0])
        return max(0, self._free_at_start_bytes - self._least_free_bytes)

    def allocate(self, size_bytes: int, what: str, *, hint: str | None = None) -> DeviceBuffer:
        """Allocate at least one byte (a tensor of no elements needs an address too); contents undefined.

        ``hint`` says what to lower where there is no room.
        """
        size_bytes = max(1, size_bytes)
        status, *values = self._driver.cuMemAlloc(size_bytes)
        if int(status) == _OUT_OF_MEMORY:
            free, total = self.memory_bytes()
            raise CudaError(
                f"{self.name} has no room for the {what}: {format_bytes(size_bytes)} are needed, "
                f"{format_bytes(free)} of {format_bytes(total)} are free.",
                name="CUDA_ERROR_OUT_OF_MEMORY",
                hint=hint,
            )
        self._require(status, "cuMemAlloc")
        pointer = values[0]
        self._releases.append(lambda: self._driver.cuMemFree(pointer))
        self._least_free_bytes = min(self._least_free_bytes, self.memory_bytes()[0])
        return DeviceBuffer(what=what, address=int(pointer), size_bytes=size_bytes)

    def pinned(self, size_bytes: int) -> NDArray[np.uint8]:
        """Page-locked host memory, [size_bytes]: what copies overlap with and are fastest from."""
        size_bytes = max(1, size_bytes)
        pointer = self._call("cuMemAllocHost", size_bytes)
        self._releases.append(lambda: self._driver.cuMemFreeHost(pointer))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(int(pointer)))

    def copy_in(self, buffer: DeviceBuffer, host: NDArray[Any]) -> None:
        """Queue a copy of a contiguous ``host`` array, which must stay as it is until the stream is done."""
        _require_room(buffer, host)
        if host.nbytes:
            address = host.ctypes.data
            self._call("cuMemcpyHtoDAsync", buffer.address, address, host.nbytes, self._stream)

    def copy_out(self, host: NDArray[Any], buffer: DeviceBuffer) -> None:
        """Queue a copy into a contiguous ``host`` array; it is there after :meth:`synchronize`."""
        _require_room(buffer, host)
        if host.nbytes:
            address = host.ctypes.data
            self._call("cuMemcpyDtoHAsync", address, buffer.address, host.nbytes, self._stream)

    def zero(self, buffer: DeviceBuffer) -> None:
        """Queue filling ``buffer`` with zero bytes."""
        self._call("cuMemsetD8Async", buffer.address, 0, buffer.size_bytes, self._stream)

    def synchronize(self) -> None:
        """Wait until everything queued is done; an error of any of it surfaces here."""
        self._call("cuStreamSynchronize", self._stream)

    def event(self) -> Any:
        """A new event, to be recorded any number of times."""
        event = self._call("cuEventCreate", int(self._driver.CUevent_flags.CU_EVENT_DEFAULT))
        self._releases.append(lambda: self._driver.cuEventDestroy(event))
        return event

    def record(self, event: Any) -> None:
        """Queue a time stamp."""
        self._call("cuEventRecord", event, self._stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Device time between two recorded events that the stream has passed."""
        return float(self._call("cuEventElapsedTime", start, end))

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """What ``enqueue`` queues on the stream, as a graph that :meth:`launch` repeats; nothing runs yet.

        Raises CudaError where the work cannot be captured; the stream is usable afterwards.
        """
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            status, *graphs = self._driver.cuStreamEndCapture(self._stream)
            if int(status) == _SUCCESS:
                self._driver.cuGraphDestroy(graphs[0])
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            executable = self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._driver.cuGraphDestroy(graph)
        self._releases.append(lambda: self._driver.cuGraphExecDestroy(executable))
        return executable

    def launch(self, graph: Any) -> None:
        """Queue a captured graph: the same kernels on the same addresses."""
        self._call("cuGraphLaunch", graph, self._stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call the driver; returns its one value, a tuple of several, or None."""
        status, *values = getattr(self._driver, function)(*arguments)
        self._require(status, function)
        return None if not values else values[0] if len(values) == 1 else tuple(values)

    def _require(self, status: Any, function: str) -> None:
        if int(status) != _SUCCESS:
            name, text = _words(self._driver, status)
            raise CudaError(
                f"The CUDA driver refused {function}: {name} ({text}).",
                name=name,
                hint="nirvana-deploy doctor",
            )


def load_driver() -> Driver:
    """``cuda.bindings.driver``; importing it needs no driver, calling it does."""
    try:
        from cuda.bindings import driver
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "cuda":
            raise
        raise MissingExtraError("Running engines", package="cuda-bindings", extra="gpu") from None
    return cast(Driver, driver)


def _first_call(driver: Driver, index: int) -> Any:
    """Start the driver and get device ``index``: where a machine without a GPU is found out."""
    try:
        status, *_ = driver.cuInit(0)
    except RuntimeError as error:  # cuda-bindings finds no libcuda, or one that lacks a function
        raise NirvanaError(
            f"No NVIDIA driver on this machine: {_first_sentence(error)}", hint=_ONNX_RUNS_HERE
        ) from error
    if int(status) == _SUCCESS:
        status, *counted = driver.cuDeviceGetCount()
    if int(status) not in (_SUCCESS, _NO_DEVICE):
        name, text = _words(driver, status)
        raise NirvanaError(f"The NVIDIA driver does not start: {name} ({text}).", hint=_ONNX_RUNS_HERE)
    count = int(counted[0]) if int(status) == _SUCCESS else 0
    if count == 0:
        raise NirvanaError("The NVIDIA driver of this machine sees no GPU.", hint=_ONNX_RUNS_HERE)
    if index >= count:
        raise NirvanaError(f"GPU {index} is asked for; this machine has {count}, counted from 0.")
    status, device = driver.cuDeviceGet(index)
    return device


def _words(driver: Driver, status: Any) -> tuple[str, str]:
    """The driver's name and text for a status."""
    words = [answer[1] for answer in (driver.cuGetErrorName(status), driver.cuGetErrorString(status))]
    name, text = (w.decode(errors="replace") if isinstance(w, bytes) else str(w) for w in words)
    return name, text


def _first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _require_room(buffer: DeviceBuffer, host: NDArray[Any]) -> None:
    if not host.flags.c_contiguous:
        raise ValueError(f"{buffer.what}: copies need a contiguous array")
    if host.nbytes > buffer.size_bytes:
        raise ValueError(f"{buffer.what}: {host.nbytes} bytes do not fit {buffer.size_bytes}")
