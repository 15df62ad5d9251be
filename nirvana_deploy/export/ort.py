"""Run an exported decoder folder in ONNX Runtime: one session, KV cache kept where the runtime put it.

Everything about the model is read from the session's own inputs, so the layers may differ in KV heads.
Between two steps the cache stays in OrtValues and logits are viewed, not copied. The three Python entry
points of ONNX Runtime (``run``, ``run_with_ort_values``, ``io_binding``) cost the same per token within
the noise; the one used here needs no rebinding and never shows the cache to numpy.

The session's own defaults stay, as measured on SmolLM2 (538 MB in fp32): prepacking replaces the weights
rather than doubling them (607 MB resident after loading, 720 MB at the peak, which the head's repacking
sets), and without it decode slows by a quarter to save 50 MB of peak; arena and memory pattern change
neither.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from nirvana_deploy.errors import MissingExtraError, NirvanaError
from nirvana_deploy.export import DATA_FILE, MODEL_FILE

try:
    import onnxruntime
except ModuleNotFoundError as error:
    if error.name != "onnxruntime":
        raise
    raise MissingExtraError("Running ONNX models", package="onnxruntime", extra="cpu") from None


_PAST_KEY = re.compile(r"past_key_values\.(\d+)\.key")
_CACHE_DTYPES: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
_RUNTIMES = {"CPUExecutionProvider": "onnxruntime-cpu", "CUDAExecutionProvider": "onnxruntime-cuda"}


def default_threads() -> int:
    """Physical cores that this process may use: what decode gains from, without hyper-threads."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return min(physical, allowed)


@dataclass(frozen=True)
class DecodeState:
    """What the decoder remembers after S tokens of N sequences. Immutable: a step returns a new one.

    ONNX Runtime's binding hands out all outputs of a step as one vector, so a state keeps the memory of
    its step's logits too; drop prefill states of long prompts that are not decoded from.
    """

    cache: tuple[Any, ...]
    """OrtValues key, value of layer 0, key, value of layer 1, ...: each [N, K_i, S, d]."""
    attention_mask: NDArray[np.int64]
    """[N, S]: 1 for a token, 0 for left padding."""


class OrtDecoder:
    """One exported decoder folder in one ONNX Runtime session.

    ``threads`` is the size of the intra-op pool, the calling thread included; None means
    ``default_threads()``. Raises NirvanaError when the folder is incomplete, corrupt, or not a decoder.
    """

    runtime: str
    """For example ``onnxruntime-cpu``."""
    threads: int
    kv_heads: tuple[int, ...]
    """K of each layer."""
    head_dim: int
    """d."""
    vocab_size: int
    """V."""

    def __init__(
        self, folder: Path, *, threads: int | None = None, provider: str = "CPUExecutionProvider"
    ) -> None:
        self.threads = threads if threads is not None else default_threads()
        if self.threads < 1:
            raise NirvanaError(f"threads must be at least 1, got {self.threads}.")
        self._session = _open_session(folder, threads=self.threads, provider=provider)
        inputs = {node.name: node for node in self._session.get_inputs()}
        outputs = {node.name: node for node in self._session.get_outputs()}
        layers = sorted(int(m[1]) for m in map(_PAST_KEY.fullmatch, inputs) if m)
        if not layers or "logits" not in outputs or "input_ids" not in inputs:
            raise NirvanaError(
                f"{folder / MODEL_FILE} is not a decoder with a KV cache: its inputs are {_first(inputs)}, "
                f"its outputs {_first(outputs)}; it needs input_ids, past_key_values.0.key, ... and logits.",
                hint=_export_hint(folder),
            )
        self.runtime = _RUNTIMES.get(provider, provider)
        names = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
        self._past_names = [f"past_key_values.{name}" for name in names]
        self._output_names = ["logits", *(f"present.{name}" for name in names)]
        self._token_inputs = inputs.keys() & {"input_ids", "attention_mask", "position_ids"}
        self._cache_shapes = [
            (_static(inputs[name], 1, folder), _static(inputs[name], 3, folder)) for name in self._past_names
        ]
        self._cache_dtype = _CACHE_DTYPES.get(inputs[self._past_names[0]].type)
        if self._cache_dtype is None:
            raise NirvanaError(
                f"{folder / MODEL_FILE} keeps its KV cache as {inputs[self._past_names[0]].type}; "
                f"this runtime reads {' and '.join(_CACHE_DTYPES)}."
            )
        self.kv_heads = tuple(heads for heads, _ in self._cache_shapes[::2])
        self.head_dim = self._cache_shapes[0][1]
        self.vocab_size = _static(outputs["logits"], 2, folder)

    def prefill(
        self, tokens: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], DecodeState]:
        """Read whole prompts; returns logits [N, T, V], read-only, and the state after them.

        ``tokens`` and ``attention_mask`` are [N, T] int64; the mask is 0 where a prompt is padded on the
        left, and None when none is.
        """
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise NirvanaError(f"Prompts must be an array [N, T] of at least one token, got {tokens.shape}.")
        if attention_mask is None:
            attention_mask = np.ones(tokens.shape, dtype=np.int64)
        cache = tuple(
            _as_ort(np.empty((tokens.shape[0], heads, 0, dim), dtype=self._cache_dtype))
            for heads, dim in self._cache_shapes
        )
        return self._step(tokens, attention_mask, cache)

    def decode(
        self, tokens: NDArray[np.int64], state: DecodeState
    ) -> tuple[NDArray[np.float32], DecodeState]:
        """Read one more token per sequence, [N, 1]; returns logits [N, 1, V] and the state after it."""
        grown = np.ones((len(tokens), state.attention_mask.shape[1] + 1), dtype=np.int64)
        grown[:, :-1] = state.attention_mask
        return self._step(tokens, grown, state.cache)

    def generate(
        self,
        tokens: NDArray[np.int64],
        *,
        max_new_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]:
        """Continue one prompt [1, T] greedily; returns the new ids, a stop token included when one came."""
        logits, state = self.prefill(tokens)
        new_ids: list[int] = []
        while len(new_ids) < max_new_tokens:
            token = int(logits[0, -1].argmax())
            new_ids.append(token)
            if on_token is not None:
                on_token(token)
            if token in eos_token_ids or len(new_ids) == max_new_tokens:
                break
            logits, state = self.decode(np.array([[token]], dtype=np.int64), state)
        return new_ids

    def _step(
        self, tokens: NDArray[np.int64], attention_mask: NDArray[np.int64], cache: Sequence[Any]
    ) -> tuple[NDArray[np.float32], DecodeState]:
        """Run the graph on [N, T] new tokens; ``attention_mask`` [N, S+T] covers past and new ones."""
        positions = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)[:, -tokens.shape[1] :]
        of_tokens = {"input_ids": tokens, "attention_mask": attention_mask, "position_ids": positions}
        feeds = {
            name: _as_ort(np.ascontiguousarray(of_tokens[name], dtype=np.int64))
            for name in self._token_inputs
        }
        feeds.update(zip(self._past_names, cache, strict=True))
        logits, *present = self._session.run_with_ort_values(self._output_names, feeds)
        return _as_numpy(logits), DecodeState(cache=tuple(present), attention_mask=attention_mask)


