"""Run the two engines of an encoder-decoder on one device and one stream.

The decoder reads the encoder's states where they were written, one token of each sequence per pass. The first
pass fills the caches of the cross-attention, later ones return them unchanged, so all caches exist twice and
take turns. Tested like ``decoder.py`` with fakes; **it has not run on a GPU yet**.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import start_token
from nirvana_deploy.runtime.runner import NoRoomError, checked_prompts, started
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice, Driver
from nirvana_deploy.runtime.tensorrt.kv_cache import ConcatenatedCache, Shape
from nirvana_deploy.runtime.tensorrt.loading import (
    require_target,
    require_version,
    require_weights,
    tensorrt_module,
)
from nirvana_deploy.runtime.tensorrt.memory import LOGITS, largest_bytes, plan_seq2seq_memory
from nirvana_deploy.runtime.tensorrt.record import (
    DECODER,
    ENCODER,
    ENCODER_STATES,
    ENGINE_SUFFIX,
    EngineRecord,
    encoder_beside,
    read_engine_record,
)
from nirvana_deploy.runtime.tensorrt.session import Session, kernel_cache_of

_STATES, _MASK, _DECODER_MASK = "last_hidden_state", "attention_mask", "encoder_attention_mask"
_ROOM = "Build the engines smaller: nirvana-deploy build-engine DIR --max-batch 1 --max-length 512 --force"


@dataclass(frozen=True)
class EngineSeq2SeqState:
    """How far N sequences are. What was read is the runner's only cache, so a state is continued once."""

    sequences: int
    """N."""
    prompt_tokens: int
    """E."""
    tokens: int
    """S: tokens read by the decoder."""
    step: int
    """Passes that the runner had made when this state was new."""


class TensorRTSeq2Seq:
    """The engine ``decoder`` and the encoder's beside it, on one GPU. A context manager.

    ``kernel_cache``, ``driver`` and ``module`` are those of ``TensorRTRunner``. Raises what that raises, and
    NirvanaError where the two engines are not of one model, or no config.json nearby names the token that a
    decoder reads first.
    """

    runtime: str
    """``tensorrt`` or ``tensorrt-rtx``."""
    threads: int
    """1: the host only queues work."""
    vocab_size: int
    """V."""
    start_token: int
    """What the decoder reads first."""

    def __init__(
        self,
        decoder: Path,
        *,
        device_index: int = 0,
        kernel_cache: Path | None = None,
        driver: Driver | None = None,
        module: Any = None,
    ) -> None:
        paths = {DECODER: decoder, ENCODER: encoder_beside(decoder)}
        record = read_engine_record(decoder)
        if record.part == ENCODER:
            raise NirvanaError(
                f"{decoder} is the encoder of an encoder-decoder, which is opened by its decoder.",
                hint=f"Pass {decoder.stem.removesuffix(f'-{ENCODER}')}-{DECODER}{ENGINE_SUFFIX} beside it.",
            )
        self._plan = plan_seq2seq_memory(record)
        self._records = {DECODER: record, ENCODER: read_engine_record(paths[ENCODER])}
        _require_one_model(self._records[ENCODER], record)
        self.start_token = start_token(config_folder(decoder))
        trt = module if module is not None else tensorrt_module(record.runtime)
        for one in self._records.values():
            require_weights(one)
            require_version(one, trt.__version__)
        self.device = CudaDevice(index=device_index, driver=driver)
        self._sessions: dict[str, Session] = {}
        try:
            for one in self._records.values():
                require_target(one, self.device)
            self._open(paths, trt, kernel_cache)
        except BaseException:
            self.close()
            raise

    def _open(self, paths: dict[str, Path], trt: Any, kernel_cache: Path | None) -> None:
        device, record, plan = self.device, self._records[DECODER], self._plan
        of_encoder = self._records[ENCODER]
        from_host = {
            ENCODER: {name: largest_bytes(of_encoder, name) for name in ("input_ids", _MASK)},
            DECODER: plan.token_inputs_bytes,
        }
        for part, path in paths.items():
            self._sessions[part] = Session(
                path,
                self._records[part],
                module=trt,
                device=device,
                inputs_bytes=from_host[part],
                result_bytes=plan.decode_logits_bytes if part == DECODER else 0,
                kernels=kernel_cache_of(self._records[part], device, kernel_cache),
                hint=_ROOM,
            )
        logits = next(tensor for tensor in record.outputs if tensor.name == LOGITS)
        states = next(tensor for tensor in record.inputs if tensor.name == ENCODER_STATES)
        assert logits.shape[2] is not None and states.shape[2] is not None
        self.runtime, self.threads = record.runtime, 1
        self.vocab_size, self._logits_dtype, self._width = logits.shape[2], logits.dtype, states.shape[2]
        self._cache = ConcatenatedCache(record, plan, device, hint=_ROOM)
        states_bytes = largest_bytes(record, ENCODER_STATES)
        self._states = device.allocate(states_bytes, "encoder's states", hint=_ROOM)
        self._logits = device.allocate(plan.logits_bytes, "logits", hint=_ROOM)
        self._passes_ms: list[float] = []
        self._step = 0

    def __enter__(self) -> TensorRTSeq2Seq:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the device; the runner cannot be used afterwards."""
        self.device.settle()
        for session in self._sessions.values():
            session.close()
        self.device.close()

    def peak_device_bytes(self) -> int:
        """See :meth:`CudaDevice.peak_bytes`: both engines' weights and scratch memory, caches and I/O."""
        return self.device.peak_bytes()

    def device_ms(self) -> tuple[float, ...]:
        """GPU compute time of every pass since the last call of this, the encoder's ones among them."""
        passes_ms, self._passes_ms = tuple(self._passes_ms), []
        return passes_ms

    def encode(
        self, tokens: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
    ) -> EngineSeq2SeqState:
        """Read prompts [N, E], padded where the mask is 0; returns the state ahead of the first token."""
        tokens, mask = checked_prompts(tokens, attention_mask, vocab_size=self.vocab_size)
        session = self._sessions[ENCODER]
        session.queue({"input_ids": tokens, _MASK: mask}, {}, {_STATES: self._states.address})
        session.wait()
        self._passes_ms.extend(session.taken_ms())
        self._step += 1
        N, E = tokens.shape
        return EngineSeq2SeqState(sequences=N, prompt_tokens=E, tokens=0, step=self._step)

    def prefill(
        self,
        tokens: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        answer: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], EngineSeq2SeqState]:
        """Read prompts [N, E], then an answer [N, A] behind the start token; returns logits [N, A + 1, V]."""
        state = self.encode(tokens, attention_mask)
        return self.decode(started(self.start_token, len(tokens), answer), state)

    def decode(
        self, tokens: NDArray[np.int64], state: EngineSeq2SeqState
    ) -> tuple[NDArray[np.float32], EngineSeq2SeqState]:
        """Read T more decoder tokens [N, T], in as many passes; returns logits [N, T, V], the state after."""
        if state.step != self._step:
            raise NirvanaError(
                "This state is no longer in the engine's cache: another prompt or step came after it. "
                "An engine continues the latest state alone; read the prompt again."
            )
        total, longest = state.tokens + tokens.shape[1], self._plan.limits.total_tokens
        if total > longest:
            raise NoRoomError(
                f"{total} tokens of an answer, the start token among them, exceed the {longest} that "
                f"{self._records[DECODER].engine_file} has room for.",
                hint="Ask for fewer, or: nirvana-deploy build-engine DIR --max-length N --force",
            )
        parts = []
        for position in range(tokens.shape[1]):
            logits, state = self._pass(tokens[:, position : position + 1], state)
            parts.append(logits)
        return np.concatenate(parts, axis=1), state

    def _pass(
        self, tokens: NDArray[np.int64], state: EngineSeq2SeqState
    ) -> tuple[NDArray[np.float32], EngineSeq2SeqState]:
        """One decoder token [N, 1] after S = ``state.tokens``; logits [N, 1, V]."""
        N, E, session = state.sequences, state.prompt_tokens, self._sessions[DECODER]
        own = self._cache.shapes(N, state.tokens)
        cross = self._cache.shapes(N, E if state.tokens else 0)
        shapes: dict[str, Shape] = {
            ENCODER_STATES: (N, E, self._width),
            _DECODER_MASK: (N, E),
            **{name: (cross if ".encoder." in name else own)[name] for name in own},
        }
        addresses = {
            ENCODER_STATES: self._states.address,
            _DECODER_MASK: self._sessions[ENCODER].inputs[_MASK].address,
            **self._cache.addresses(),
            LOGITS: self._logits.address,
        }
        session.queue({"input_ids": tokens}, shapes, addresses)
        logits = session.result((N, 1, self.vocab_size), self._logits, dtype=self._logits_dtype)
        self._passes_ms.extend(session.taken_ms())
        self._cache.advance()
        self._step += 1
        after = EngineSeq2SeqState(sequences=N, prompt_tokens=E, tokens=state.tokens + 1, step=self._step)
        return logits, after


