"""Run a decoder engine on TensorRT and the CUDA driver, without torch.

Device memory is allocated once, for the largest profile. A pass copies its tokens in from page-locked
memory and its logits out; the cache stays on the device. The decode pass of an in-place engine is captured
as a CUDA graph after its first run. Tested against ONNX Runtime with a fake driver and a fake TensorRT;
**it has not run on a GPU yet**.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.gguf.convert import cache_folder
from nirvana_deploy.runtime.onnxruntime.slots import moved_left, moved_right, require_left_padding
from nirvana_deploy.runtime.runner import NoRoomError, checked_prompts
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice, Driver
from nirvana_deploy.runtime.tensorrt.encoder_decoder import TensorRTSeq2Seq
from nirvana_deploy.runtime.tensorrt.kv_cache import ConcatenatedCache, InPlaceCache, KvCache, cache_heads
from nirvana_deploy.runtime.tensorrt.loading import (
    require_target,
    require_version,
    require_weights,
    tensorrt_module,
)
from nirvana_deploy.runtime.tensorrt.memory import LOGITS, plan_memory
from nirvana_deploy.runtime.tensorrt.record import is_part_of_seq2seq, read_engine_record
from nirvana_deploy.runtime.tensorrt.session import Session, kernel_cache_of

_ROOM = (
    "Build the engine smaller: nirvana-deploy build-engine DIR --max-batch 1 --max-length 1024 --force; its "
    "logits shrink most when the ONNX is exported with --last-logits."
)


@dataclass(frozen=True)
class EngineState:
    """What was read so far. The cache itself is the runner's only one, so a state can be continued once."""

    attention_mask: NDArray[np.int64]
    """[N, S]: 1 for a token, 0 for left padding."""
    step: int
    """Passes that the runner had made when this state was new."""


