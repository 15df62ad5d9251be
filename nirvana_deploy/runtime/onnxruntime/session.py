"""What every ONNX Runtime runner needs: sessions that open or say why not, and numbers in and out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.output.layout import DATA_FILE, SCHEMA_KEY, require_schema

try:
    import onnxruntime
except ModuleNotFoundError as error:
    if error.name != "onnxruntime":
        raise
    raise MissingExtraError("Running ONNX models", package="onnxruntime", extra="cpu") from None


CACHE_DTYPES: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
"""What a KV cache may be stored as."""

_FLOAT32_ACCURACY = "1"
"""ONNX Runtime's number for it."""


def open_session(
    model: Path,
    *,
    threads: int,
    provider: str,
    provider_options: Mapping[str, str] | None = None,
    in_float32: bool = False,
    profile: Path | None = None,
) -> Any:
    """An InferenceSession; raises NirvanaError for a missing, corrupt or newer file or an absent provider.

    ``in_float32`` opens the float32 twin of a half-precision model (``float32_twin.py``). A provider whose
    libraries do not load is an error too: ONNX Runtime would go on with another one. With ``profile`` the
    session writes its profile into a file whose name begins so.
    """
    if not model.is_file():
        raise NirvanaError(f"{model.parent} holds no {model.name}.", hint=export_hint(model.parent))
    if provider not in onnxruntime.get_available_providers():
        raise NirvanaError(
            f"This onnxruntime has no {provider!r}; "
            f"it has {', '.join(onnxruntime.get_available_providers())}.",
            hint="nirvana-deploy doctor",
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        if in_float32:
            return _session_beside(model, _float32_twin(model), options)
        asked = [(provider, dict(provider_options or {}))]
        session = onnxruntime.InferenceSession(model, options, providers=asked)
    except Exception as error:  # the binding has no common base class for its load errors
        missing = not (model.parent / DATA_FILE).is_file() and DATA_FILE in str(error)
        reason = f"{DATA_FILE} is missing beside it" if missing else str(error)
        if "NOT_IMPLEMENTED" in reason:
            raise NirvanaError(
                f"{model} cannot run on {provider}: {reason}.",
                hint="ONNX Runtime has no bfloat16 arithmetic on the CPU: export with --dtype fp32 or fp16.",
            ) from error
        raise NirvanaError(f"{model} cannot be loaded: {reason}.", hint=export_hint(model.parent)) from error
    if provider not in session.get_providers():
        raise NirvanaError(
            f"{provider} does not start on this machine: ONNX Runtime fell back to "
            f"{', '.join(session.get_providers())}. Its libraries or the GPU are missing.",
            hint="nirvana-deploy doctor",
        )
    require_schema(model, session.get_modelmeta().custom_metadata_map.get(SCHEMA_KEY))
    return session


def graph_values(
    model: Path, feeds: Callable[[Sequence[Any]], Mapping[str, NDArray[Any]]], names: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """Values inside the graph of ``model``, by name; ``feeds`` makes the inputs from the session's own.

    Computed in float32 whatever the model's dtype (``float32_twin.py``), so inputs are float32 too.
    The file is not changed: the extra outputs live in a copy of the graph that stays in memory.
    """
    import onnx  # not at the top: the benchmark's workers would count it in their memory

    graph = _float32_twin(model)
    kept = {output.name for output in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in kept)
    session = _session_beside(model, graph, onnxruntime.SessionOptions())
    found = session.run(list(names), dict(feeds(session.get_inputs())))
    return dict(zip(names, found, strict=True))


def _float32_twin(model: Path) -> Any:
    from nirvana_deploy.runtime.onnxruntime.float32_twin import float32_twin  # imports onnx: see graph_values

    return float32_twin(model)


def _session_beside(model: Path, changed: Any, options: Any) -> Any:
    """A session on a changed copy of ``model`` in memory, whose external data lies beside the file.

    These sessions are references, so activations stay float32: where DequantizeLinear meets MatMul, ONNX
    Runtime otherwise makes one operator of them that rounds its input to 8 bits.
    """
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _FLOAT32_ACCURACY)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(model.parent)
    )
    return onnxruntime.InferenceSession(
        changed.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def export_hint(folder: Path) -> str:
    """What to do about a folder that cannot be used."""
    return f"Export it again: nirvana-deploy export CHECKPOINT --out {folder}"


def first_names(names: Sequence[str] | Mapping[str, Any], at_most: int = 4) -> str:
    """The first names of a graph's inputs or outputs, for a message."""
    listed = list(names)
    return ", ".join(listed[:at_most]) + (", ..." if len(listed) > at_most else "")


def static_dimension(node: Any, axis: int, model: Path) -> int:
    """Dimension ``axis`` of a graph input or output, which must be a number and not a name."""
    size = node.shape[axis] if len(node.shape) > axis else None
    if not isinstance(size, int):
        raise NirvanaError(
            f"{model}: dimension {axis} of {node.name!r} must be static, got {node.shape}.",
            hint=export_hint(model.parent),
        )
    return size


def as_ort(array: NDArray[Any], device: str = "cpu") -> Any:
    """An OrtValue on the array's own memory (it keeps the array alive), or a copy of it on ``cuda``."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)


def as_numpy(value: Any) -> NDArray[np.float32]:
    """Logits as float32, on the runtime's own memory where the binding speaks DLPack."""
    return as_array(value).astype(np.float32, copy=False)


def as_array(value: Any) -> NDArray[Any]:
    """An OrtValue's numbers: on its own memory where that is the host's and the binding speaks DLPack."""
    on_host = hasattr(value, "__dlpack__") and value.device_name() == "cpu"
    return np.from_dlpack(value) if on_host else np.asarray(value.numpy())
