"""Run calibration windows through a float ONNX folder and keep what quantization needs of its activations.

The windows go through one layer at a time; of each value that linears read, a largest magnitude per channel
and, where it is asked for, a histogram are kept, never the activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.quantize.graph.layer_runner import Runner
from nirvana_deploy.quantize.graph.linears import Linear
from nirvana_deploy.quantize.int8.ranges import Histogram


@dataclass(frozen=True)
class Observed:
    """What the calibration windows made of the input of one linear."""

    channel_absmax: NDArray[np.float32]
    """[K]."""
    histogram: Histogram
    """Of all absolute values; empty where none was asked for."""


def observe(
    folder: Path,
    linears: Mapping[str, Sequence[Linear]],
    windows: NDArray[np.int64],
    *,
    divide: Mapping[str, NDArray[np.float32]] | None = None,
    histograms: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Observed]:
    """What the ``linears`` of each file of ``folder`` read in calibration windows [N, T], by linear name.

    ``divide`` [K] by linear name: count the values as they are once smoothing has divided them; infinity
    leaves a channel out. Raises NirvanaError for windows that are no prompts, and, naming the linear, where
    activations are NaN or infinite.
    """
    require_prefill(windows)
    readers: dict[tuple[str, str], Linear] = {}
    for file, several in linears.items():
        for linear in several:
            readers.setdefault((file, str(linear.x.name)), linear)
    outputs = {file: [name for of, name in readers if of == file] for file in linears}
    runner = Runner(folder, threads=threads)
    channels = {key: np.zeros(linear.K, dtype=np.float32) for key, linear in readers.items()}
    counted = dict.fromkeys(readers, Histogram.empty())
    run = runner.values(windows, outputs=outputs, label="Observing activations", progress=progress)
    for file, _, found in run:
        for name, value in found.items():
            key = file, name
            linear = readers[key]
            values = np.abs(value.reshape(-1, value.shape[-1]).astype(np.float32, copy=False))
            if divide and linear.name in divide:
                values /= divide[linear.name]
            largest = values.max(axis=0, initial=0.0)
            if not np.isfinite(largest).all():
                raise NirvanaError(
                    f"Calibration activations of {linear.name} are NaN or infinite.", hint=_remedy(linear)
                )
            np.maximum(channels[key], largest, out=channels[key])
            if histograms:
                counted[key] = counted[key].add(values)
    return {
        linear.name: Observed(channels[file, str(linear.x.name)], counted[file, str(linear.x.name)])
        for file, several in linears.items()
        for linear in several
    }


def require_prefill(windows: NDArray[np.int64]) -> None:
    """Raise NirvanaError unless ``windows`` are [N, T] of more than one token each."""
    if windows.ndim != 2 or len(windows) == 0:
        raise NirvanaError(f"Calibration windows must be an array [N, T] with N >= 1, got {windows.shape}.")
    if windows.shape[1] < 2:
        raise NirvanaError(
            f"Calibration windows of {windows.shape[1]} token say nothing about prompts; "
            "ranges are taken from whole prompts (T of 2 or more; 128 is usual).",
            hint="Draw longer windows: --seq-len 128.",
        )


def _remedy(linear: Linear) -> str:
    if linear.dtype == ir.DataType.FLOAT:
        return "The model overflows float32 on this text: check its weights, and the text."
    return "The model overflows half precision on this text: export it as fp32 (export --dtype fp32)."
