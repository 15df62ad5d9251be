"""Run an exported encoder-decoder folder in ONNX Runtime: two sessions, caches where the runtime put them.

The first decoder step computes the keys and values of the cross-attention from the encoder's states; later
steps hand the same memory in again and do not ask for it back, so graphs of optimum, which give back nothing
then, run here too. Prompts may be padded on either side: T5 knows positions
by their distance alone. The decoder's side is never padded, every sequence begins with the start token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import checked_threads
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.model.reading import first_decoder_token
from nirvana_deploy.output.layout import DECODER_FILE, ENCODER_FILE
from nirvana_deploy.runtime.onnxruntime.session import (
    CACHE_DTYPES,
    as_numpy,
    as_ort,
    export_hint,
    first_names,
    graph_values,
    open_session,
    static_dimension,
)
from nirvana_deploy.runtime.runner import checked_prompts, started
from nirvana_deploy.runtime.table import runtime_of_provider


@dataclass(frozen=True)
class Seq2SeqState:
    """What the decoder remembers after some tokens of N sequences. Immutable: a step returns a new one."""

    cache: tuple[Any, ...]
    """OrtValues in the order of the graph's inputs; per layer decoder key, value [N, K, S, d], then encoder
    key, value [N, K, E, d]."""
    encoder_states: Any
    """OrtValue [N, E, D]."""
    encoder_mask: Any
    """OrtValue [N, E], int64: 0 for padding."""
    tokens: int
    """S: tokens read by the decoder."""


class OrtSeq2Seq:
    """One exported encoder-decoder folder in two ONNX Runtime sessions.

    ``threads`` is the size of the intra-op pool of each session, of which one runs at a time. ``in_float32``
    computes a half-precision model in float32, from the same stored weights (``float32_twin.py``). Raises
    NirvanaError when the folder is incomplete, corrupt, or not an encoder-decoder.
    """

    runtime: str
    """For example ``onnxruntime-cpu``."""
    threads: int
    vocab_size: int
    """V."""
    start_token: int
    """What the decoder reads first."""
    max_tokens: int | None = None
    last_logits = False
    in_place = False

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        provider: str = "CPUExecutionProvider",
        in_float32: bool = False,
        profile: Path | None = None,
    ) -> None:
        self.threads = checked_threads(threads)
        self.runtime = runtime_of_provider(provider)
        model = folder / DECODER_FILE
        self._encoder, self._decoder = (
            open_session(
                folder / file,
                threads=self.threads,
                provider=provider,
                in_float32=in_float32,
                profile=None if profile is None else profile.with_name(f"{profile.name}-{part}"),
            )
            for part, file in (("encoder", ENCODER_FILE), ("decoder", DECODER_FILE))
        )
        inputs = {node.name: node for node in self._decoder.get_inputs()}
        outputs = {node.name: node for node in self._decoder.get_outputs()}
        self._has_branch = "use_cache_branch" in inputs  # an engine's graph tells by the caches' length
        self._past_names = [name for name in inputs if name.startswith("past_key_values.")]
        wanted = {"logits", *(_present(name) for name in self._past_names)}
        if not self._past_names or not wanted <= outputs.keys():
            raise NirvanaError(
                f"{model} is not a decoder with caches: its inputs are {first_names(inputs)}, "
                f"its outputs {first_names(outputs)}.",
                hint=export_hint(folder),
            )
        self._cache_shapes = [
            (static_dimension(inputs[name], 1, model), static_dimension(inputs[name], 3, model))
            for name in self._past_names
        ]
        dtype = CACHE_DTYPES.get(inputs[self._past_names[0]].type)
        if dtype is None:
            raise NirvanaError(
                f"{model} keeps its caches as {inputs[self._past_names[0]].type}; "
                f"this runtime reads {' and '.join(CACHE_DTYPES)}."
            )
        self._cache_dtype = dtype
        self.vocab_size = static_dimension(outputs["logits"], 2, model)
        self.start_token = start_token(folder)

    def __enter__(self) -> OrtSeq2Seq:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the sessions go: weights and arenas are freed with the last state."""
        del self._encoder, self._decoder

    def end_profiling(self) -> tuple[Path, ...]:
        """Write what was profiled so far, of a runner that was opened with ``profile``: encoder, decoder."""
        return Path(self._encoder.end_profiling()), Path(self._decoder.end_profiling())

    def encode(
        self, tokens: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
    ) -> Seq2SeqState:
        """Read prompts [N, E]; returns the state ahead of the decoder's first token."""
        tokens, prompt_mask = checked_prompts(tokens, attention_mask, vocab_size=self.vocab_size)
        mask = as_ort(_int64(prompt_mask))
        feeds = {"input_ids": as_ort(_int64(tokens)), "attention_mask": mask}
        (states,) = self._encoder.run_with_ort_values(["last_hidden_state"], feeds)
        empty = tuple(
            as_ort(np.empty((len(tokens), heads, 0, dim), dtype=self._cache_dtype))
            for heads, dim in self._cache_shapes
        )
        return Seq2SeqState(cache=empty, encoder_states=states, encoder_mask=mask, tokens=0)

    def encoder_states(
        self, tokens: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Prompts [N, E] to the encoder's states [N, E, D]."""
        return as_numpy(self.encode(tokens, attention_mask).encoder_states)

    def prefill(
        self,
        tokens: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        answer: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], Seq2SeqState]:
        """Read prompts [N, E], then an answer [N, A] behind the start token; returns logits [N, A + 1, V]."""
        state = self.encode(tokens, attention_mask)
        return self.decode(started(self.start_token, len(tokens), answer), state)

    def decode(
        self, tokens: NDArray[np.int64], state: Seq2SeqState
    ) -> tuple[NDArray[np.float32], Seq2SeqState]:
        """Read T more decoder tokens [N, T]; returns logits [N, T, V] and the state after them."""
        feeds = {
            "input_ids": as_ort(_int64(tokens)),
            "encoder_hidden_states": state.encoder_states,
            "encoder_attention_mask": state.encoder_mask,
            **dict(zip(self._past_names, state.cache, strict=True)),
        }
        if self._has_branch:
            feeds["use_cache_branch"] = as_ort(np.array([state.tokens > 0]))
        computed_before = [".encoder." in name and state.tokens > 0 for name in self._past_names]
        wanted = [
            _present(name) for name, kept in zip(self._past_names, computed_before, strict=True) if not kept
        ]
        logits, *present = self._decoder.run_with_ort_values(["logits", *wanted], feeds)
        fresh = iter(present)
        after = Seq2SeqState(
            cache=tuple(
                value if kept else next(fresh)
                for value, kept in zip(state.cache, computed_before, strict=True)
            ),
            encoder_states=state.encoder_states,
            encoder_mask=state.encoder_mask,
            tokens=state.tokens + tokens.shape[1],
        )
        return as_numpy(logits), after


