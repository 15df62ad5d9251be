"""What this machine reaches at most: memory read and copied, and products by what is multiplied.

Measured once in seconds, best of several repetitions, on the threads that are used, and kept in the cache
folder under the machine and the versions of the libraries. Products are those of ONNX Runtime, whose kernels
run the models; those of bfloat16, which it does not multiply here, are torch's.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import MemoryProbe, cpu_multiplies_bfloat16, cpu_name, usable_cores
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.measure.roofline.graph import INTEGER
from nirvana_deploy.model.gguf.convert import cache_folder

_SCHEMA = 1
_SIDE = 1024
"""Of the square matrices."""
_SECONDS, _AT_LEAST = 0.25, 3
"""A product is repeated for so long, and so often."""
_PACKAGES = ("onnxruntime", "numpy", "torch")


@dataclass(frozen=True)
class Ceilings:
    """The best that this machine was seen to reach."""

    threads: int
    read_gb_per_s: float
    copy_gb_per_s: float
    """Read and written bytes together."""
    gop_per_s: dict[str, float]
    """1e9 multiplications and additions a second, by what is multiplied; what has no kernel is left out."""
    measured_at: str
    """UTC."""

    def or_better(self, other: Ceilings) -> Ceilings:
        """Of each rate the higher one of the two."""
        kinds = {**other.gop_per_s, **self.gop_per_s}
        return replace(
            self,
            read_gb_per_s=max(self.read_gb_per_s, other.read_gb_per_s),
            copy_gb_per_s=max(self.copy_gb_per_s, other.copy_gb_per_s),
            gop_per_s={kind: max(rate, other.gop_per_s.get(kind, 0.0)) for kind, rate in kinds.items()},
        )


def machine_ceilings(*, threads: int, fresh: bool = False, progress: Progress = SILENT) -> Ceilings:
    """The ceilings for ``threads`` threads: those kept, else measured now; ``fresh`` measures in any case.

    What was kept only rises: other work makes a machine look slower than it is, nothing makes it look faster.
    """
    key = _key(threads)
    path = _place(key)
    kept = _kept(path, key)
    if kept is not None and not fresh:
        return kept
    progress.note(f"Measuring what this machine reaches at most, on {threads} threads")
    found = measured_ceilings(threads=threads)
    if kept is not None:
        found = found.or_better(kept)
    with suppress(OSError, NirvanaError):  # a cache that cannot be written is done without
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": _SCHEMA, "key": key, "ceilings": asdict(found)})
    return found


def measured_ceilings(*, threads: int) -> Ceilings:
    """Measure now; best done while the machine is idle."""
    memory = MemoryProbe(threads)
    rates: dict[str, float] = {}
    for name, run in _products(threads):
        rate = 2 * _SIDE**3 / best_seconds(run) / 1e9
        rates[name] = max(rate, rates.get(name, 0.0))
    return Ceilings(
        threads=threads,
        read_gb_per_s=memory.read_gb_per_s(),
        copy_gb_per_s=memory.copy_gb_per_s(),
        gop_per_s=rates,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def best_seconds(run: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of several repetitions, the first one left out."""
    run()
    best, done, began = float("inf"), 0, clock()
    while done < _AT_LEAST or clock() - began < _SECONDS:
        start = clock()
        run()
        best, done = min(best, clock() - start), done + 1
    return best


def _key(threads: int) -> dict[str, Any]:
    """All that decides what is reached, as far as it can be asked for."""
    return {
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "cores": usable_cores(),
        "threads": threads,
        **{package: version(package) for package in _PACKAGES},
    }


def _place(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "ceilings" / f"{digest[:16]}.json"


@dataclass(frozen=True)
class _Kept:
    """The content of a file of the cache."""

    key: dict[str, Any]
    ceilings: Ceilings


def _kept(path: Path, key: dict[str, Any]) -> Ceilings | None:
    """What the cache has; None for nothing, and for what cannot be read."""
    try:
        found = read_json(path, _Kept, schema=_SCHEMA)
    except NirvanaError:
        return None
    return found.ceilings if found.key == key else None


def _products(threads: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is multiplied, and the product to time; of several alike the fastest counts."""

    def full(dtype: type[np.generic]) -> NDArray[np.generic]:
        return np.full((_SIDE, _SIDE), 1, dtype=dtype)

    yield "float32", _product(full(np.float32), threads)
    # as a model of this type runs: where there is no kernel, ONNX Runtime widens to float32
    yield "float16", _product(full(np.float16), threads)
    for of_activations in (np.uint8, np.int8):  # on x86 the kernels are those of unsigned activations
        yield INTEGER, _product(full(of_activations), threads, stored=full(np.int8))
    if cpu_multiplies_bfloat16():
        yield "bfloat16", _bfloat16_product(threads)


def _bfloat16_product(threads: int) -> Callable[[], object]:
    a = torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16)

    def run() -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return a @ a
        finally:
            torch.set_num_threads(before)

    return run


def _product(
    a: NDArray[np.generic], threads: int, *, stored: NDArray[np.generic] | None = None
) -> Callable[[], object]:
    """``a`` times the matrix ``stored`` [a] in a session of ONNX Runtime."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    of_input = of_output = helper.np_dtype_to_tensor_dtype(a.dtype)
    operator = "MatMul"
    if stored is not None:
        operator, of_output = "MatMulInteger", onnx.TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", of_input, a.shape)],
        [helper.make_tensor_value_info("c", of_output, a.shape)],
        [numpy_helper.from_array(a if stored is None else stored, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {"a": onnxruntime.OrtValue.ortvalue_from_numpy(a)}
    return lambda: session.run_with_ort_values(["c"], given)
