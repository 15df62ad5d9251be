from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import fake_cuda
from builders.extras import needs
from builders.fake_cuda import COPY_MS, FakeDriver, Status

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice, CudaError, DeviceBuffer, Driver, load_driver


@pytest.fixture
def device(driver: FakeDriver) -> Iterator[CudaDevice]:
    with CudaDevice(driver=driver) as opened:
        yield opened
    assert driver.leaks == {}
    assert driver.used_bytes == 0


def _has_nvidia_driver() -> bool:
    try:
        return int(load_driver().cuInit(0)[0]) == 0
    except (NirvanaError, RuntimeError):
        return False


def test_a_device_says_what_it_is(device: CudaDevice) -> None:
    assert (device.name, device.compute_capability) == ("Fake L4", "sm89")
    assert device.memory_bytes() == (1 << 30, 1 << 30)


def test_bytes_go_in_and_come_out(device: CudaDevice) -> None:
    buffer = device.allocate(80, "numbers")
    sent, received = np.arange(10.0), np.zeros(10)
    device.copy_in(buffer, sent)
    device.copy_out(received, buffer)
    assert not received.any()  # queued, not done
    device.synchronize()
    np.testing.assert_array_equal(received, sent)


def test_a_copy_reads_host_memory_when_the_stream_gets_there(device: CudaDevice) -> None:
    """Why inputs are staged in memory that stays untouched until the wait."""
    buffer, received = device.allocate(8, "number"), np.zeros(1)
    sent = np.array([1.0])
    device.copy_in(buffer, sent)
    sent[0] = 2.0
    device.copy_out(received, buffer)
    device.synchronize()
    assert received[0] == 2.0


def test_new_memory_is_undefined_and_can_be_zeroed(device: CudaDevice) -> None:
    buffer, received = device.allocate(16, "cache"), np.zeros(4, dtype=np.float32)
    device.copy_out(received, buffer)
    device.synchronize()
    assert np.isnan(received).all()
    device.zero(buffer)
    device.copy_out(received, buffer)
    device.synchronize()
    assert (received == 0).all()


def test_a_tensor_without_elements_has_an_address(device: CudaDevice) -> None:
    empty = device.allocate(0, "past of no tokens")
    assert (empty.size_bytes, empty.address > 0) == (1, True)
    device.copy_in(empty, np.zeros(0))


@pytest.mark.parametrize("host", [np.zeros(3), np.zeros((2, 4))[:, ::2]], ids=["too large", "not contiguous"])
def test_a_copy_that_does_not_fit_is_our_bug(device: CudaDevice, host: np.ndarray[Any, Any]) -> None:
    buffer = device.allocate(16, "pair")
    with pytest.raises(ValueError, match="pair: "):
        device.copy_in(buffer, host)
    with pytest.raises(ValueError, match="pair: "):
        device.copy_out(host, buffer)


def test_no_room_says_how_much_and_what_to_lower() -> None:
    driver = FakeDriver(memory_bytes=3_000_000)
    with CudaDevice(driver=driver) as device:
        device.allocate(1_000_000, "weights")
        with pytest.raises(CudaError) as caught:
            device.allocate(2_500_000, "KV cache", hint="Build it with --max-batch 1")
    assert caught.value.message == (
        "Fake L4 has no room for the KV cache: 2.50 MB are needed, 2.00 MB of 3.00 MB are free."
    )
    assert caught.value.hint == "Build it with --max-batch 1"
    assert driver.leaks == {}  # what was allocated before is freed