def encoder_values(
    folder: Path, tokens: NDArray[np.int64], names: list[str]
) -> dict[str, NDArray[np.float32]]:
    """Values inside the encoder for prompts [N, E], by name."""
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    return graph_values(folder / ENCODER_FILE, lambda inputs: feeds, names)


def decoder_values(
    folder: Path, encoder_states: NDArray[Any], tokens: NDArray[np.int64], names: list[str]
) -> dict[str, NDArray[np.float32]]:
    """Values inside the decoder for decoder tokens [N, T] after ``encoder_states`` [N, E, D], by name."""

    def feeds(inputs: Any) -> Mapping[str, NDArray[Any]]:
        given: dict[str, NDArray[Any]] = {
            "input_ids": tokens,
            "encoder_hidden_states": encoder_states,
            "encoder_attention_mask": np.ones(encoder_states.shape[:2], dtype=np.int64),
            "use_cache_branch": np.array([False]),
        }
        for node in inputs:
            if node.name not in given:
                shape = (len(tokens), node.shape[1], 0, node.shape[3])
                given[node.name] = np.empty(shape, dtype=CACHE_DTYPES[node.type])
        return given

    return graph_values(folder / DECODER_FILE, feeds, names)


def _present(past: str) -> str:
    return past.replace("past_key_values.", "present.", 1)


def _int64(array: NDArray[Any]) -> NDArray[np.int64]:
    return np.ascontiguousarray(array, dtype=np.int64)


def start_token(folder: Path) -> int:
    """What a decoder reads first, by the config of its ``folder``; raises NirvanaError where it says none."""
    return first_decoder_token(read_json(folder / "config.json", dict[str, Any]))
