"""Backward elimination of the inputs of a linear: which go first, and what each costs after the best refit.

W [D, k] reads x and should give y. With z = W diag(s), s_j^2 = H_jj + q mean(diag H), P the inverse of
diag(1/s) H diag(1/s) + ridge I, ``sum |M (y - W x)|^2 + ridge |M (z - z_0)|^2`` is least at Z = Z_0 +
missing P. With inputs B held at zero it grows by tr(V_B P_BB^-1 V_B^T), V = M Z; V and P of the others
follow by one block step. Optimal brain surgeon (Hassibi & Stork 1993) on whole columns, as ZipLM (arXiv
2302.04089); metric and ridge are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

RIDGE = 0.02
"""Share of each input's energy that conditions P; with less than 1e-4 P may lose definiteness."""
_QUIET_SHARE = 0.1
"""q: share of the mean energy that s adds to each input's own."""
_MOST_SUBSETS = 64
"""Up to so many subsets of groups are all tried; beyond, groups go one by one."""
_TINY = 1e-12
_ROWS = 1024
"""Of a matrix, worked on at once."""
_MOVED_ROWS = 128
"""Of a matrix, moved at once."""


@dataclass(frozen=True)
class Optimum:
    """The best refit with every input there, and how it answers to losing some."""

    coefficients: torch.Tensor
    """V [E, k], float64: the optimum in scaled inputs, seen through the metric."""
    inverse: torch.Tensor
    """P [k, k], float64."""


@dataclass(frozen=True)
class Elimination:
    """Inputs in the order in which they went."""

    order: torch.Tensor
    """int64 [removed]."""
    removed: list[int]
    """How many were gone after each step, 0 first."""
    cost: list[float]
    """How much the objective had grown by then."""
    kept: torch.Tensor
    """int64, sorted: what stays."""


def optimum_of(
    gram: torch.Tensor,
    weight: torch.Tensor,
    *,
    missing: torch.Tensor | None = None,
    metric: torch.Tensor | None = None,
    ridge: float = RIDGE,
) -> Optimum | None:
    """The optimum for ``weight`` W [D, k] and ``gram`` H = sum x x^T [k, k]; None where H is not finite.

    ``missing`` is sum (y - W x) x^T [D, k], zero by default (y = W x); ``metric`` M [E, D] weighs outputs.
    """
    energy = gram.diagonal().double()
    if not (energy.isfinite().all() and (missing is None or missing.isfinite().all())):
        return None
    scale = scales(energy)
    system = gram.to(torch.float64, copy=True).div_(scale).div_(scale[:, None])
    system.diagonal().add_(ridge)
    inverse = _inverse(system)
    optimum = weight.to(torch.float64, copy=True).mul_(scale)
    optimum.masked_fill_(energy == 0, 0.0)  # dead inputs: nothing to hold on to
    if missing is not None:
        for rows in _rows_of(missing):
            optimum[rows] += (missing[rows].double() / scale) @ inverse
    return Optimum(coefficients=optimum if metric is None else _seen(optimum, metric), inverse=inverse)


