"""Run an exported decoder folder in OpenVINO: one compiled model, one request for each batch.

A request keeps the cache of its sequences (``stateful.py``), and nothing is copied from step to step. A state
that is continued a second time loses what followed it the first time, as in ONNX Runtime's in-place caches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.machine import checked_threads
from nirvana_deploy.export.packed import unpacked_names
from nirvana_deploy.output.layout import CONTEXT_KEY
from nirvana_deploy.runtime.openvino.installed import openvino_module
from nirvana_deploy.runtime.openvino.session import cache_type, compiled, metadata_of, read_portable
from nirvana_deploy.runtime.openvino.stateful import BEAMS
from nirvana_deploy.runtime.runner import Lineage, checked_prompts, require_context

_LINEAR = ".matmul"
"""Follows a linear's name in the name of its product, where weights alone are quantized."""


@dataclass(frozen=True)
class DecodeState:
    """What the decoder remembers after S tokens of N sequences; continuing it makes void what followed it."""

    attention_mask: NDArray[np.int64]
    """[N, S]: 1 for a token, 0 for left padding."""
    request: Any
    """Holds the cache."""
    lineage: Lineage
    """Which states of the request are still true."""
    mark: int = 0
    """Which of them this one is."""


class OpenVinoDecoder:
    """One exported decoder folder compiled for one device.

    ``threads`` are the CPU's. Raises NirvanaError as :func:`read_portable` and :func:`compiled` do.
    """

    start_token = None
    runtime: str
    threads: int
    vocab_size: int
    """V."""
    context_tokens: int | None
    """Positions that the model has, where the graph says so."""

    def __init__(self, folder: Path, *, runtime: str, threads: int | None = None) -> None:
        self.runtime, self.threads = runtime, checked_threads(threads)
        model = read_portable(folder)
        said = metadata_of(model).get(CONTEXT_KEY, "")
        self.context_tokens = int(said) if said.isdecimal() else None
        self.vocab_size = model.output("logits").get_partial_shape()[2].get_length()
        self._model = compiled(model, runtime, threads=self.threads, precision=cache_type(model))

    def __enter__(self) -> OpenVinoDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the model go: its weights are freed with the last state."""
        del self._model

    def prefill(
        self,
        tokens: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        answer: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], DecodeState]:
        """Read prompts [N, T] and answers [N, A] behind them; returns logits [N, T + A, V] and the state.

        The mask is 0 where a prompt is padded on the left, and None when none is. A graph made with last
        logits only returns [N, 1, V].
        """
        tokens, mask = checked_prompts(
            tokens,
            attention_mask,
            answer,
            vocab_size=self.vocab_size,
            context_tokens=self.context_tokens,
        )
        return self._step(tokens, DecodeState(mask, self._model.create_infer_request(), Lineage()))

    def decode(
        self, tokens: NDArray[np.int64], state: DecodeState
    ) -> tuple[NDArray[np.float32], DecodeState]:
        """Read one more token per sequence, [N, 1]; returns logits [N, 1, V] and the state after it."""
        before = state.attention_mask
        mask = np.concatenate([before, np.ones((len(tokens), 1), dtype=np.int64)], axis=1)
        require_context(int(mask.sum(axis=1).max()), self.context_tokens)
        if state.lineage.newest != state.mark:
            state.lineage.require(state.mark)
            _forget_behind(state.request, before.shape[1])
        return self._step(tokens, DecodeState(mask, state.request, state.lineage, state.mark))

    def linears(self) -> Counter[str]:
        """Linears by the type of the weights that the compiled model computes with (``CountsLinears``).

        Those that were packed into one product count each.
        """
        found: Counter[str] = Counter()
        for node in self._model.get_runtime_model().get_ops():
            said = node.get_rt_info()
            if said["layerType"].astype(str) == "FullyConnected":
                name = node.get_friendly_name().removesuffix(_LINEAR)
                found[said["runtimePrecision"].astype(str)] += len(unpacked_names(name))
        return found

    def _step(self, tokens: NDArray[np.int64], state: DecodeState) -> tuple[NDArray[np.float32], DecodeState]:
        """Run the graph on [N, T] new tokens; the state's mask [N, S+T] covers past and new ones."""
        mask, request = state.attention_mask, state.request
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -tokens.shape[1] :]
        feeds = {
            "input_ids": np.ascontiguousarray(tokens),
            "attention_mask": mask,
            "position_ids": np.ascontiguousarray(positions),
            BEAMS: np.arange(len(tokens), dtype=np.int32),
        }
        request.infer(feeds, share_inputs=True)
        logits = request.get_tensor("logits").data.copy()  # the next step writes there
        mark = state.lineage.advance(state.mark)
        return logits, DecodeState(mask, request, state.lineage, mark)


def open_decoder(path: Path, *, runtime: str, threads: int | None = None) -> OpenVinoDecoder:
    """Open an ONNX folder with the device of ``runtime``."""
    return OpenVinoDecoder(path, runtime=runtime, threads=threads)


def _forget_behind(request: Any, slots: int) -> None:
    """Shorten every cache [N, K, S, d] of a request to its first ``slots`` slots."""
    tensor_of = openvino_module().Tensor
    for variable in request.query_state():
        whole = variable.state
        N, K, _, d = whole.shape
        kept = tensor_of(whole.element_type, [N, K, slots, d])
        kept.data[:] = whole.data[:, :, :slots]
        variable.state = kept
