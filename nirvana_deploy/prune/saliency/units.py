"""Units as sums and indices: per-weight scores add up to unit scores, kept units expand to rows and columns.

A unit is a KV group or an FFN neuron (``model/family.py``). Pure maths on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.model.shape import ModelShape


@dataclass(frozen=True)
class UnitScores:
    """The saliency of every unit; higher is more worth keeping."""

    groups: tuple[NDArray[np.float64], ...]
    """Per layer, [K]."""
    neurons: tuple[NDArray[np.float64], ...]
    """Per layer, [F]."""


def scored_tensors(shape: ModelShape, layer: int) -> tuple[str, ...]:
    """Checkpoint names of the tensors of one layer whose weights count in unit scores."""
    site, prefix = shape.place(layer)
    modules = [site.q, site.k, site.v, *site.ffn_rows, site.o]
    if site.ffn_rows:
        modules.append(site.ffn_down)
    names = [f"{prefix}.{module}.weight" for module in modules]
    if shape.attention_bias:
        names += [f"{prefix}.{module}.bias" for module in (site.q, site.k, site.v)]
    if shape.ffn_bias:
        names += [f"{prefix}.{module}.bias" for module in site.ffn_rows]
    return tuple(names)


def unit_sums(
    shape: ModelShape,
    layer: int,
    scores: Mapping[str, torch.Tensor],
    *,
    block_elements: int = 1 << 18,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum per-weight scores of one layer into (groups [K], neurons [F]), in float64.

    ``scores`` maps each of :func:`scored_tensors` to a tensor of the weight's shape [NIRVANA: the unit's
    score is the plain sum over its weights; a bias belongs to its row's unit]. Matrices are summed in blocks
    whose float64 copy stays in the cache.
    """
    site, prefix = shape.place(layer)
    groups = torch.zeros(shape.layers[layer].kv_heads, dtype=torch.float64)
    neurons = torch.zeros(shape.layers[layer].ffn_width, dtype=torch.float64)
    columns = {f"{prefix}.{site.o}.weight", f"{prefix}.{site.ffn_down}.weight"}
    in_ffn = {f"{prefix}.{module}" for module in (*site.ffn_rows, site.ffn_down)}
    for name, score in scores.items():
        units = neurons if name.rpartition(".")[0] in in_ffn else groups
        if score.ndim == 2:
            score = _exact_sum(score, 0 if name in columns else 1, block_elements)
        units += score.cpu().double().reshape(len(units), -1).sum(dim=1)
    return groups.numpy(), neurons.numpy()


def _exact_sum(score: torch.Tensor, dimension: int, block_elements: int) -> torch.Tensor:
    """Sum a matrix in float64, block by block: torch copies what it converts."""
    blocks = torch.split(score, max(1, block_elements // score.shape[1]))
    sums = [block.sum(dim=dimension, dtype=torch.float64) for block in blocks]
    return torch.stack(sums).sum(dim=0) if dimension == 0 else torch.cat(sums)


@dataclass(frozen=True)
class Kept:
    """Positions that stay in one dimension of a tensor."""

    dimension: int
    positions: torch.Tensor
    """int64, sorted."""


def kept_positions(
    shape: ModelShape, kept_groups: Sequence[Sequence[int]], kept_neurons: Sequence[Sequence[int]]
) -> dict[str, Kept]:
    """Tensor name -> kept positions, for every tensor that loses some; units are [layers][kept]."""
    d, g = shape.head_dim, shape.query_heads_per_group
    kept: dict[str, Kept] = {}
    for layer, (groups, neurons) in enumerate(zip(kept_groups, kept_neurons, strict=True)):
        site, prefix = shape.place(layer)
        keys = _expanded(groups, d)
        queries = _expanded(groups, g * d)
        width = _expanded(neurons, 1)
        rows = {site.q: queries, site.k: keys, site.v: keys, **dict.fromkeys(site.ffn_rows, width)}
        for module, positions in rows.items():
            kept[f"{prefix}.{module}.weight"] = Kept(0, positions)
            kept[f"{prefix}.{module}.bias"] = Kept(0, positions)
        kept[f"{prefix}.{site.o}.weight"] = Kept(1, queries)
        if site.ffn_rows:
            kept[f"{prefix}.{site.ffn_down}.weight"] = Kept(1, width)
    return kept


def _expanded(units: Sequence[int], size: int) -> torch.Tensor:
    """Positions of ``units`` when each unit is ``size`` consecutive positions."""
    starts = torch.tensor(units, dtype=torch.int64) * size
    return (starts[:, None] + torch.arange(size)).flatten()
