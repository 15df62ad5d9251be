"""The runtimes, one row each: what a runtime takes, what opens it, what it needs.

Imports nothing heavy, for ``--help``. A new runtime is a module that returns a ``Runner`` and a row here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nirvana_deploy.base.errors import install_extra, pip_install
from nirvana_deploy.base.registry import look_up

Takes = Literal["onnx", "engine", "checkpoint", "gguf"]

_ORT = "nirvana_deploy.runtime.onnxruntime.providers:open_decoder"
_OPENVINO = "nirvana_deploy.runtime.openvino.decoder:open_decoder"
_OPENVINO_DEVICE = "nirvana_deploy.runtime.openvino.session:described_device"
_TENSORRT = "nirvana_deploy.runtime.tensorrt.decoder:open_engine"


@dataclass(frozen=True)
class Runtime:
    """One runtime."""

    name: str
    takes: Takes
    """An ONNX folder, an engine file, a checkpoint folder or a GGUF file."""
    opens: str
    """``module:function``, called with (path, runtime=, threads=); returns a Runner."""
    module: str
    """The Python module that it needs."""
    package: str | None = None
    """Its distribution on PyPI, where that has not the module's name with hyphens."""
    provider: str | None = None
    """The execution provider that it needs of ONNX Runtime."""
    extra: str | None = None
    """The extra of this package that installs ``module``."""
    fix: str | None = None
    """How to get it, where no extra does."""
    device: Literal["cpu", "gpu"] = "gpu"
    """Whether it needs an NVIDIA GPU, where ``probe`` does not say."""
    probe: str | None = None
    """``module:function`` from the runtime's name to its device in words; raises NirvanaError for none."""
    rounds_inputs: bool = False
    """Whether it rounds inputs to 8 bits where weights alone are quantized."""

    @property
    def distribution(self) -> str:
        """The package on PyPI, as messages name it."""
        return self.package or self.module.replace("_", "-")

    @property
    def install(self) -> str:
        """The command that installs what it needs."""
        return install_extra(self.extra) if self.extra else self.fix or "nirvana-deploy doctor"


RUNTIMES: dict[str, Runtime] = {
    row.name: row
    for row in (
        Runtime(
            "onnxruntime-cpu",
            takes="onnx",
            opens=_ORT,
            module="onnxruntime",
            provider="CPUExecutionProvider",
            extra="cpu",
            device="cpu",
        ),
        Runtime(
            "onnxruntime-cuda",
            takes="onnx",
            opens=_ORT,
            module="onnxruntime",
            provider="CUDAExecutionProvider",
            extra="gpu",
        ),
        Runtime(
            "onnxruntime-tensorrt",
            takes="onnx",
            opens=_ORT,
            module="onnxruntime",
            provider="TensorrtExecutionProvider",
            extra="gpu",
        ),
        Runtime(
            "onnxruntime-nvtensorrtrtx",
            takes="onnx",
            opens=_ORT,
            module="onnxruntime",
            provider="NvTensorRTRTXExecutionProvider",
            fix="An onnxruntime with this provider: see its page on onnxruntime.ai",
        ),
        *(
            Runtime(
                f"openvino-{device}",
                takes="onnx",
                opens=_OPENVINO,
                module="openvino",
                extra="openvino",
                probe=_OPENVINO_DEVICE,
                rounds_inputs=True,
            )
            for device in ("cpu", "gpu", "npu")
        ),
        Runtime(
            "torch",
            takes="checkpoint",
            opens="nirvana_deploy.runtime.torch:open_checkpoint",
            module="torch",
            fix=f"{pip_install()} torch",
            device="cpu",
        ),
        Runtime(
            "llama-cpp",
            takes="gguf",
            opens="nirvana_deploy.runtime.llama_cpp:open_gguf",
            module="llama_cpp",
            package="llama-cpp-python",
            extra="llama-cpp",
            device="cpu",
        ),
        Runtime("tensorrt", takes="engine", opens=_TENSORRT, module="tensorrt", extra="gpu"),
        Runtime("tensorrt-rtx", takes="engine", opens=_TENSORRT, module="tensorrt_rtx", extra="rtx"),
    )
}
"""By name, in the order in which they are listed."""

DEFAULT = "onnxruntime-cpu"
"""Runs ONNX folders where no runtime is named."""
DEFAULT_ENGINE = "tensorrt-rtx"
"""Engines are built for it where no runtime is named: it builds without a GPU."""
DEFAULTS: dict[Takes, str] = {
    "onnx": DEFAULT,
    "checkpoint": "torch",
    "engine": DEFAULT_ENGINE,
    "gguf": "llama-cpp",
}
"""What runs a path of a kind where no runtime is named."""


def runtime_named(name: str) -> Runtime:
    """The row of ``name``; raises NirvanaError for an unknown one."""
    return look_up(name, RUNTIMES, what="runtime", hint="nirvana-deploy doctor")


def engine_runtimes() -> dict[str, Runtime]:
    """The runtimes that take engine files, the default first."""
    engines = {name: row for name, row in RUNTIMES.items() if row.takes == "engine"}
    return {DEFAULT_ENGINE: engines.pop(DEFAULT_ENGINE), **engines}


def runtime_of_provider(provider: str) -> str:
    """The runtime that runs on an execution provider; the provider's own name for an unknown one."""
    return next((row.name for row in RUNTIMES.values() if row.provider == provider), provider)
