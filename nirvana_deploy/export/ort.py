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

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.export import MODEL_FILE
from nirvana_deploy.export.ort_session import (
    CACHE_DTYPES,
    RUNTIMES,
    as_numpy,
    as_ort,
    checked_threads,
    export_hint,
    first_names,
    graph_values,
    open_session,
    static_dimension,
)

_PAST_KEY = re.compile(r"past_key_values\.(\d+)\.key")


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
        self.threads = checked_threads(threads)
        model = folder / MODEL_FILE
        self._session = open_session(model, threads=self.threads, provider=provider)
        inputs = {node.name: node for node in self._session.get_inputs()}
        outputs = {node.name: node for node in self._session.get_outputs()}
        layers = sorted(int(m[1]) for m in map(_PAST_KEY.fullmatch, inputs) if m)
        if not layers or "logits" not in outputs or "input_ids" not in inputs:
            raise NirvanaError(
                f"{model} is not a decoder with a KV cache: its inputs are {first_names(inputs)}, "
                f"its outputs {first_names(outputs)}; "
                "it needs input_ids, past_key_values.0.key, ... and logits.",
                hint=export_hint(folder),
            )
        self.runtime = RUNTIMES.get(provider, provider)
        names = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
        self._past_names = [f"past_key_values.{name}" for name in names]
        self._output_names = ["logits", *(f"present.{name}" for name in names)]
        self._token_inputs = inputs.keys() & {"input_ids", "attention_mask", "position_ids"}
        self._cache_shapes = [
            (
                static_dimension(inputs[name], 1, model),
                static_dimension(inputs[name], 3, model),
            )
            for name in self._past_names
        ]
        self._cache_dtype = CACHE_DTYPES.get(inputs[self._past_names[0]].type)
        if self._cache_dtype is None:
            raise NirvanaError(
                f"{model} keeps its KV cache as {inputs[self._past_names[0]].type}; "
                f"this runtime reads {' and '.join(CACHE_DTYPES)}."
            )
        self.kv_heads = tuple(heads for heads, _ in self._cache_shapes[::2])
        self.head_dim = self._cache_shapes[0][1]
        self.vocab_size = static_dimension(outputs["logits"], 2, model)

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
            as_ort(np.empty((tokens.shape[0], heads, 0, dim), dtype=self._cache_dtype))
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
            name: as_ort(np.ascontiguousarray(of_tokens[name], dtype=np.int64)) for name in self._token_inputs
        }
        feeds.update(zip(self._past_names, cache, strict=True))
        logits, *present = self._session.run_with_ort_values(self._output_names, feeds)
        return as_numpy(logits), DecodeState(cache=tuple(present), attention_mask=attention_mask)


def session_outputs(
    folder: Path, tokens: NDArray[np.int64], names: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """Values inside the graph for prompts [N, T], by name: for finding where a computation departs.

    The folder is not changed: the extra outputs live in a copy of the graph that stays in memory.
    """
    mask = np.ones_like(tokens)
    of_tokens = {"input_ids": tokens, "attention_mask": mask, "position_ids": np.cumsum(mask, axis=1) - 1}

    def feeds(inputs: Sequence[Any]) -> dict[str, NDArray[Any]]:
        empty = {
            node.name: np.empty((len(tokens), node.shape[1], 0, node.shape[3]), CACHE_DTYPES[node.type])
            for node in inputs
            if _PAST_KEY.fullmatch(node.name.replace(".value", ".key"))
        }
        return of_tokens | empty

    return graph_values(folder / MODEL_FILE, feeds, names)