def _require_one_model(encoder: EngineRecord, decoder: EngineRecord) -> None:
    """Refuse two engines where one does not read what the other writes."""
    states = next((t for t in encoder.outputs if t.name == _STATES), None)
    read = next(t for t in decoder.inputs if t.name == ENCODER_STATES)
    masks = [
        next((t.dtype for t in record.inputs if t.name == name), None)
        for record, name in ((encoder, _MASK), (decoder, _DECODER_MASK))
    ]
    room = [
        [max(sizes) for sizes in zip(*(p.shapes[name][2] for p in record.profiles), strict=True)]
        for record, name in ((encoder, _MASK), (decoder, _DECODER_MASK))
        if name in record.profiles[0].shapes
    ]
    fits = states is not None and (states.dtype, states.shape[2]) == (read.dtype, read.shape[2])
    if not (fits and masks[0] == masks[1] and len(room) == 2 and room[0] == room[1]):
        raise NirvanaError(
            f"{encoder.engine_file} and {decoder.engine_file} are not the two engines of one build: the "
            "decoder does not read what the encoder writes.",
            hint="Build both again: nirvana-deploy build-engine DIR --force",
        )


def config_folder(decoder: Path) -> Path:
    """The folder whose config.json is the model's: the ONNX folder or the checkpoint, near its engines."""
    name, base = decoder.stem.removesuffix(f"-{DECODER}"), decoder.parent
    nearby = (
        base / f"{name}-onnx",
        *(
            folder
            for above in (base, base.parent)
            for folder in (above, above / "onnx", above / "checkpoint")
        ),
    )
    for folder in nearby:
        if (folder / "config.json").is_file():
            with suppress(NirvanaError):
                start_token(folder)
                return folder
    raise NirvanaError(
        f"No config.json near {decoder} names the token that its decoder reads first.",
        hint=f"Copy the model's config.json beside {decoder.name}.",
    )
