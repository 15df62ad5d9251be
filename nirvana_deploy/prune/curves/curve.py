"""Curves: for every layer's attention and FFN, the loss of keeping fewer units after the best refit.

Pure data. One set of curves serves every sparsity. The file is ``curves.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import parse_json, read_tensors, typed

SCHEMA = "nirvana-deploy curves 1"
_ABOUT = "curves"
AGAIN = "Measure the curves again: repeat the command with --force, or with another --out."
"""A hint."""


@dataclass(frozen=True)
class Curve:
    """What one attention or FFN loses; both arrays ascend and start at 0."""

    removed: NDArray[np.int64]
    """Units removed, [S]."""
    kl: NDArray[np.float64]
    """Predicted growth of the KL divergence from the dense model, nats per token, [S]."""

    def scaled(self, factor: float) -> Curve:
        """The same curve with every loss multiplied by ``factor``."""
        return replace(self, kl=self.kl * factor)

    def at(self, removed: float) -> float:
        """The loss with ``removed`` units gone, between the points by straight lines."""
        return float(np.interp(removed, self.removed, self.kl))


@dataclass(frozen=True)
class Curves:
    """The curves of a model; one of each kind for each of ``shape.layers``."""

    groups: tuple[Curve, ...]
    """KV groups; one point for each count."""
    neurons: tuple[Curve, ...]
    """FFN neurons; a site without FFN has the single point 0."""
    facts: Mapping[str, str]
    """What they were measured on, as ``facts.py`` says it."""


def curve_of(removed: Sequence[int], kl: Sequence[float]) -> Curve:
    """A curve through points; losses are made to ascend."""
    return Curve(np.array(removed, dtype=np.int64), np.maximum.accumulate(np.array(kl, dtype=np.float64)))


def write_curves(curves: Curves, path: Path) -> None:
    """Write ``curves.safetensors``; the same curves give the same bytes."""
    from safetensors.numpy import save

    tensors = {}
    for kind in ("groups", "neurons"):
        for number, curve in enumerate(getattr(curves, kind)):
            tensors[f"{number:05}.{kind}.removed"] = curve.removed
            tensors[f"{number:05}.{kind}.kl"] = curve.kl
    # one entry: those of a safetensors header stand in no order
    about = json.dumps({"schema": SCHEMA, **curves.facts}, sort_keys=True)
    write_bytes(path, save(tensors, metadata={_ABOUT: about}))


def read_curves(path: Path) -> Curves:
    """Read and check ``curves.safetensors``; raises NirvanaError for a file that holds no curves."""
    found, about = read_tensors(path, hint=AGAIN)
    where = f"{path}, metadata {_ABOUT!r}"
    facts = typed(parse_json(about.get(_ABOUT, "{}"), where, hint=AGAIN), dict[str, str], where, hint=AGAIN)
    if facts.pop("schema", None) != SCHEMA:
        raise NirvanaError(f"{path} holds no curves of this version.", hint=AGAIN)
    kinds = {}
    for kind in ("groups", "neurons"):
        names = sorted(name.rpartition(".")[0] for name in found if name.endswith(f".{kind}.kl"))
        none = np.empty(0, dtype=np.int64)
        kinds[kind] = tuple(Curve(found.get(f"{name}.removed", none), found[f"{name}.kl"]) for name in names)
        for number, curve in enumerate(kinds[kind]):
            _check(path, f"{kind} of layer {number}", curve)
    return Curves(groups=kinds["groups"], neurons=kinds["neurons"], facts=facts)


def _check(path: Path, what: str, curve: Curve) -> None:
    sound = (
        curve.removed.dtype == np.int64
        and curve.kl.dtype == np.float64
        and curve.removed.ndim == curve.kl.ndim == 1
        and len(curve.removed) == len(curve.kl) > 0
        and curve.removed[0] == curve.kl[0] == 0
        and (np.diff(curve.removed) > 0).all()
        and np.isfinite(curve.kl).all()
        and (np.diff(curve.kl) >= 0).all()
    )
    if not sound:
        raise NirvanaError(
            f"{path}: the curve for {what} must start at 0 removed units with no loss, and ascend.",
            hint=AGAIN,
        )
