"""The seam between a scheme and a folder: what its rewriting function is given, and what it gives back."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.progress import Progress
from nirvana_deploy.quantize.graph.linears import OnnxGraph
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.schemes import Scheme, scheme_named


@dataclass(frozen=True)
class QuantizeInputs:
    """Everything but the graph that a quantization depends on."""

    recipe: Quantization
    calibration: NDArray[np.int64] | None = None
    """Token ids [N, T]."""
    heldout: NDArray[np.int64] | None = None
    """Token ids [M, T'] to make choices by; the calibration windows when None."""
    decided: Mapping[str, Any] | None = None
    """quantization.json of another export of the same checkpoint, whose decision is applied again."""

    @property
    def scheme(self) -> Scheme:
        """The row of its scheme."""
        return scheme_named(self.recipe.scheme)


@dataclass(frozen=True)
class Rewritten:
    """What a rewriting function did."""

    linears: list[str]
    """Names of the linears that it quantized."""
    record: dict[str, Any]
    """Its entries of quantization.json."""


class Rewrite(Protocol):
    """Rewrites the float ``graphs`` of a folder, lazily.

    ``scratch`` is a folder beside the output, kept until the graphs are written. Raises NirvanaError for
    options and calibration that do not fit.
    """

    def __call__(  # noqa: D102 (said by the class)
        self, graphs: Sequence[OnnxGraph], inputs: QuantizeInputs, *, scratch: Path, progress: Progress
    ) -> Rewritten: ...


def rewrite_function(scheme: Scheme) -> Rewrite:
    """Import the function that ``scheme`` names."""
    module, _, function = scheme.rewrites.partition(":")
    rewrite: Rewrite = getattr(importlib.import_module(module), function)
    return rewrite


def windows_record(windows: NDArray[np.int64]) -> dict[str, Any]:
    """Calibration windows [N, T] in quantization.json: number, length and sha256."""
    digest = hashlib.sha256(np.ascontiguousarray(windows, dtype="<i8").tobytes()).hexdigest()
    return {"windows": int(windows.shape[0]), "tokens": int(windows.shape[1]), "sha256": digest}
