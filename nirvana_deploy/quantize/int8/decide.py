"""From calibration windows to an int8 decision: smoothing, ranges, outlier channels, what stays float."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.temporary import scratch_folder
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.quantize.graph.layer_runner import Runner
from nirvana_deploy.quantize.graph.linears import Linear, OnnxGraph, open_folder, write_folder
from nirvana_deploy.quantize.graph.names import HEAD, described
from nirvana_deploy.quantize.graph.packing import is_for_ort_alone, pack, pack_floats, siblings
from nirvana_deploy.quantize.int8.observe import Observed, observe
from nirvana_deploy.quantize.int8.ranges import bound_of
from nirvana_deploy.quantize.int8.rewrite import (
    SMALLEST_DIMENSION,
    part_relu_from_quantizers,
    quantize_linear,
)
from nirvana_deploy.quantize.int8.smooth import Fold, Vector, apply_folds, find_folds, weight_absmax
from nirvana_deploy.quantize.int8.spec import Int8Linear, Int8Spec
from nirvana_deploy.quantize.weights.embedding import embedding_of, look_up_codes
from nirvana_deploy.quantize.weights.write import rounded_alone
from nirvana_deploy.runtime.divergence import Yardstick

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""What ``auto`` chooses among."""
OUTLIER_RATIO = 2.0
"""A channel is an outlier when its largest activation exceeds this many times the median channel's."""
MAX_OUTLIERS = 16
"""Outlier channels of one linear; a linear with more is not one of a few large channels."""
_HEAD_REASON = "head (--head includes it)"
_OUTLIER_ROLES = frozenset({"down"})
"""Where massive activations arise; elsewhere a norm keeps them apart from the linears."""


@dataclass(frozen=True)
class Candidate:
    """One alpha that was tried."""

    alpha: float
    kl: float
    """Mean KL(float || int8) over the windows that choices are made by, nats."""


@dataclass(frozen=True)
class _Calibration:
    """What the float model showed: all that decisions are made from."""

    folder: Path
    linears: Mapping[str, tuple[Linear, ...]]
    """By file: the linears that are to be quantized."""
    windows: NDArray[np.int64]
    observed: Mapping[str, Observed]
    folds: tuple[Fold, ...]
    weight_absmax: Mapping[str, Vector]
    """By fold name."""
    kept_float: Mapping[str, str]


def float_reason(linear: Linear, *, head: bool) -> str | None:
    """Why a linear stays float whatever its error, or None."""
    if linear.role == HEAD and not head:
        return _HEAD_REASON
    if min(linear.K, linear.N) < SMALLEST_DIMENSION:
        return f"fewer than {SMALLEST_DIMENSION} inputs or outputs"
    return None


def calibrated(
    folder: Path,
    graphs: Sequence[OnnxGraph],
    windows: NDArray[np.int64],
    *,
    head: bool,
    progress: Progress = SILENT,
) -> _Calibration:
    """Observe what is to be quantized in the float ``folder``; raises NirvanaError when nothing is."""
    kept: dict[str, str] = {}
    chosen: dict[str, tuple[Linear, ...]] = {}
    for graph in graphs:
        graph.untie([linear.name for linear in graph.linears] if head else [])
        reasons = {linear.name: float_reason(linear, head=head) for linear in graph.linears}
        kept |= {name: reason for name, reason in reasons.items() if reason}
        chosen[graph.path.name] = tuple(linear for linear in graph.linears if reasons[linear.name] is None)
    if not any(chosen.values()):
        raise NirvanaError(
            f"{folder}: all of its linears stay float: {', '.join(sorted(set(kept.values())))}."
        )
    folds = tuple(fold for graph in graphs for fold in find_folds(graph))
    observed = observe(folder, chosen, windows, progress=progress)
    for name, seen in observed.items():
        if not seen.channel_absmax.any():
            raise NirvanaError(
                f"All calibration activations of {name} are zero: no range can be taken from them.",
                hint="Calibrate on text of the kind that the model is for (--calib FILE).",
            )
    return _Calibration(
        folder=folder,
        linears=chosen,
        windows=windows,
        observed=observed,
        folds=folds,
        weight_absmax={fold.name: weight_absmax(fold) for fold in folds},
        kept_float=kept,
    )


def decide(
    calibration: _Calibration, *, alpha: float | None, ranges: str = "minmax", progress: Progress = SILENT
) -> Int8Spec:
    """The decision for one ``alpha`` (None: no smoothing). Methods other than minmax observe once more."""
    factors: dict[str, Vector] = {}
    divide: dict[str, Vector] = {}
    for fold in calibration.folds:
        seen = [calibration.observed[r.name] for r in fold.readers if r.name in calibration.observed]
        if alpha is None or not seen:
            continue
        largest = calibration.weight_absmax[fold.name]
        factors[fold.name] = fold.factors(alpha, seen[0].channel_absmax, largest)
        divide |= {reader.name: fold.of_readers(factors[fold.name]) for reader in fold.readers}
    linears: dict[str, Int8Linear] = {}
    for linear in _all(calibration):
        channels = calibration.observed[linear.name].channel_absmax / divide.get(linear.name, np.float32(1))
        outliers = _outliers(channels) if linear.role in _OUTLIER_ROLES else ()
        rest = np.delete(channels, outliers)
        linears[linear.name] = Int8Linear(bound=float(rest.max()), outliers=outliers)
        if outliers:
            divide[linear.name] = divide.get(linear.name, np.ones(linear.K, dtype=np.float32)).copy()
            divide[linear.name][list(outliers)] = np.inf  # leaves them out of the histogram
    if ranges != "minmax":
        seen_again = observe(
            calibration.folder,
            calibration.linears,
            calibration.windows,
            divide=divide,
            histograms=True,
            progress=progress,
        )
        linears = {
            name: Int8Linear(
                bound=bound_of(ranges, seen_again[name].histogram, of=name), outliers=linear.outliers
            )
            for name, linear in linears.items()
        }
    return Int8Spec(
        linears=linears,
        smoothing=factors,
        alpha=alpha,
        ranges=ranges,
        kept_float=calibration.kept_float,
    )