def _seen(optimum: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """M Z [E, k] of Z [D, k], which is used up: where E = D it takes its place, some columns at a time."""
    metric = metric.double()
    if metric.shape[0] != optimum.shape[0]:
        return metric @ optimum
    for columns in _rows_of(optimum.T):
        optimum[:, columns] = metric @ optimum[:, columns]
    return optimum


def scales(energy: torch.Tensor) -> torch.Tensor:
    """s [k] of inputs with ``energy`` diag(H) [k], float64; 1 where all inputs were always zero."""
    scale = (energy + _QUIET_SHARE * energy.mean()).sqrt()
    return torch.where(scale > 0, scale, 1.0)


def eliminate(optimum: Optimum, *, keep: int, block: int) -> Elimination:
    """Remove inputs, the ``block`` cheapest at a time, until ``keep`` stay; uses up ``optimum``."""
    v, p = optimum.coefficients, optimum.inverse
    names = torch.arange(v.shape[1])  # which input a column is
    alive = torch.ones(v.shape[1], dtype=torch.bool)
    order: list[torch.Tensor] = []
    removed, cost = [0], [0.0]
    left = v.shape[1]
    while left > keep:
        energy = torch.stack([v[rows].square().sum(0) for rows in _rows_of(v)]).sum(0)
        each = energy / p.diagonal().clamp_min(_TINY)
        each[~alive] = math.inf
        going = each.topk(min(block, left - keep), largest=False).indices
        cost.append(cost[-1] + _step(v, p, going))
        order.append(names[going])
        alive[going] = False
        left -= len(going)
        removed.append(removed[-1] + len(going))
        if left * 6 < 5 * len(alive):  # columns that are gone cost as much as those that stay
            stay = alive.nonzero().flatten()
            v, p = _narrowed(v, stay), _packed(p, stay)
            names, alive = names[alive], torch.ones(left, dtype=torch.bool)
    gone = torch.cat(order) if order else torch.empty(0, dtype=torch.int64)
    return Elimination(order=gone, removed=removed, cost=cost, kept=names[alive].sort().values)


def eliminate_groups(
    optimum: Optimum, groups: int, *, most: int | None = None
) -> tuple[list[tuple[int, ...]], list[float]]:
    """(the groups that stay, sorted; the growth) with 0, 1, ... ``most`` [all but one] of them removed.

    A group is as many consecutive inputs as every other. Where there are few subsets, each is tried; else the
    cheapest group goes, one after another.
    """
    kept: list[tuple[int, ...]] = [tuple(range(groups))]
    cost = [0.0]
    for removed in range(1, (groups - 1 if most is None else most) + 1):
        if math.comb(groups, removed) <= _MOST_SUBSETS:
            candidates = list(itertools.combinations(range(groups), removed))
        else:
            gone = [group for group in range(groups) if group not in kept[-1]]
            candidates = [tuple(sorted([*gone, one])) for one in kept[-1]]
        grown = [_growth(optimum, group_inputs(one, groups, optimum.inverse.shape[0])) for one in candidates]
        best = min(range(len(candidates)), key=grown.__getitem__)
        kept.append(tuple(group for group in range(groups) if group not in candidates[best]))
        cost.append(max(grown[best], cost[-1]))
    return kept, cost


def group_inputs(chosen: Sequence[int], groups: int, inputs: int) -> torch.Tensor:
    """The inputs of the ``chosen`` groups out of ``groups``, int64."""
    size = inputs // groups
    return torch.cat([torch.arange(one * size, (one + 1) * size) for one in chosen])


def _growth(optimum: Optimum, going: torch.Tensor) -> float:
    """How much the objective grows when inputs are held at zero."""
    within = torch.linalg.cholesky(optimum.inverse[going][:, going])
    half = torch.linalg.solve_triangular(within, optimum.coefficients[:, going].T, upper=False)
    return float(half.square().sum())


def _step(v: torch.Tensor, p: torch.Tensor, going: torch.Tensor) -> float:
    """Hold inputs at zero: change V and P in place for the others; returns the growth."""
    rows = p[going]
    within = torch.linalg.cholesky(rows[:, going])
    v_going = v[:, going]
    cost = float(torch.linalg.solve_triangular(within, v_going.T, upper=False).square().sum())
    spread = torch.cholesky_solve(rows, within)  # P_BB^-1 P_B,:
    v.addmm_(v_going, spread, alpha=-1)
    p.addmm_(rows.T, spread, alpha=-1)
    return cost


def _narrowed(v: torch.Tensor, stay: torch.Tensor) -> torch.Tensor:
    """The columns ``stay`` of V, sorted, as a view of ``v``, which is used up."""
    for rows in _rows_of(v, _MOVED_ROWS):
        v[rows, : len(stay)] = v[rows].index_select(1, stay)
    return v[:, : len(stay)]


def _packed(p: torch.Tensor, stay: torch.Tensor) -> torch.Tensor:
    """P of the inputs ``stay``, sorted, as a view of ``p``, which is used up: a copy takes gigabytes."""
    left = len(stay)
    for rows in _rows_of(stay, _MOVED_ROWS):  # rows and columns only ever move toward the first
        p[rows, :left] = p[stay[rows]].index_select(1, stay)
    return p[:left, :left]


def _rows_of(matrix: torch.Tensor, size: int = _ROWS) -> Iterator[slice]:
    """Blocks of its rows: temporaries of all of them would take gigabytes."""
    for start in range(0, len(matrix), size):
        yield slice(start, min(start + size, len(matrix)))


def _inverse(system: torch.Tensor) -> torch.Tensor:
    """The inverse of a positive definite matrix, which is used up."""
    by_columns = system.T  # the layout of LAPACK: anything else is copied there and back
    torch.linalg.cholesky(by_columns, out=by_columns)
    return torch.cholesky_inverse(by_columns, out=by_columns).T
