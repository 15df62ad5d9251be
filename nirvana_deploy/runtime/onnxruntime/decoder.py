"""Run an exported decoder folder in ONNX Runtime: one session, one interface for every flavor of the graph.

Everything about the model is read from the session's own inputs, so the layers may differ in KV heads. A
cache that the graph concatenates (``portable``) stays in OrtValues where the runtime put it; one that it
updates in place (``gqa``, ``static-cache``) is allocated once (``slots.py``), and bound as input and output
at the same time. Prompts of a batch are padded on the left whatever the flavor: where a graph wants its rows
to start in slot 0, they are moved there and back. The session's own defaults stay (``benchmarks/NOTES.md``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import checked_threads
from nirvana_deploy.output.layout import CONTEXT_KEY, FLAVOR_KEY, MODEL_FILE
from nirvana_deploy.runtime import beside
from nirvana_deploy.runtime.onnxruntime.rows import joined_caches, joined_masks, unpadded
from nirvana_deploy.runtime.onnxruntime.session import (
    CACHE_DTYPES,
    as_array,
    as_numpy,
    as_ort,
    export_hint,
    first_names,
    graph_values,
    open_session,
    static_dimension,
)
from nirvana_deploy.runtime.onnxruntime.slots import (
    CacheLayout,
    SlotCache,
    moved_left,
    moved_right,
    ones_then_zeros,
    require_left_padding,
)
from nirvana_deploy.runtime.runner import NoRoomError, checked_prompts, require_context
from nirvana_deploy.runtime.table import runtime_of_provider

_PAST_KEY = re.compile(r"past_key_values\.(\d+)\.key")


@dataclass(frozen=True)
class DecodeState:
    """What the decoder remembers after S tokens of N sequences. Immutable: a step returns a new one.

    With buffers that are written in place, continuing a state makes void what followed it before.

    ONNX Runtime's binding hands out all outputs of a step as one vector, so a state keeps the memory of
    its step's logits too; drop prefill states of long prompts that are not decoded from.
    """

    cache: tuple[Any, ...]
    """OrtValues key, value of layer 0, key, value of layer 1, ...: each [N, K_i, S, d] or longer."""
    attention_mask: NDArray[np.int64]
    """[N, S]: 1 for a token, 0 for left padding."""
    slots: SlotCache | None = None
    """The buffers of ``cache``, where they are written in place."""
    mark: int = 0
    """Which state of these buffers it is."""


class OrtDecoder:
    """One exported decoder folder in one ONNX Runtime session.

    ``threads`` is the size of the intra-op pool, the calling thread included; None means
    ``default_threads()``. ``in_float32`` computes a half-precision model in float32 on the CPU, from the
    same stored weights (``float32_twin.py``). Raises NirvanaError when the folder is incomplete, corrupt, or
    not a decoder. ``headroom_tokens`` are slots beyond the prompt in a buffer that can grow;
    ``profile`` as in ``open_session``.
    """

    start_token = None
    runtime: str
    """For example ``onnxruntime-cpu``."""
    threads: int
    kv_heads: tuple[int, ...]
    """K of each layer."""
    head_dim: int
    """d."""
    vocab_size: int
    """V."""
    last_logits: bool
    """The graph gives the logits of the last position only."""
    max_tokens: int | None
    """What the cache holds, prompt and answer together; None for a cache that grows."""
    context_tokens: int | None
    """Positions that the model has, where the graph says so."""
    in_place: bool
    """The KV cache is one buffer that every step writes into."""

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        provider: str = "CPUExecutionProvider",
        provider_options: Mapping[str, str] | None = None,
        in_float32: bool = False,
        headroom_tokens: int = 256,
        profile: Path | None = None,
    ) -> None:
        self.threads = checked_threads(threads)
        self._headroom_tokens = headroom_tokens
        model = folder / MODEL_FILE
        self._session = open_session(
            model,
            threads=self.threads,
            provider=provider,
            provider_options=provider_options,
            in_float32=in_float32,
            profile=profile,
        )
        self._device = "cpu" if provider == "CPUExecutionProvider" else "cuda"
        self._binds_outputs = self._device != "cpu"  # else ONNX Runtime brings every output to the host
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
        self.runtime = runtime_of_provider(provider)
        names = tuple(f"{layer}.{part}" for layer in layers for part in ("key", "value"))
        past = [inputs[f"past_key_values.{name}"] for name in names]
        dtype = CACHE_DTYPES.get(past[0].type)
        if dtype is None:
            raise NirvanaError(
                f"{model} keeps its KV cache as {past[0].type}; "
                f"this runtime reads {' and '.join(CACHE_DTYPES)}."
            )
        shapes = tuple((static_dimension(node, 1, model), static_dimension(node, 3, model)) for node in past)
        self._layout = CacheLayout(names=names, shapes=shapes, dtype=dtype)
        self._output_names = ["logits", *(f"present.{name}" for name in names)]
        self._token_inputs = inputs.keys() & {
            "input_ids",
            "attention_mask",
            "position_ids",
            "write_indices",
        }
        self.in_place = "write_indices" in inputs or _shares_buffers(self._session, folder)
        slots = past[0].shape[2]
        self.max_tokens = slots if isinstance(slots, int) else None
        self.kv_heads = tuple(heads for heads, _ in shapes[::2])
        self.head_dim = shapes[0][1]
        self.vocab_size = static_dimension(outputs["logits"], 2, model)
        self.last_logits = outputs["logits"].shape[1] == 1
        said = self._session.get_modelmeta().custom_metadata_map.get(CONTEXT_KEY, "")
        self.context_tokens = int(said) if said.isdecimal() else None

    def __enter__(self) -> OrtDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the session go: weights and arenas are freed with the last state."""
        del self._session

    def end_profiling(self) -> tuple[Path, ...]:
        """Write what was profiled so far, of a runner that was opened with ``profile``; returns the file."""
        return (Path(self._session.end_profiling()),)

    def prefill(
        self,
        tokens: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        answer: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], DecodeState]:
        """Read prompts [N, T] and answers [N, A] behind them; returns logits [N, T + A, V] and the state.

        Logits are read-only. The mask is 0 where a prompt is padded on the left, and None when none is.
        A graph made with last logits only returns [N, 1, V].
        """
        tokens, mask = checked_prompts(
            tokens,
            attention_mask,
            answer,
            vocab_size=self.vocab_size,
            context_tokens=self.context_tokens,
        )
        if self.in_place:
            return self._prefill_in_place(tokens, mask)
        empty = self._layout.arrays(len(tokens), 0)
        return self._step(tokens, mask, tuple(as_ort(array, self._device) for array in empty))

    def decode(
        self, tokens: NDArray[np.int64], state: DecodeState
    ) -> tuple[NDArray[np.float32], DecodeState]:
        """Read one more token per sequence, [N, 1]; returns logits [N, 1, V] and the state after it."""
        grown = np.ones((len(tokens), state.attention_mask.shape[1] + 1), dtype=np.int64)
        grown[:, :-1] = state.attention_mask
        require_context(int(grown.sum(axis=1).max()), self.context_tokens)
        if state.slots is not None:
            return self._step_in_place(tokens, grown, state.slots, state.mark)
        return self._step(tokens, grown, state.cache)

    def joined(self, state: DecodeState, more: DecodeState) -> DecodeState:
        """The state of all sequences of two states; copies their caches."""
        mask = joined_masks([state.attention_mask, more.attention_mask])
        pairs = zip(self._arrays(state), self._arrays(more), strict=True)
        return self._state([joined_caches(pair, in_place=self.in_place) for pair in pairs], mask)

    def kept(self, state: DecodeState, rows: Sequence[int]) -> DecodeState:
        """The state of some sequences of a state; copies their caches."""
        mask = state.attention_mask[list(rows)]
        begin = unpadded(mask)
        arrays = [array[list(rows)] for array in self._arrays(state)]
        if not self.in_place:
            arrays = [np.ascontiguousarray(array[:, :, begin:]) for array in arrays]
        return self._state(arrays, mask[:, begin:])

    def _arrays(self, state: DecodeState) -> list[NDArray[Any]]:
        """The caches of a state in the host's memory, for reading."""
        if state.slots is not None and (self._device == "cpu" or not state.slots.values):
            return state.slots.arrays  # on another device as well, until the first step from them
        return [as_array(value) for value in (state.slots.values if state.slots else state.cache)]

    def _state(self, arrays: list[NDArray[Any]], mask: NDArray[np.int64]) -> DecodeState:
        if self.in_place:
            return DecodeState(cache=(), attention_mask=mask, slots=SlotCache(arrays))
        cache = tuple(as_ort(array, self._device) for array in arrays)
        return DecodeState(cache=cache, attention_mask=mask)

    def _step(
        self, tokens: NDArray[np.int64], attention_mask: NDArray[np.int64], cache: Sequence[Any]
    ) -> tuple[NDArray[np.float32], DecodeState]:
        """Run the graph on [N, T] new tokens; ``attention_mask`` [N, S+T] covers past and new ones."""
        positions = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)[:, -tokens.shape[1] :]
        feeds = self._feeds(input_ids=tokens, attention_mask=attention_mask, position_ids=positions)
        feeds.update(zip((f"past_key_values.{name}" for name in self._layout.names), cache, strict=True))
        run = self._run_on_device if self._binds_outputs else self._session.run_with_ort_values
        logits, *present = run(self._output_names, feeds)
        return as_numpy(logits), DecodeState(cache=tuple(present), attention_mask=attention_mask)

    def _run_on_device(self, names: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """Run with logits brought to the host and everything else left on the device."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, "cpu" if name == "logits" else self._device, 0)
        self._session.run_with_iobinding(binding)
        outputs: list[Any] = binding.get_outputs()
        return outputs

    def _prefill_in_place(
        self, tokens: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], DecodeState]:
        """Prompts [N, T] padded on the left, into new buffers where every row starts in slot 0."""
        require_left_padding(mask)
        padded = not mask.all()
        if padded and self.last_logits:
            raise NirvanaError(
                "This graph gives the logits of the last position only, where prompts of different lengths "
                "have their padding.",
                hint="Prefill prompts of one length, or export without --last-logits.",
            )
        slots = self.max_tokens or tokens.shape[1] + self._headroom_tokens
        buffers = SlotCache(self._layout.arrays(len(tokens), slots))
        rows = moved_right(mask, tokens) if padded else tokens
        logits, state = self._step_in_place(rows, mask, buffers, 0)
        return (moved_left(mask, logits) if padded else logits), state

    def _step_in_place(
        self, tokens: NDArray[np.int64], mask: NDArray[np.int64], buffers: SlotCache, mark: int
    ) -> tuple[NDArray[np.float32], DecodeState]:
        """Run the graph on rows [N, T] that start in slot 0; ``mask`` [N, S+T] counts each row's tokens."""
        lengths = mask.sum(axis=1)
        prompt = tokens.shape[1] == mask.shape[1]
        past = np.zeros_like(lengths) if prompt else lengths - tokens.shape[1]
        end = int(past.max()) + tokens.shape[1]
        if end > buffers.slots:
            buffers, mark = self._grown(buffers, end), 0
        mark = buffers.advance(mark)
        feeds = self._feeds(
            input_ids=tokens,
            attention_mask=ones_then_zeros(lengths, end),
            position_ids=past[:, None] + np.arange(tokens.shape[1]),
            write_indices=past,
        )
        if buffers.binding is None:
            buffers.binding = self._bound(buffers)
        for name, value in feeds.items():
            buffers.binding.bind_ortvalue_input(name, value)
        buffers.binding.bind_output("logits")  # new memory: what was returned before stays as it is
        self._session.run_with_iobinding(buffers.binding)
        logits, *cache = buffers.binding.get_outputs()
        state = DecodeState(cache=tuple(cache), attention_mask=mask, slots=buffers, mark=mark)
        return as_numpy(logits), state

    def _bound(self, buffers: SlotCache) -> Any:
        """A binding in which every buffer is input and output."""
        binding = self._session.io_binding()
        binding.bind_output("logits")
        buffers.values = [as_ort(array, self._device) for array in buffers.arrays]
        for name, value in zip(self._layout.names, buffers.values, strict=True):
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        return binding

    def _grown(self, buffers: SlotCache, needed: int) -> SlotCache:
        if self.max_tokens is not None:
            raise NoRoomError(
                f"The cache of this graph holds {self.max_tokens} tokens, and {needed} are needed.",
                hint="Export again with a larger --cache-length, or ask for fewer tokens.",
            )
        if self._device != "cpu" and buffers.values:
            buffers.arrays = [value.numpy() for value in buffers.values]
        return buffers.grown(max(needed, 2 * buffers.slots))

    def _feeds(self, **of_tokens: NDArray[np.int64]) -> dict[str, Any]:
        """Those of the inputs that the graph has."""
        return {
            name: as_ort(np.ascontiguousarray(of_tokens[name], dtype=np.int64)) for name in self._token_inputs
        }


def session_outputs(
    folder: Path, tokens: NDArray[np.int64], names: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """Values inside the graph for prompts [N, T], by name: for finding where a computation departs.

    Computed in float32 whatever the model's dtype. The folder is not changed: the extra outputs live in a
    copy of the graph that stays in memory.
    """
    mask = np.ones_like(tokens)
    of_tokens = {
        "input_ids": tokens,
        "attention_mask": mask,
        "position_ids": np.cumsum(mask, axis=1) - 1,
        "write_indices": np.zeros(len(tokens), dtype=np.int64),
    }

    def feeds(inputs: Sequence[Any]) -> dict[str, NDArray[Any]]:
        made = {}
        for node in inputs:
            if node.name in of_tokens:
                made[node.name] = of_tokens[node.name]
            else:
                _, heads, slots, dim = node.shape
                shape = (len(tokens), heads, slots if isinstance(slots, int) else 0, dim)
                made[node.name] = np.zeros(shape, dtype=np.float32)
        return made

    return graph_values(folder / MODEL_FILE, feeds, names)


def _shares_buffers(session: Any, folder: Path) -> bool:
    """Whether past and present may be one buffer: what the graph says of itself, else genai_config.json."""
    metadata = session.get_modelmeta().custom_metadata_map
    if FLAVOR_KEY in metadata:
        return bool(metadata[FLAVOR_KEY] == "gqa")
    return beside.shares_buffers(folder)