def test_an_access_outside_is_reported_where_the_stream_is_waited_for(device: CudaDevice) -> None:
    device.copy_out(np.zeros(1), DeviceBuffer("nothing", 0x1234, 8))
    with pytest.raises(CudaError, match=r"refused cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        device.synchronize()
    assert caught.value.name == "CUDA_ERROR_ILLEGAL_ADDRESS"


def test_events_time_the_device_and_not_the_host(device: CudaDevice) -> None:
    start, end = device.event(), device.event()
    buffer = device.allocate(8, "number")
    device.record(start)
    for _ in range(3):
        device.zero(buffer)
    device.record(end)
    with pytest.raises(CudaError, match="CUDA_ERROR_NOT_READY"):
        device.elapsed_ms(start, end)
    device.synchronize()
    assert device.elapsed_ms(start, end) == pytest.approx(3 * COPY_MS)


def test_a_graph_repeats_what_was_captured_and_capturing_runs_nothing(
    device: CudaDevice, driver: FakeDriver
) -> None:
    source, target = np.array([1.0]), np.array([0.0])
    buffer = device.allocate(8, "number")

    def work() -> None:
        device.copy_in(buffer, source)
        device.copy_out(target, buffer)

    graph = device.capture(work)
    device.synchronize()
    assert target[0] == 0.0
    for value in (5.0, 6.0):
        source[0] = value
        device.launch(graph)
        device.synchronize()
        assert target[0] == value
    order = [call for call in driver.calls if "Capture" in call or "Graph" in call]
    assert order == [
        "cuStreamBeginCapture",
        "cuStreamEndCapture",
        "cuGraphInstantiate",
        "cuGraphDestroy",
        "cuGraphLaunch",
        "cuGraphLaunch",
    ]


def test_a_capture_that_fails_leaves_the_stream_usable(device: CudaDevice, driver: FakeDriver) -> None:
    with pytest.raises(CudaError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        device.capture(lambda: device.allocate(8, "too late") and None)
    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 / 0 and None)
    assert not driver.capturing
    device.synchronize()


def test_the_peak_is_what_was_taken_since_the_start(device: CudaDevice, driver: FakeDriver) -> None:
    device.allocate(1000, "a")
    driver.used_bytes += 500  # somebody else's, or TensorRT's own
    device.allocate(1000, "b")
    driver.used_bytes -= 500
    assert device.peak_bytes() == 2500


def test_closing_frees_in_reverse_order_and_once(driver: FakeDriver) -> None:
    device = CudaDevice(driver=driver)
    device.allocate(8, "a")
    device.pinned(8)
    device.event()
    driver.calls.clear()
    device.close()
    device.close()
    assert driver.calls == [
        "cuStreamSynchronize",
        "cuEventDestroy",
        "cuMemFreeHost",
        "cuMemFree",
        "cuStreamDestroy",
        "cuDevicePrimaryCtxRelease",
    ]


def test_no_gpu_is_a_sentence() -> None:
    with pytest.raises(NirvanaError, match=r"sees no GPU\.\nEngines are built .* without a GPU"):
        CudaDevice(driver=FakeDriver(devices=0))
    with pytest.raises(NirvanaError, match=r"GPU 2 is asked for; this machine has 1, counted from 0\."):
        CudaDevice(driver=FakeDriver(), index=2)


def test_a_driver_that_does_not_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(driver, "cuInit", lambda Flags: (Status.CUDA_ERROR_INVALID_VALUE,))
    with pytest.raises(NirvanaError, match="does not start: CUDA_ERROR_INVALID_VALUE"):
        CudaDevice(driver=driver)


@pytest.mark.skipif(_has_nvidia_driver(), reason="needs a machine without an NVIDIA driver; this one has one")
def test_no_driver_is_a_sentence() -> None:
    needs("cuda.bindings.driver")
    with pytest.raises(
        NirvanaError, match=r"^No NVIDIA driver on this machine: .*\n.*nirvana-deploy verify OUT"
    ):
        CudaDevice()


def test_without_cuda_bindings_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.delitem(sys.modules, "cuda.bindings.driver", raising=False)
    with pytest.raises(MissingExtraError, match=r"Running engines needs .*'cuda-bindings'.*\n.*\[gpu\]"):
        load_driver()


def test_the_real_binding_has_every_function_with_these_parameters() -> None:
    needs("cuda.bindings.driver")
    real: Any = load_driver()
    for name, member in inspect.getmembers(Driver, inspect.isfunction):
        if not name.startswith("cu"):
            continue
        declared = [p for p in inspect.signature(member).parameters if p != "self"]
        line = getattr(real, name).__doc__.splitlines()[0]  # cuMemAlloc(size_t bytesize)
        real_names = [
            part.split(":")[0].split()[-1]
            for part in line[line.index("(") + 1 : -1].split(",")
            if part.strip()
        ]
        assert declared == real_names, line
    for enum in ("CUdevice_attribute", "CUstream_flags", "CUevent_flags", "CUstreamCaptureMode"):
        for member in getattr(FakeDriver, enum):
            assert int(getattr(getattr(real, enum), member.name)) == member.value
    for status in Status:
        assert int(getattr(real.CUresult, status.name)) == status.value


@pytest.mark.skipif(_has_nvidia_driver(), reason="calls with made-up addresses, so only without a driver")
def test_the_real_binding_accepts_the_arguments_of_every_call() -> None:
    needs("cuda.bindings.driver")
    driver = FakeDriver(binding=load_driver())
    with CudaDevice(driver=driver) as device:
        buffer, host = device.allocate(64, "numbers"), device.pinned(64)
        start, end = device.event(), device.event()
        device.zero(buffer)
        device.record(start)
        device.copy_in(buffer, host)
        device.launch(device.capture(lambda: device.copy_out(host, buffer)))
        device.record(end)
        device.synchronize()
        device.elapsed_ms(start, end)
        device.peak_bytes()
    declared = {name for name, _ in inspect.getmembers(Driver, inspect.isfunction) if name.startswith("cu")}
    assert set(driver.calls) == declared - {"cuGetErrorName", "cuGetErrorString"}


ON_THE_REAL_BINDING = """
import numpy as np
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice, CudaError

with CudaDevice() as device:
    assert (device.name, device.compute_capability) == ("Stand-in", "sm89")
    assert (device.stream, device.memory_bytes()) == (0x22, (1_000_000, 2_000_000))
    buffer, pinned, received = device.allocate(80, "numbers"), device.pinned(80), np.zeros(10)
    pinned.view(np.float64)[:] = np.arange(10)
    device.copy_in(buffer, pinned)
    device.copy_out(received, buffer)
    device.synchronize()
    np.testing.assert_array_equal(received, np.arange(10))
    device.zero(buffer)
    device.copy_out(received, buffer)
    assert not received.any()
    start, end = device.event(), device.event()
    device.record(start)
    device.record(end)
    assert device.elapsed_ms(start, end) == 0.5
    device.launch(device.capture(lambda: device.zero(buffer)))
    try:
        device.allocate(600_000, "cache")
    except CudaError as error:
        assert error.message.startswith("Stand-in has no room for the cache: 600 kB are needed"), error
    else:
        raise AssertionError("the device has no room for that")
    try:
        device.elapsed_ms(start, end) and device._call("cuCtxSetCurrent", 5)
    except CudaError as error:
        assert error.message == "The CUDA driver refused cuCtxSetCurrent: CUDA_ERROR_STAND_IN (a reason)."
    else:
        raise AssertionError("that is no context")
"""


def test_the_real_binding_on_a_driver_of_host_memory(tmp_path: Path) -> None:
    needs("cuda.bindings.driver")
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("compiles a stand-in for libcuda: needs cc, on Linux")
    source, library = Path(fake_cuda.__file__).parent / "stand_in_libcuda.c", tmp_path / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    found = subprocess.run(
        [sys.executable, "-c", ON_THE_REAL_BINDING],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
