"""How the cut is going to run in int8, decided before it is trained, as ``quantize`` would decide.

The cut is exported, observed on the calibration windows, and alpha, factors, ranges and outlier channels are
chosen. The decision lies beside the trained tensors in the end, and ``quantize`` inside the output folder
applies it, so that what is deployed is what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.ownership.temporary import scratch_folder
from nirvana_deploy.base.progress import Progress
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.quantize.graph.layer_runner import Runner
from nirvana_deploy.quantize.graph.linears import RECORD_FILE, open_folder
from nirvana_deploy.quantize.graph.names import HEAD
from nirvana_deploy.quantize.int8.decide import calibrated, choose_alpha, decide
from nirvana_deploy.quantize.int8.smooth import find_folds
from nirvana_deploy.quantize.int8.spec import (
    Int8Spec,
    as_letters,
    from_letters,
    read_record,
    read_spec,
    record_of,
)
from nirvana_deploy.quantize.rewriting import windows_record
from nirvana_deploy.runtime.divergence import Yardstick


@dataclass(frozen=True)
class TrainedLinear:
    """How one linear y = W x is computed while it is trained."""

    factors: NDArray[np.float32]
    """s [K], powers of two: x / s and W s are what is rounded."""
    bound: float
    """Of x / s."""
    outliers: tuple[int, ...]
    """Channels of x that are computed in float."""


def write_decision(
    cut: Checkpoint, windows: NDArray[np.int64], folder: Path, *, scheme: str, progress: Progress
) -> None:
    """Decide on the calibration windows [N, T], and write quantization.json to ``folder``, if it has none.

    The head has a range in any case, and no say in alpha: whether it is rounded is decided at deployment.
    Raises NirvanaError as ``quantize_onnx`` does.
    """
    if (folder / RECORD_FILE).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder) as scratch:
        onnx = scratch / "onnx"
        onnx_from_checkpoint(cut, onnx, progress=progress)
        graphs = open_folder(onnx)
        seen = calibrated(onnx, graphs, windows, head=True, progress=progress)
        of_layers = replace(
            seen,
            linears={
                file: tuple(one for one in linears if one.role != HEAD)
                for file, linears in seen.linears.items()
            },
            folds=tuple(fold for fold in seen.folds if fold.readers[0].role != HEAD),
        )
        yardstick = Yardstick(Runner(onnx).logits, windows)
        alpha, _ = choose_alpha(of_layers, yardstick, scratch=scratch, progress=progress)
        spec = _fused_together(decide(seen, alpha=alpha), cut.shape)
        factors: dict[str, str] = {}
        for fold in (fold for graph in graphs for fold in find_folds(graph)):
            if fold.name in spec.smoothing:
                of_readers = as_letters(fold.of_readers(spec.smoothing[fold.name]))
                factors |= {reader.name: of_readers for reader in fold.readers}
    record = record_of(
        scheme=scheme, int8=spec.to_json(), factors=factors, calibration=windows_record(windows)
    )
    write_json(folder / RECORD_FILE, record)


def read_decision(folder: Path, widths: Mapping[str, int]) -> dict[str, TrainedLinear]:
    """How the modules of ``widths`` (name -> inputs K) are computed, by name; others stay float.

    A fused module has no line of its own, and takes that of one of its parts, which read the same.
    """
    spec, all_factors, found = read_spec(folder), read_record(folder)["factors"], {}
    for module, inputs in widths.items():
        name = next((one for one in spec.linears if f"{one}.".startswith(f"{module}.")), None)
        if name is None:
            continue
        letters = all_factors.get(name)
        factors = np.ones(inputs, dtype=np.float32) if letters is None else from_letters(letters)
        linear = spec.linears[name]
        found[module] = TrainedLinear(factors, linear.bound, linear.outliers)
    return found


def _fused_together(spec: Int8Spec, shape: ModelShape) -> Int8Spec:
    """``spec`` with the parts of a fused linear in float where one of them is too small to be rounded."""
    together: dict[str, str] = {}
    for index in range(len(shape.layers)):
        site, prefix = shape.place(index)
        for module in site.fused:
            parts = [f"{prefix}.{part}" for part in site.parts(module)]
            if not all(part in spec.linears for part in parts):
                together |= dict.fromkeys(parts, f"trained as one with others in {prefix}.{module}")
    linears = {name: linear for name, linear in spec.linears.items() if name not in together}
    return replace(spec, linears=linears, kept_float={**spec.kept_float, **together})
