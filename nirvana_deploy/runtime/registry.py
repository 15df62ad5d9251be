"""Open a model in a runtime of the table: one interface for all of them.

Each runtime's module is imported when it is asked for, so a missing package is missed by nobody else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.runtime.table import DEFAULT, runtime_named
from nirvana_deploy.runtime.tensorrt.record import ENGINE_SUFFIX, read_engine_record


class Runner(Protocol):
    """A decoder with a KV cache, loaded, and released at the end of its block.

    N sequences, T tokens, V vocabulary.
    """

    runtime: str
    threads: int
    vocab_size: int

    def __enter__(self) -> Runner: ...

    def __exit__(self, *_: object) -> None: ...

    def prefill(
        self, tokens: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], Any]:
        """[N, T] tokens, padded on the left where the mask is 0, to logits [N, T, V] and a state."""
        ...

    def decode(self, tokens: NDArray[np.int64], state: Any) -> tuple[NDArray[np.float32], Any]:
        """[N, 1] tokens to logits [N, 1, V] and the next state."""
        ...

    def generate(
        self,
        tokens: NDArray[np.int64],
        *,
        max_new_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]:
        """Continue one prompt [1, T] greedily."""
        ...


@runtime_checkable
class OnDevice(Protocol):
    """What a runner on a device can say beyond the stop-watch."""

    def peak_device_bytes(self) -> int:
        """The most device memory taken so far."""
        ...

    def device_ms(self) -> tuple[float, ...]:
        """Compute time of every pass since the last call, on the device's own clock."""
        ...


def runtime_for(path: Path) -> str:
    """The runtime that runs ``path`` when none is named: an engine's own, ONNX Runtime on the CPU else."""
    return read_engine_record(path, check_bytes=False).runtime if is_engine(path) else DEFAULT


def is_engine(path: Path) -> bool:
    """Whether ``path`` names an engine file rather than an ONNX folder."""
    return path.suffix == ENGINE_SUFFIX


def open_runner(path: Path, *, runtime: str | None = None, threads: int | None = None) -> Runner:
    """Load an ONNX folder or an engine file with ``runtime``, by default :func:`runtime_for`.

    ``threads`` is the size of ONNX Runtime's pool. Raises NirvanaError for an unknown runtime, one that
    does not take such a file, and whatever keeps the file from being loaded.
    """
    row = runtime_named(runtime if runtime is not None else runtime_for(path))
    takes_engines = row.takes == "engine"
    if takes_engines != is_engine(path):
        wanted = "an engine file" if takes_engines else "an ONNX folder"
        raise NirvanaError(
            f"The runtime {row.name} runs {wanted}, and {path} is none.",
            hint=f"nirvana-deploy build-engine {path} --engine {row.name}" if takes_engines else None,
        )
    module, function = row.opens.split(":")
    opened: Runner = getattr(importlib.import_module(module), function)(
        path, runtime=row.name, threads=threads
    )
    return opened