def session_outputs(
    folder: Path, tokens: NDArray[np.int64], names: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """Values inside the graph for prompts [N, T], by name: for finding where a computation departs.

    The folder is not changed: the extra outputs live in a copy of the graph that stays in memory.
    """
    import onnx  # not at the top: the benchmark's workers would count it in their memory

    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    kept = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in kept)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    mask = np.ones_like(tokens)
    feeds = {"input_ids": tokens, "attention_mask": mask, "position_ids": np.cumsum(mask, axis=1) - 1}
    for node in session.get_inputs():
        if _PAST_KEY.fullmatch(node.name.replace(".value", ".key")):
            shape = (len(tokens), node.shape[1], 0, node.shape[3])
            feeds[node.name] = np.empty(shape, dtype=_CACHE_DTYPES[node.type])
    return dict(zip(names, session.run(list(names), feeds), strict=True))


def _open_session(folder: Path, *, threads: int, provider: str) -> Any:
    model = folder / MODEL_FILE
    if not model.is_file():
        raise NirvanaError(f"{folder} holds no {MODEL_FILE}.", hint=_export_hint(folder))
    if provider not in onnxruntime.get_available_providers():
        raise NirvanaError(
            f"This onnxruntime has no {provider!r}; "
            f"it has {', '.join(onnxruntime.get_available_providers())}.",
            hint="nirvana-deploy doctor",
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # the binding has no common base class for its load errors
        missing = not (folder / DATA_FILE).is_file() and DATA_FILE in str(error)
        reason = f"{DATA_FILE} is missing beside it" if missing else str(error)
        raise NirvanaError(f"{model} cannot be loaded: {reason}.", hint=_export_hint(folder)) from error


def _export_hint(folder: Path) -> str:
    return f"Export it again: nirvana-deploy export CHECKPOINT --out {folder}"


def _first(names: Sequence[str] | dict[str, Any], at_most: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:at_most]) + (", ..." if len(listed) > at_most else "")


def _static(node: Any, axis: int, folder: Path) -> int:
    """Dimension ``axis`` of a graph input or output, which must be a number and not a name."""
    size = node.shape[axis] if len(node.shape) > axis else None
    if not isinstance(size, int):
        raise NirvanaError(
            f"{folder / MODEL_FILE}: dimension {axis} of {node.name!r} must be static, got {node.shape}.",
            hint=_export_hint(folder),
        )
    return size


def _as_ort(array: NDArray[Any]) -> Any:
    """An OrtValue on the array's own memory (it keeps the array alive)."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _as_numpy(value: Any) -> NDArray[np.float32]:
    """Logits as float32, on the runtime's own memory where the binding speaks DLPack."""
    array = np.from_dlpack(value) if hasattr(value, "__dlpack__") else value.numpy()
    return array.astype(np.float32, copy=False)
