"""What works on this machine, what does not, and the command that changes that.

Distributions are looked up in installed metadata; a package is imported only where its metadata cannot
tell whether it runs (native libraries, devices).
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError, install_extra, pip_install
from nirvana_deploy.base.machine import usable_cores
from nirvana_deploy.base.units import format_bytes
from nirvana_deploy.model.gguf.convert import cache_folder
from nirvana_deploy.runtime.table import RUNTIMES, Runtime
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice

EXTRAS: dict[str, tuple[str, ...]] = {
    "cluster": ("ray",),
    "data": ("datasets",),
    "docs": ("furo", "myst-parser", "sphinx"),
    "eval": ("accelerate", "lm-eval"),
    "gguf": ("accelerate", "gguf"),
    "recover": ("accelerate", "peft", "tensorboard"),
    "serve": ("fastapi", "prometheus-client", "uvicorn"),
    "test": (
        "hypothesis",
        "jsonschema",
        "mypy",
        "openai",
        "pytest",
        "pytest-xdist",
        "ruff",
        "setuptools",
        "tritonclient",
    ),
    "wandb": ("wandb",),
}
"""Extras that add no runtime, and their packages, as pyproject.toml has them."""

_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd", "i8mm")
"""What the speed of fp32 and int8 kernels depends on, in the words of /proc/cpuinfo."""
_TAKES = {
    "onnx": "ONNX folders",
    "engine": "engine files",
    "checkpoint": "checkpoints",
    "gguf": "GGUF files",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    section: str
    """"runtimes", "runners", "extras" or "machine"."""
    name: str
    usable: bool
    detail: str
    fix: str | None = None
    """The command to type where it is not usable."""


def examine_machine() -> list[Finding]:
    """Look at runtimes, extras and the machine; takes about two seconds, changes nothing."""
    device = _device()
    return [*_runtimes(), *_runners(device), *_extras(), *_machine(), device]


def _runtimes() -> list[Finding]:
    modules: dict[str, Runtime] = {}
    for row in RUNTIMES.values():
        modules.setdefault(row.module, row)
    return [
        _python(),
        _runtime("torch", "torch", _torch_devices, fix=f"{pip_install()} torch"),
        *(
            _runtime(row.distribution, module, _DESCRIBED.get(module), fix=row.install)
            for module, row in modules.items()
        ),
        _runtime("onnxruntime-genai", "onnxruntime_genai", fix=install_extra("genai")),
    ]


def _python() -> Finding:
    return Finding("runtimes", "python", True, f"{platform.python_version()} ({sys.executable})")


def _runtime(name: str, module_name: str, describe: Any = None, *, fix: str) -> Finding:
    """Import ``module_name``: a native library that is missing or too old shows only then."""
    try:
        module = importlib.import_module(module_name)
        detail = str(getattr(module, "__version__", "")) or version(name)
        if describe is not None:
            detail += f": {describe(module)}"
    except ModuleNotFoundError as error:
        if error.name == module_name:
            return Finding("runtimes", name, False, "not installed", fix)
        return Finding("runtimes", name, False, f"installed, but {error.name} is missing", fix)
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("runtimes", name, False, f"installed, but does not load: {_first_line(error)}", fix)
    return Finding("runtimes", name, True, detail)


def _runners(device: Finding) -> list[Finding]:
    """What ``--runtime`` can name here: the package is there, and the GPU where it needs one."""
    return [_runner(row, device) for row in RUNTIMES.values()]


def _runner(row: Runtime, device: Finding) -> Finding:
    option, takes = f"--runtime {row.name}", _TAKES[row.takes]
    missing = _missing(row)
    if missing is not None:
        return Finding("runners", option, False, missing, row.install)
    if row.probe is not None:
        return _probed(row, option, takes)
    if row.device == "cpu":
        return Finding("runners", option, True, f"{takes}, on the CPU")
    if not device.usable:
        return Finding("runners", option, False, f"installed, for {takes}; {device.detail}", device.fix)
    return Finding(
        "runners", option, True, f"{takes}, on {device.detail}; whether it starts shows on loading"
    )


def _probed(row: Runtime, option: str, takes: str) -> Finding:
    assert row.probe is not None
    module, function = row.probe.split(":")
    try:
        device = getattr(importlib.import_module(module), function)(row.name)
    except NirvanaError as error:
        return Finding("runners", option, False, f"installed, for {takes}; {error.message}", error.hint)
    return Finding("runners", option, True, f"{takes}, on {device}")


def _missing(row: Runtime) -> str | None:
    """What this machine lacks for a runtime; None for nothing."""
    try:
        module = importlib.import_module(row.module)
    except ModuleNotFoundError as error:
        absent = row.distribution if error.name == row.module else error.name
        return f"the package {absent!r} is not installed"
    except (ImportError, OSError, RuntimeError) as error:
        return _first_line(error)
    if row.provider is not None and row.provider not in module.get_available_providers():
        return f"this onnxruntime has no {row.provider}"
    return None


def _device() -> Finding:
    """The first GPU, as the CUDA driver sees it."""
    try:
        with CudaDevice() as device:
            free, total = device.memory_bytes()
            memory = f"{format_bytes(free)} free of {format_bytes(total)}"
            detail = f"{device.name}, {device.compute_capability}, {memory}"
            return Finding("machine", "gpu", True, detail)
    except MissingExtraError as error:
        return Finding("machine", "gpu", False, "not looked for: cuda-bindings is not installed", error.hint)
    except NirvanaError as error:
        fix = "An NVIDIA GPU with its driver; engines are built and inspected without one"
        return Finding("machine", "gpu", False, error.message, fix)


def _torch_devices(torch: Any) -> str:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"cuda:{i} {device}" for i, device in enumerate(devices)) or "CPU only, no CUDA device"


def _execution_providers(onnxruntime: Any) -> str:
    return ", ".join(onnxruntime.get_available_providers())


def _openvino_devices(openvino: Any) -> str:
    return ", ".join(openvino.Core().available_devices)


_DESCRIBED = {"onnxruntime": _execution_providers, "openvino": _openvino_devices}
"""What is said of a module beside its version."""


def _extras() -> list[Finding]:
    return [_extra(extra, package) for extra, packages in EXTRAS.items() for package in packages]


def _extra(extra: str, package: str) -> Finding:
    try:
        return Finding("extras", f"{package} [{extra}]", True, version(package))
    except PackageNotFoundError:
        return Finding("extras", f"{package} [{extra}]", False, "not installed", install_extra(extra))


def _machine() -> list[Finding]:
    memory = psutil.virtual_memory()
    cache = cache_folder()
    return [
        Finding("machine", "cpu", True, _cpu()),
        Finding(
            "machine",
            "memory",
            True,
            f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}",
        ),
        Finding("machine", "disk", True, f"{format_bytes(_free_bytes(Path.cwd()))} free in {Path.cwd()}"),
        _cache(cache),
    ]


def _cpu() -> str:
    """Model, cores usable by this process, and the instruction sets that matter."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())
    }
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    cores = usable_cores()
    features = [feature for feature in _CPU_FEATURES if feature in flags]
    return f"{name}, {cores} usable of {psutil.cpu_count()} cores, {' '.join(features) or 'features unknown'}"


def _cache(folder: Path) -> Finding:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        return Finding(
            "machine", "cache", False, f"{folder} cannot be written", "export NIRVANA_DEPLOY_CACHE=DIR"
        )
    used_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    used, free = format_bytes(used_bytes), format_bytes(_free_bytes(existing))
    return Finding("machine", "cache", True, f"{folder}, {used} used, {free} free")


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
