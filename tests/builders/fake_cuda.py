"""A CUDA driver without a GPU, as strict as the real one where host code can be wrong.

Device memory is host memory that no address of the host reaches; it starts as 0xFF bytes, which are NaN in
every float, and an access outside an allocation makes the stream fail. Work is queued and runs when the
stream is waited for, in order, so that host code which reads too early, or changes too early what a copy
reads, gets it wrong. What cannot be done during a capture is refused during a capture.

With ``binding`` (the real ``cuda.bindings.driver`` on a machine without a driver) every call is also made
there, which must get as far as looking for the driver: its arguments were accepted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Status(IntEnum):
    """CUresult, as far as it occurs here."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class _Attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class _StreamFlags(IntEnum):
    CU_STREAM_NON_BLOCKING = 1


class _EventFlags(IntEnum):
    CU_EVENT_DEFAULT = 0


class _CaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


COPY_MS = 0.25
"""Device time of every copy; kernels say theirs."""
_FIRST_ADDRESS = 0x7F00_0000_0000
_GAP = 1 << 20


class FakeDriver:
    """One fake GPU, standing in for the module ``cuda.bindings.driver``."""

    CUdevice_attribute: Any = _Attribute
    CUstream_flags: Any = _StreamFlags
    CUevent_flags: Any = _EventFlags
    CUstreamCaptureMode: Any = _CaptureMode

    def __init__(
        self,
        *,
        devices: int = 1,
        capability: tuple[int, int] = (8, 9),
        memory_bytes: int = 1 << 30,
        binding: Any = None,
    ) -> None:
        self.calls: list[str] = []
        """Names of the calls, in order."""
        self.memory_bytes = memory_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self._host_blocks: dict[int, Any] = {}
        self._devices, self._capability, self._binding = devices, capability, binding
        self._next_address = _FIRST_ADDRESS
        self._handles: Iterator[int] = iter(range(1, 1 << 30))
        self._queue: list[Callable[[], None]] = []
        self._recorded: list[Callable[[], None]] | None = None
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._events: dict[int, float | None] = {}
        self._clock_ms = 0.0
        self._failed = Status.CUDA_SUCCESS
        self.capture_is_invalid = False

    # what the fake TensorRT uses

    @property
    def capturing(self) -> bool:
        """Whether work is being captured rather than queued."""
        return self._recorded is not None

    def queue(self, work: Callable[[], None], *, ms: float) -> None:
        """Put ``work`` on the stream, or into the graph that is being captured."""

        def timed() -> None:
            work()
            self._clock_ms += ms

        (self._queue if self._recorded is None else self._recorded).append(timed)

    def read(self, address: int, size_bytes: int) -> bytes:
        """Device memory, for kernels and tests; an access outside makes the stream fail."""
        block, offset = self._locate(address, size_bytes)
        return block[offset : offset + size_bytes].tobytes()

    def write(self, address: int, data: bytes) -> None:
        """The same, writing."""
        block, offset = self._locate(address, len(data))
        block[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def holds(self, address: int, size_bytes: int) -> bool:
        """Whether this range lies in one allocation."""
        return any(
            base <= address and address + size_bytes <= base + len(b) for base, b in self.blocks.items()
        )

    def _locate(self, address: int, size_bytes: int) -> tuple[NDArray[np.uint8], int]:
        for base, block in self.blocks.items():
            if base <= address and address + size_bytes <= base + len(block):
                return block, address - base
        raise _OutsideError(hex(address))

    # the driver's functions

    def cuInit(self, Flags: int) -> tuple[Any, ...]:
        return self._answer("cuInit", Flags)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        if not self._devices:
            return self._answer("cuDeviceGetCount", status=Status.CUDA_ERROR_NO_DEVICE)
        return self._answer("cuDeviceGetCount", value=self._devices)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return self._answer("cuDeviceGet", ordinal, value=ordinal)

    def cuDeviceGetName(self, length: int, dev: Any) -> tuple[Any, ...]:
        return self._answer("cuDeviceGetName", length, dev, value=b"Fake L4\0".ljust(length))

    def cuDeviceGetAttribute(self, attrib: Any, dev: Any) -> tuple[Any, ...]:
        value = self._capability[int(attrib) - 75]
        return self._answer("cuDeviceGetAttribute", attrib, dev, value=value)

    def cuDevicePrimaryCtxRetain(self, dev: Any) -> tuple[Any, ...]:
        return self._answer("cuDevicePrimaryCtxRetain", dev, value=next(self._handles))

    def cuDevicePrimaryCtxRelease(self, dev: Any) -> tuple[Any, ...]:
        return self._answer("cuDevicePrimaryCtxRelease", dev)

    def cuCtxSetCurrent(self, ctx: Any) -> tuple[Any, ...]:
        return self._answer("cuCtxSetCurrent", ctx)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        answer = self._answer("cuMemGetInfo")
        return (*answer, self.memory_bytes - self.used_bytes, self.memory_bytes)

    def cuMemAlloc(self, bytesize: int) -> tuple[Any, ...]:
        if self.capturing:
            return self._answer("cuMemAlloc", bytesize, status=self._invalidate())
        if bytesize <= 0:
            return self._answer("cuMemAlloc", bytesize, status=Status.CUDA_ERROR_INVALID_VALUE)
        if self.used_bytes + bytesize > self.memory_bytes:
            return self._answer("cuMemAlloc", bytesize, status=Status.CUDA_ERROR_OUT_OF_MEMORY)
        address = self._next_address
        self._next_address += -(-bytesize // 256) * 256 + _GAP
        self.blocks[address] = np.full(bytesize, 0xFF, dtype=np.uint8)
        self.used_bytes += bytesize
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return self._answer("cuMemAlloc", bytesize, value=address)

    def cuMemFree(self, dptr: Any) -> tuple[Any, ...]:
        self._drain()
        self.used_bytes -= len(self.blocks.pop(int(dptr)))
        return self._answer("cuMemFree", dptr)

    def cuMemAllocHost(self, bytesize: int) -> tuple[Any, ...]:
        memory = (ctypes.c_uint8 * bytesize)()
        ctypes.memset(memory, 0xFF, bytesize)
        self._host_blocks[ctypes.addressof(memory)] = memory
        return self._answer("cuMemAllocHost", bytesize, value=ctypes.addressof(memory))

    def cuMemFreeHost(self, p: Any) -> tuple[Any, ...]:
        self._drain()
        ctypes.memset(self._host_blocks[int(p)], 0xFF, len(self._host_blocks[int(p)]))
        # kept, so that a test which reads it finds poison rather than a crash
        return self._answer("cuMemFreeHost", p)

    def cuMemcpyHtoDAsync(
        self, dstDevice: Any, srcHost: Any, ByteCount: int, hStream: Any
    ) -> tuple[Any, ...]:
        target, source = int(dstDevice), int(srcHost)
        self.queue(lambda: self.write(target, ctypes.string_at(source, ByteCount)), ms=COPY_MS)
        return self._answer("cuMemcpyHtoDAsync", dstDevice, srcHost, ByteCount, hStream)

    def cuMemcpyDtoHAsync(
        self, dstHost: Any, srcDevice: Any, ByteCount: int, hStream: Any
    ) -> tuple[Any, ...]:
        target, source = int(dstHost), int(srcDevice)
        self.queue(lambda: ctypes.memmove(target, self.read(source, ByteCount), ByteCount), ms=COPY_MS)
        return self._answer("cuMemcpyDtoHAsync", dstHost, srcDevice, ByteCount, hStream)

    def cuMemsetD8Async(self, dstDevice: Any, uc: int, N: int, hStream: Any) -> tuple[Any, ...]:
        target = int(dstDevice)
        self.queue(lambda: self.write(target, bytes([uc]) * N), ms=COPY_MS)
        return self._answer("cuMemsetD8Async", dstDevice, uc, N, hStream)

    def cuStreamCreate(self, Flags: int) -> tuple[Any, ...]:
        return self._answer("cuStreamCreate", Flags, value=next(self._handles))

    def cuStreamDestroy(self, hStream: Any) -> tuple[Any, ...]:
        self._drain()
        return self._answer("cuStreamDestroy", hStream)

    def cuStreamSynchronize(self, hStream: Any) -> tuple[Any, ...]:
        if self.capturing:
            return self._answer("cuStreamSynchronize", hStream, status=self._invalidate())
        self._drain()
        return self._answer("cuStreamSynchronize", hStream, status=self._failed)

    def cuEventCreate(self, Flags: int) -> tuple[Any, ...]:
        event = next(self._handles)
        self._events[event] = None
        return self._answer("cuEventCreate", Flags, value=event)

    def cuEventDestroy(self, hEvent: Any) -> tuple[Any, ...]:
        del self._events[int(hEvent)]
        return self._answer("cuEventDestroy", hEvent)

    def cuEventRecord(self, hEvent: Any, hStream: Any) -> tuple[Any, ...]:
        event = int(hEvent)
        self._events[event] = None

        def stamp() -> None:
            self._events[event] = self._clock_ms

        self.queue(stamp, ms=0.0)
        return self._answer("cuEventRecord", hEvent, hStream)

    def cuEventElapsedTime(self, hStart: Any, hEnd: Any) -> tuple[Any, ...]:
        start, end = self._events[int(hStart)], self._events[int(hEnd)]
        if start is None or end is None:
            return self._answer("cuEventElapsedTime", hStart, hEnd, status=Status.CUDA_ERROR_NOT_READY)
        return self._answer("cuEventElapsedTime", hStart, hEnd, value=end - start)

    def cuStreamBeginCapture(self, hStream: Any, mode: Any) -> tuple[Any, ...]:
        assert not self.capturing
        self._recorded, self.capture_is_invalid = [], False
        return self._answer("cuStreamBeginCapture", hStream, mode)

    def cuStreamEndCapture(self, hStream: Any) -> tuple[Any, ...]:
        assert self._recorded is not None
        recorded, self._recorded = self._recorded, None
        if self.capture_is_invalid:
            return self._answer(
                "cuStreamEndCapture", hStream, status=Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
            )
        graph = next(self._handles)
        self._graphs[graph] = recorded
        return self._answer("cuStreamEndCapture", hStream, value=graph)

    def cuGraphInstantiate(self, hGraph: Any, flags: int) -> tuple[Any, ...]:
        executable = next(self._handles)
        self._graphs[executable] = list(self._graphs[int(hGraph)])
        return self._answer("cuGraphInstantiate", hGraph, flags, value=executable)

    def cuGraphLaunch(self, hGraphExec: Any, hStream: Any) -> tuple[Any, ...]:
        self._queue.extend(self._graphs[int(hGraphExec)])
        return self._answer("cuGraphLaunch", hGraphExec, hStream)

    def cuGraphExecDestroy(self, hGraphExec: Any) -> tuple[Any, ...]:
        del self._graphs[int(hGraphExec)]
        return self._answer("cuGraphExecDestroy", hGraphExec)

    def cuGraphDestroy(self, hGraph: Any) -> tuple[Any, ...]:
        del self._graphs[int(hGraph)]
        return self._answer("cuGraphDestroy", hGraph)

    def cuGetErrorName(self, error: Any) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, Status(int(error)).name.encode()

    def cuGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, Status(int(error)).name.removeprefix("CUDA_ERROR_").lower().encode()

    @property
    def leaks(self) -> dict[str, int]:
        """What was made and not destroyed."""
        live = {"device memory": len(self.blocks), "graphs": len(self._graphs), "events": len(self._events)}
        return {what: count for what, count in live.items() if count}

    def _answer(
        self, function: str, *arguments: Any, status: Status = Status.CUDA_SUCCESS, value: Any = None
    ) -> tuple[Any, ...]:
        self.calls.append(function)
        if self._binding is not None:
            self._real_accepts(function, arguments)
        return (status,) if value is None or status else (status, value)

    def _real_accepts(self, function: str, arguments: tuple[Any, ...]) -> None:
        """Make the same call on the real binding; TypeError and the like escape."""
        if function == "cuStreamBeginCapture":
            arguments = (arguments[0], self._binding.CUstreamCaptureMode(int(arguments[1])))
        if function == "cuDeviceGetAttribute":
            arguments = (self._binding.CUdevice_attribute(int(arguments[0])), arguments[1])
        try:
            getattr(self._binding, function)(*arguments)
        except RuntimeError as error:
            assert "driver" in str(error), error
        else:
            raise AssertionError(f"{function} found a driver: this check is for machines without one")

    def _invalidate(self) -> Status:
        self.capture_is_invalid = True
        return Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED

    def _drain(self) -> None:
        """Run what is queued; after a failure nothing runs any more, as on a real device."""
        queued, self._queue = self._queue, []
        for work in queued:
            if self._failed:
                return
            try:
                work()
            except _OutsideError:
                self._failed = Status.CUDA_ERROR_ILLEGAL_ADDRESS


class _OutsideError(Exception):
    """An access outside every allocation."""