def without_head(spec: Int8Spec) -> Int8Spec:
    """``spec`` with the head left in float."""
    heads = {name for name in spec.linears if described(name, transposed=False)[1] == HEAD}
    return replace(
        spec,
        linears={name: linear for name, linear in spec.linears.items() if name not in heads},
        smoothing={name: factors for name, factors in spec.smoothing.items() if name not in heads},
        kept_float={**spec.kept_float, **dict.fromkeys(heads, _HEAD_REASON)},
    )


def apply_to(graphs: Sequence[OnnxGraph], spec: Int8Spec) -> dict[str, str]:
    """Rewrite ``graphs`` (lazily) as ``spec`` says; raises NirvanaError when they do not fit it.

    Where the head is quantized and ONNX Runtime alone runs the graph, so is the embedding, to 8 bits; returns
    its name and whose codes it is looked up in, or why it stays float.
    """
    embeddings: dict[str, str] = {}
    for graph in graphs:
        graph.untie(spec.linears)
    found = {linear.name for graph in graphs for linear in graph.linears}
    folds = {fold.name: fold for graph in graphs for fold in find_folds(graph)}
    missing = sorted((set(spec.linears) - found) | (set(spec.smoothing) - set(folds)))
    if missing:
        raise NirvanaError(
            f"{graphs[0].path.parent} does not fit the quantization: it has no {', '.join(missing[:3])}.",
            hint="Apply it to an export of the same checkpoint.",
        )
    for graph in graphs:
        apply_folds(graph, find_folds(graph), spec.smoothing)
        linears = [linear for linear in graph.linears if linear.name in spec.linears]
        packs: Iterable[tuple[Linear, ...]] = ((linear,) for linear in linears)
        if is_for_ort_alone(graph):
            packs = siblings(linears, alike=lambda linear: spec.linears[linear.name])
        for members in packs:
            quantize_linear(graph, pack(graph, members), spec.linears[members[0].name])
        if is_for_ort_alone(graph):
            pack_floats(graph, spec.linears)
        part_relu_from_quantizers(graph)
        embedding, roles = embedding_of(graph), {linear.role for linear in linears}
        if embedding is not None and is_for_ort_alone(graph) and HEAD in roles:
            rounded = partial(rounded_alone, embedding, bits=8, block_size=embedding.K, search=True)
            embeddings[embedding.name] = look_up_codes(
                graph, embedding, {}, rounded=rounded, bits=8, block_size=embedding.K
            )
    return embeddings


def choose_alpha(
    calibration: _Calibration,
    yardstick: Yardstick,
    *,
    scratch: Path,
    alphas: Sequence[float] = ALPHAS,
    progress: Progress = SILENT,
) -> tuple[float, tuple[Candidate, ...]]:
    """The alpha of least KL, and all that were tried: each is built, run and dropped."""
    tried = []
    with progress.task("Choosing alpha by KL", len(alphas)) as advance:
        for alpha in alphas:
            spec = decide(calibration, alpha=alpha)
            tried.append(
                Candidate(alpha=alpha, kl=divergence_of(calibration.folder, spec, yardstick, scratch=scratch))
            )
            advance(1)
    return min(tried, key=lambda candidate: candidate.kl).alpha, tuple(tried)


def divergence_of(folder: Path, spec: Int8Spec, yardstick: Yardstick, *, scratch: Path) -> float:
    """KL of ``folder`` quantized by ``spec``, built for a moment in ``scratch``."""
    with scratch_folder(scratch) as temporary:
        graphs = open_folder(folder)
        apply_to(graphs, spec)
        write_folder(folder, temporary / "int8", graphs)
        return yardstick.divergence(Runner(temporary / "int8").logits)


def smoothing_alpha(smooth: float | str | None) -> float | Literal["auto"] | None:
    """What is asked for: an alpha, "auto" (also when nothing is said), or None for no smoothing.

    Raises NirvanaError for a number outside [0, 1] or another word.
    """
    if smooth is None or smooth == "auto":
        return "auto"
    if smooth == "none":
        return None
    if isinstance(smooth, str) or not 0.0 <= smooth <= 1.0:
        raise NirvanaError(f"The smoothing alpha must lie in [0, 1] or be 'auto' or 'none', got {smooth!r}.")
    return float(smooth)


def _all(calibration: _Calibration) -> list[Linear]:
    return [linear for linears in calibration.linears.values() for linear in linears]


def _outliers(channel_absmax: Vector) -> tuple[int, ...]:
    """The largest channels, at most 16, that exceed twice the median channel; positions, sorted."""
    largest = np.argsort(channel_absmax)[::-1][:MAX_OUTLIERS]
    limit = OUTLIER_RATIO * float(np.median(channel_absmax))
    return tuple(sorted(int(channel) for channel in largest if channel_absmax[channel] > limit > 0))
