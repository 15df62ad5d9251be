"""One execution context of one profile: shapes and addresses set when they change, and its CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice, DeviceBuffer
from nirvana_deploy.runtime.tensorrt.kernel_cache import KernelCache
from nirvana_deploy.runtime.tensorrt.loading import LoadedEngine


class Context:
    """An IExecutionContext on ``profile``, with its scratch memory in the ``scratch`` buffer."""

    graph: Any
    """The captured pass, or None."""
    runs: int
    """Passes queued one by one since shapes or addresses last changed."""

    def __init__(
        self,
        loaded: LoadedEngine,
        profile: int,
        *,
        device: CudaDevice,
        scratch: DeviceBuffer,
        kernels: KernelCache | None = None,
    ) -> None:
        self._device, self._log = device, loaded.log
        self._context = _create(loaded, kernels)
        if self._context is None:
            raise NirvanaError(f"TensorRT makes no execution context: {self._log.reason()}.")
        self._context.set_device_memory(scratch.address, scratch.size_bytes)
        self._require(
            self._context.set_optimization_profile_async(profile, device.stream), f"profile {profile}"
        )
        self._stream_capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX has it
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.graph, self.runs = None, 0

    def bind(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Set the shape of every input and the address of every tensor, those that changed."""
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._changed()
                self._require(self._context.set_input_shape(name, shape), f"shape {shape} of {name}")
                self._shapes[name] = shape
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._changed()
                self._require(self._context.set_tensor_address(name, address), f"the address of {name}")
                self._addresses[name] = address

    def run(self) -> None:
        """Queue the pass: by its graph where there is one."""
        if self.graph is not None:
            self._device.launch(self.graph)
        else:
            self._enqueue()
            self.runs += 1

    def capture(self) -> None:
        """Capture the pass as it is bound; it must have run like this before, and nothing runs now.

        The first run after a change does work that must not be repeated. Raises NirvanaError where TensorRT
        or the driver does not capture.
        """
        if self._stream_capturable is not None and not self._stream_capturable(self._device.stream):
            raise NirvanaError(
                "TensorRT-RTX cannot capture this engine: it allocates while it runs "
                "(the builder flag REQUIRE_USER_ALLOCATION prevents that)."
            )
        self.graph = self._device.capture(self._enqueue)

    def _enqueue(self) -> None:
        self._require(self._context.execute_async_v3(self._device.stream), "the pass")

    def _changed(self) -> None:
        assert self.graph is None, "what a graph was captured from must not change"
        self.runs = 0

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise NirvanaError(
                f"TensorRT refuses {what}: {self._log.reason()}.", hint="nirvana-deploy doctor"
            )


def _create(loaded: LoadedEngine, kernels: KernelCache | None) -> Any:
    """A context without memory of its own.

    TensorRT-RTX compiles kernels for a shape when it first meets it: at once here, so that the second pass
    is a steady one, rather than in the background.
    """
    module, engine = loaded.module, loaded.engine
    user_managed = module.ExecutionContextAllocationStrategy.USER_MANAGED
    if module.__name__ != "tensorrt_rtx":
        return engine.create_execution_context(user_managed)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(user_managed)
    config.dynamic_shapes_kernel_specialization_strategy = (
        module.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    if kernels is not None:
        kernels.attach(config)
    return engine.create_execution_context(config)
