"""Calibrated rounding of a whole graph, layer by layer: each linear sees the inputs it will have.

Calibration windows run through one layer at a time, cut out of the float graph between two hidden states.
Within a layer the linears are taken in groups that read one value (q, k and v; o; gate and up; down), and a
group is rounded before the next one's inputs are computed, so that every group makes up for the rounding
before it. Nothing is computed twice: the inputs of one group are what the next group's are computed from.
In memory are one layer's weights and activations and the X^T X of one group, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.prune.refit.least_squares import panels_of
from nirvana_deploy.quantize.graph.layer_parts import Cut, Feeds, Values
from nirvana_deploy.quantize.graph.linears import Linear, OnnxGraph
from nirvana_deploy.quantize.weights.rounding import RoundedWeight

_TOKENS_AT_ONCE = 2048
Rounding = Callable[[Sequence[Linear], NDArray[np.float32]], Iterable[RoundedWeight]]
"""(linears that read one value, its X^T X [K, K] to do with as it likes) -> rounded weights in this order."""


def round_layerwise(
    graph: OnnxGraph,
    linears: Sequence[Linear],
    prompts: Sequence[Feeds],
    rounding: Rounding,
    *,
    then: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> list[NDArray[Any]]:
    """Round ``linears`` of the float ``graph``, which must not have been rewritten yet, group by group.

    The others of its linears stay float. Returns the value ``then`` of every prompt, as the rounded graph
    computes it (nothing where it is None). Raises NirvanaError naming a linear whose inputs are not finite,
    or zero throughout.
    """
    cut = Cut(graph.path, threads=threads)
    known: Values = {}
    prompts = _batches(prompts)
    with progress.task("Rounding layer by layer", len(linears)) as advance:
        for groups, end in zip(_groups(cut, linears), cut.ends, strict=True):
            wanted = end or ((then,) if then is not None else ())
            weights: dict[str, NDArray[Any]] = {}
            for group in groups:
                x = str(group[0].x.name)
                if x not in known:
                    known[x] = [found for (found,) in cut.values([x], known, prompts, weights)]
                rounded = rounding(group, _hessian(group[0], known[x]))
                for linear, weight in zip(group, rounded, strict=True):
                    if wanted or group is not groups[-1]:  # else nothing is computed from it
                        weights[str(linear.weight.name)] = _stored(linear, weight.dequantized())
                    advance(1)
            if wanted:
                leaving = zip(*cut.values(wanted, known, prompts, weights), strict=True)
                known = {name: list(several) for name, several in zip(wanted, leaving, strict=True)}
    return [state[None] for batch in known[then] for state in batch] if then is not None else []


def _batches(prompts: Sequence[Feeds]) -> list[Feeds]:
    """Prompts of one length, several to a run: a weight that is fed is laid out anew for every run."""
    several = max(1, _TOKENS_AT_ONCE // prompts[0]["input_ids"].size)
    return [
        {name: np.concatenate([one[name] for one in some]) for name in some[0]}
        for start in range(0, len(prompts), several)
        if (some := prompts[start : start + several])
    ]


def _groups(cut: Cut, linears: Sequence[Linear]) -> list[list[list[Linear]]]:
    """``linears`` by the part they lie in, and there by the value they read, in the order of the graph."""
    parts: list[dict[str, list[Linear]]] = [{} for _ in cut.ends]
    for linear in sorted(linears, key=lambda linear: cut.position(_result(linear))):
        parts[cut.number(_result(linear))].setdefault(str(linear.x.name), []).append(linear)
    return [list(groups.values()) for groups in parts]


def _result(linear: Linear) -> str:
    return str(linear.node.outputs[0].name)


def _hessian(linear: Linear, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """X^T X [K, K] of what ``linear`` reads, over all tokens of all prompts."""
    total = torch.zeros((linear.K, linear.K))
    for start, stop in panels_of(linear.K):
        panel = total[start:stop, :stop]
        for value in inputs:
            for window in value:
                rows = window.reshape(-1, linear.K)[:, :stop].astype(np.float32, copy=False)
                panel.addmm_(torch.from_numpy(rows[:, start:]).T, torch.from_numpy(rows))
        total[:start, start:stop] = panel[:, :start].T
    energy = total.diagonal()
    if not energy.isfinite().all() or not energy.any():
        state = "zero throughout" if energy.isfinite().all() else "NaN or infinite"
        raise NirvanaError(
            f"Calibration activations of {linear.name} are {state}; rounding cannot be fitted to them.",
            hint="Check the model and the calibration text, or round without it: --rounding search.",
        )
    hessian: NDArray[np.float32] = total.numpy()
    return hessian


def _stored(linear: Linear, weight: NDArray[np.float32]) -> NDArray[Any]:
    """W [K, N] as the graph holds it: in its dtype, [N, K] where a Transpose follows."""
    return np.ascontiguousarray(weight.T if linear.transposed else weight, dtype=linear.dtype.numpy())
