"""An ONNX folder compiled for one of OpenVINO's devices, or the reason why not.

On the CPU a model computes in the type that it is stored in, as ONNX Runtime does: OpenVINO's own choice is
bfloat16 where the CPU has it, and a cache of 8 bits. Compiled models are cached for GPU and NPU. On the CPU
they are not: it takes seconds, and OpenVINO 2026.4.1 computes other logits from its cache
(``benchmarks/NOTES.md``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.gguf.convert import cache_folder
from nirvana_deploy.output.layout import (
    DATA_FILE,
    FLAVOR_KEY,
    MODEL_FILE,
    SCHEMA_KEY,
    is_seq2seq,
    require_schema,
)
from nirvana_deploy.runtime.openvino.installed import openvino_module
from nirvana_deploy.runtime.openvino.ir import refuse_ir
from nirvana_deploy.runtime.openvino.stateful import keep_cache_inside

_CPU = "CPU"
_FORM = "portable"
"""The one form of the graph that is run."""
_SIXTEEN_BITS = {"f16": "FP16", "bf16": "BF16"}
"""Element types and what a device that computes in them says of itself."""
_REASONS = (
    (
        "GatherBlockQuantized",
        "it looks up no embedding in 8-bit or 4-bit codes",
        "Leave the head in float, without --head or --quantize-head, or write it for other parsers too: "
        "nirvana-deploy quantize ONNX_FOLDER --scheme w4 --head --writing tensorrt --out DIR",
    ),
    (
        "TensorScatter",
        "it has no cache that is updated in place",
        "Export with --flavor portable.",
    ),
)
"""Words of OpenVINO's error, the reason in ours, and what to do."""


def device_of(runtime: str) -> str:
    """OpenVINO's name of the device that a runtime of the table runs on: CPU, GPU, NPU."""
    return runtime.rpartition("-")[2].upper()


def described_device(runtime: str) -> str:
    """The device of ``runtime`` in words; raises NirvanaError where it is not there."""
    core = openvino_module().Core()
    device = device_of(runtime)
    _require_device(core, device)
    name: str = core.get_property(device, "FULL_DEVICE_NAME")
    return name


def read_portable(folder: Path) -> Any:
    """The graph of a decoder's ONNX folder as an ``openvino.Model``, its weights mapped from the file.

    Raises NirvanaError for a folder without a decoder, a flavor or a quantization that OpenVINO does not run,
    and a file that is damaged or from a newer version.
    """
    path = folder / MODEL_FILE
    again = f"Export it again: nirvana-deploy export CHECKPOINT --out {folder}"
    if is_seq2seq(folder):
        raise NirvanaError(
            f"{folder} holds an encoder-decoder; OpenVINO runs decoders here.",
            hint="Run it with onnxruntime-cpu.",
        )
    refuse_ir(folder)
    if not path.is_file():
        raise NirvanaError(f"{folder} holds no {path.name}.", hint=again)
    openvino = openvino_module()
    try:
        model = openvino.Core().read_model(path)
    except RuntimeError as error:
        for word, reason, hint in _REASONS:
            if word in str(error):
                raise NirvanaError(f"OpenVINO cannot run {path}: {reason}.", hint=hint) from error
        missing = not (folder / DATA_FILE).is_file() and DATA_FILE in str(error)
        said = f"{DATA_FILE} is missing beside it" if missing else _last_line(error)
        raise NirvanaError(f"OpenVINO cannot load {path}: {said}.", hint=again) from error
    said_of_itself = metadata_of(model)
    require_schema(path, said_of_itself.get(SCHEMA_KEY))
    _require_decoder(path, model, again)
    flavor = said_of_itself.get(FLAVOR_KEY, _FORM)
    if flavor != _FORM or any(node.get_type_name() == "GroupQueryAttention" for node in model.get_ops()):
        raise NirvanaError(
            f"{path} is of the flavor {flavor}, of which OpenVINO runs one sequence at a time alone.",
            hint=f"Export with --flavor {_FORM}.",
        )
    return model


def metadata_of(model: Any) -> dict[str, str]:
    """What an ONNX graph says of itself (``output/layout.py``), as OpenVINO keeps it."""
    information = model.get_rt_info()
    if "framework" not in information:
        return {}
    return {key: str(value) for key, value in model.get_rt_info(["framework"]).value.items()}


def cache_type(model: Any) -> str:
    """The element type of the KV cache, which is that of the graph's arithmetic: f32, f16 or bf16."""
    name: str = model.input("past_key_values.0.key").get_element_type().to_string()
    return name


def compiled(model: Any, runtime: str, *, threads: int, precision: str) -> Any:
    """Compile ``model``, read by :func:`read_portable`, its cache kept inside; changes the model.

    ``precision`` is what the CPU computes in and keeps the cache in, where it can. Raises NirvanaError for a
    device that is not there or does not take the model.
    """
    core, device = openvino_module().Core(), device_of(runtime)
    _require_device(core, device)
    keep_cache_inside(model)
    try:
        return core.compile_model(model, device, _properties(core, device, threads, precision))
    except RuntimeError as error:
        raise NirvanaError(
            f"OpenVINO's {device} does not take this model: {_last_line(error)}.",
            hint="Run it with openvino-cpu or onnxruntime-cpu.",
        ) from error


def _properties(core: Any, device: str, threads: int, precision: str) -> dict[str, Any]:
    common = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    if device != _CPU:
        cache = cache_folder() / "openvino"
        cache.mkdir(parents=True, exist_ok=True)
        return common | {"CACHE_DIR": str(cache)}
    needed = _SIXTEEN_BITS.get(precision)
    if needed is not None and needed not in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
        precision = "f32"
    return common | {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
    }


def _require_device(core: Any, device: str) -> None:
    found = [name.partition(".")[0] for name in core.available_devices]
    if device not in found:
        raise NirvanaError(
            f"OpenVINO sees no {device} on this machine; it sees {', '.join(dict.fromkeys(found))}.",
            hint=f"An Intel {device} with its driver; or run it with openvino-cpu.",
        )


def _require_decoder(path: Path, model: Any, again: str) -> None:
    inputs = [tensor.any_name for tensor in model.inputs]
    outputs = [tensor.any_name for tensor in model.outputs]
    if "past_key_values.0.key" in inputs and "input_ids" in inputs and "logits" in outputs:
        return
    raise NirvanaError(
        f"{path} is not a decoder with a KV cache: its inputs are {', '.join(inputs[:4])}, its outputs "
        f"{', '.join(outputs[:4])}; it needs input_ids, past_key_values.0.key, ... and logits.",
        hint=again,
    )


def _last_line(error: Exception) -> str:
    """What OpenVINO says at last, behind the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__