class TensorRTRunner:
    """One engine on one GPU. A context manager; ``close`` frees what it holds.

    ``kernel_cache`` is a folder to keep the kernels in that TensorRT-RTX compiles; None keeps none.
    ``driver`` and ``module`` stand in for ``cuda.bindings.driver`` and for ``tensorrt`` or
    ``tensorrt_rtx``. Raises NirvanaError when the file is not what its record says, when the package or
    the GPU is missing or the wrong one, and when the device has no room.
    """

    start_token = None
    runtime: str
    """``tensorrt`` or ``tensorrt-rtx``."""
    threads: int
    """1: the host only queues work."""
    kv_heads: tuple[int, ...]
    """K of each layer."""
    head_dim: int
    """d."""
    vocab_size: int
    """V."""

    def __init__(
        self,
        engine: Path,
        *,
        device_index: int = 0,
        kernel_cache: Path | None = None,
        driver: Driver | None = None,
        module: Any = None,
    ) -> None:
        self._record = read_engine_record(engine)
        self._plan = plan_memory(self._record)
        require_weights(self._record)
        trt = module if module is not None else tensorrt_module(self._record.runtime)
        require_version(self._record, trt.__version__)
        self.device = CudaDevice(index=device_index, driver=driver)
        self._session: Session | None = None
        try:
            require_target(self._record, self.device)
            self._open(engine, trt, kernel_cache)
        except BaseException:
            self.close()
            raise

    def _open(self, engine: Path, trt: Any, kernel_cache: Path | None) -> None:
        record, plan, device = self._record, self._plan, self.device
        self._session = Session(
            engine,
            record,
            module=trt,
            device=device,
            inputs_bytes=plan.token_inputs_bytes,
            result_bytes=plan.decode_logits_bytes,
            kernels=kernel_cache_of(record, device, kernel_cache),
            hint=_ROOM,
        )
        heads = cache_heads(record)
        self.runtime, self.threads = record.runtime, 1
        self.kv_heads = tuple(K for name, (K, _) in heads.items() if name.endswith(".key"))
        self.head_dim = next(iter(heads.values()))[1]
        logits = next(tensor for tensor in record.outputs if tensor.name == LOGITS)
        assert logits.shape[2] is not None
        self.vocab_size, self._logits_dtype = logits.shape[2], logits.dtype
        self._last_only = logits.shape[1] == 1
        form = InPlaceCache if record.kv == "in-place" else ConcatenatedCache
        self._cache: KvCache = form(record, plan, device, hint=_ROOM)
        self._logits = device.allocate(plan.logits_bytes, "logits", hint=_ROOM)
        self._step = 0

    @property
    def graph_refused(self) -> str | None:
        """Why decoding is not repeated as a CUDA graph, where that was tried and refused."""
        return None if self._session is None else self._session.graph_refused

    def __enter__(self) -> TensorRTRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the device; the runner cannot be used afterwards."""
        self.device.settle()
        if self._session is not None:
            self._session.close()
        self.device.close()

    def peak_device_bytes(self) -> int:
        """See :meth:`CudaDevice.peak_bytes`: weights, scratch memory, cache and I/O."""
        return self.device.peak_bytes()

    def device_ms(self) -> tuple[float, ...]:
        """GPU compute time of every pass since the last call of this: without copies and host time."""
        return () if self._session is None else self._session.taken_ms()

    def prefill(
        self,
        tokens: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        answer: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], EngineState]:
        """Read prompts [N, T] and answers [N, A] behind them; returns logits [N, T + A, V] and the state.

        The mask is 0 where a prompt is padded on the left, and None when none is. A prompt longer than a pass
        is read in several. Logits of padding are undefined. An engine with logits of the last position alone
        gives [N, 1, V].
        """
        tokens, mask = checked_prompts(tokens, attention_mask, answer, vocab_size=self.vocab_size)
        require_left_padding(mask)
        N, T = tokens.shape
        moved = self._cache.in_place and not mask.all()
        if moved and self._last_only:
            raise NirvanaError(
                f"{self._record.engine_file} gives logits of the last position alone and keeps its cache in "
                "place: prompts of one batch must have the same length."
            )
        rows = moved_right(mask, tokens) if moved else tokens
        parts = []
        for start in range(0, T, self._plan.limits.step_tokens):
            stop = min(T, start + self._plan.limits.step_tokens)
            parts.append(self._pass(rows[:, start:stop], mask[:, :stop], np.full(N, start)))
        logits = parts[-1] if self._last_only or len(parts) == 1 else np.concatenate(parts, axis=1)
        if moved:
            logits = moved_left(mask, logits)
        return logits, EngineState(attention_mask=mask, step=self._step)

    def decode(
        self, tokens: NDArray[np.int64], state: EngineState
    ) -> tuple[NDArray[np.float32], EngineState]:
        """Read one more token per sequence, [N, 1]; returns logits [N, 1, V] and the state after it."""
        if state.step != self._step:
            raise NirvanaError(
                "This state is no longer in the engine's cache: another prompt or step came after it. "
                "An engine continues the latest state alone; read the prompt again."
            )
        before = state.attention_mask
        mask = np.concatenate([before, np.ones((len(tokens), 1), dtype=np.int64)], axis=1)
        logits = self._pass(tokens, mask, before.sum(axis=1))
        return logits, EngineState(attention_mask=mask, step=self._step)

    def _pass(
        self, tokens: NDArray[np.int64], mask: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """One run over [N, T] new tokens after the S that are in the cache; logits [N, T, V]."""
        (N, T), total = tokens.shape, mask.shape[1]
        feeds = self._cache.token_inputs(tokens, mask, lengths)
        if total > self._plan.limits.total_tokens:
            raise NoRoomError(
                f"{total} tokens, prompt and answer together, exceed the "
                f"{self._plan.limits.total_tokens} that {self._record.engine_file} has room for.",
                hint="Ask for fewer, or: nirvana-deploy build-engine DIR --max-length N --force",
            )
        assert self._session is not None
        self._session.queue(
            {name: array for name, array in feeds.items() if name in self._session.inputs},
            self._cache.shapes(N, total - T),
            {**self._cache.addresses(), LOGITS: self._logits.address},
            repeats=self._cache.in_place and T == 1,
        )
        logits = self._session.result(
            (N, 1 if self._last_only else T, self.vocab_size), self._logits, dtype=self._logits_dtype
        )
        self._cache.advance()
        self._step += 1
        return logits


def open_engine(path: Path, *, runtime: str, threads: int | None = None) -> TensorRTRunner | TensorRTSeq2Seq:
    """Open an engine of ``runtime``, for an encoder-decoder the one of its decoder; ``threads`` is not used.

    Raises NirvanaError for another runtime's, and for what the runner raises.
    """
    record = read_engine_record(path, check_bytes=False)
    if record.runtime != runtime:
        raise NirvanaError(
            f"{path} is an engine of {record.runtime}, and {runtime} is asked for.",
            hint=f"Pass --runtime {record.runtime}, or build one: "
            f"nirvana-deploy build-engine DIR --engine {runtime}",
        )
    kernels = cache_folder() / "kernels"
    if is_part_of_seq2seq(record):
        return TensorRTSeq2Seq(path, kernel_cache=kernels)
    return TensorRTRunner(path, kernel_cache=kernels)
