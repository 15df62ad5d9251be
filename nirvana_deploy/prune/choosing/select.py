"""Choose calibration set, gamma and saliency by held-out KL.

A candidate is a calibration set (a draw from a corpus), a saliency and a gamma. Each is scored, planned,
refitted if the recipe says so, and cut in memory, never built; the one closest to the dense model on held-out
windows wins. All candidates meet the same windows and are compared by paired differences, whose standard
error is far below that of each KL. One scoring serves every gamma.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.shown.html import html_table
from nirvana_deploy.calibrate.overlap import refuse_overlap
from nirvana_deploy.calibrate.windows import TokenWindows
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.choosing.candidates import (
    Everywhere,
    Piece,
    Tried,
    Work,
    candidates_of,
    pieces_of,
)
from nirvana_deploy.prune.curves.curve import Curves
from nirvana_deploy.prune.cutting import Cutter, reads_curves, width_step
from nirvana_deploy.prune.divergence import masked_quality
from nirvana_deploy.prune.plan import PrunePlan, default_gamma, largest_sparsity, removed_counts
from nirvana_deploy.prune.saliency.units import UnitScores

SEPARABLE_STANDARD_ERRORS = 2.0
"""A lead of more paired standard errors than these is called separable."""


@dataclass(frozen=True)
class CandidateResult:
    """One candidate and how far its masked model departs from the dense one."""

    source: str | None
    """Corpus; None for saliencies that read no calibration text."""
    seed: int | None
    draw: int | None
    text_sha256: str | None
    saliency: str
    gamma: float | None
    """None where curves decide."""
    kl: float
    """Mean over held-out positions of KL(dense || masked), nats."""
    kl_standard_error: float | None
    """Over held-out windows; None for a single one."""
    behind: float
    """KL minus the winner's, nats."""
    behind_standard_error: float | None
    """Of the paired difference over windows; the yardstick of ``behind``."""

    @property
    def name(self) -> str:
        """For people: "pydoc 0.3 nirvana gamma 3" (seed.draw)."""
        text = "no text" if self.source is None else f"{self.source} {self.seed}.{self.draw}"
        return f"{text} {self.saliency}" + ("" if self.gamma is None else f" gamma {self.gamma:g}")


@dataclass(frozen=True)
class Selection:
    """The winner, and every candidate beside it."""

    candidates: tuple[CandidateResult, ...]
    """In the order tried: saliency, then calibration set, then gamma."""
    winner: int
    """Index of the least KL; of equal ones the first."""
    runner_up: int | None
    """Index of the second least; None for a single candidate."""
    plan: PrunePlan
    """The winner's plan."""
    calibration: TokenWindows | None
    """The winner's windows; None when its saliency reads none."""
    scores: UnitScores | None
    """The winner's unit scores; None when its units were chosen inside the refit."""
    curves: Curves | None
    """The curves that decided how much goes from where; None without them."""
    heldout_sources: tuple[str, ...]
    heldout_windows: int
    heldout_tokens: int

    def __repr__(self) -> str:
        return f"Selection({self.verdict})"

    def _repr_html_(self) -> str:
        """The candidates, best first, for a notebook."""
        ranked = sorted(self.candidates, key=lambda one: one.kl)
        rows = [(one.name, f"{one.kl:.4f}", f"{one.behind:.4f}") for one in ranked]
        return html_table(["Candidate", "KL, nats", "Behind"], rows, title=self.verdict)

    @property
    def separable(self) -> bool:
        """Whether the winner leads the runner-up by more than chance explains (False when unknown)."""
        if self.runner_up is None:
            return False
        second = self.candidates[self.runner_up]
        error = second.behind_standard_error
        return error is not None and second.behind > SEPARABLE_STANDARD_ERRORS * error

    @property
    def verdict(self) -> str:
        """One sentence: who won, and whether by more than chance."""
        best = self.candidates[self.winner]
        if self.runner_up is None:
            return f"Only candidate: {best.name}, KL {best.kl:.4f}."
        second = self.candidates[self.runner_up]
        error = second.behind_standard_error
        margin = f"by {second.behind:.4f}" + ("" if error is None else f" +- {error:.4f}")
        sure = "more than chance explains" if self.separable else "no more than chance explains"
        return f"Winner: {best.name}, KL {best.kl:.4f}, ahead of {second.name} {margin} nats: {sure}."

    def to_json(self) -> dict[str, Any]:
        """For the manifest: every candidate, min / median / max, the winner and how sure it is."""
        kls = [candidate.kl for candidate in self.candidates]
        return {
            "heldout": {
                "sources": list(self.heldout_sources),
                "windows": self.heldout_windows,
                "tokens": self.heldout_tokens,
            },
            "scoring": "set",  # one backward per calibration set, as NIRVANA's authors do
            "kl": {"min": min(kls), "median": float(np.median(kls)), "max": max(kls)},
            "winner": self.winner,
            "runner_up": self.runner_up,
            "separable": self.separable,
            "candidates": [{"name": candidate.name, **asdict(candidate)} for candidate in self.candidates],
        }


def gamma_grid(shape: ModelShape, *, sparsity: float, round_to: int = 8) -> tuple[float, ...]:
    """The grid of "gamma auto": 1, 2, M/A and 1.5 M/A, as far as the model allows them at ``sparsity``.

    If it allows none, M/A alone, so that the refusal can say what is feasible.
    """
    usual = default_gamma(shape)
    feasible = (
        gamma
        for gamma in sorted({1.0, 2.0, usual, 1.5 * usual})
        if sparsity <= largest_sparsity(shape, gamma=gamma, round_to=round_to)
    )
    return tuple(feasible) or (usual,)


def select_cut(
    cutter: Cutter,
    calibrations: Sequence[TokenWindows],
    heldout: Sequence[TokenWindows],
    *,
    saliencies: Sequence[str],
    gammas: Sequence[float | None],
    scratch: Path,
    everywhere: Everywhere | None = None,
) -> Selection:
    """Try every saliency with every calibration set and every gamma; the least held-out KL wins.

    Candidates are cut, and refitted if it says so, as the recipe of ``cutter`` says. ``calibrations`` are
    windows [N, T] each, ``heldout`` one or more sets [M, T'] with one T', all counted together; a gamma of
    None is M/A, and where curves decide there is none. Saliencies that need no data are tried once.
    ``scratch`` is a folder for the refits. ``everywhere`` has the candidates of each calibration set made in
    another process, which must see the model and ``scratch``. Raises NirvanaError, before any work, for no
    candidates, unknown names, a gamma that the model does not allow at this sparsity, or held-out text that
    overlaps calibration text.
    """
    if not (calibrations and saliencies and gammas):
        raise NirvanaError("Nothing to choose from: give at least one calibration set, saliency and gamma.")
    _refuse_infeasible(cutter, saliencies, gammas)
    tokens = _heldout_tokens(heldout)
    refuse_overlap(calibrations, heldout)
    pieces = pieces_of(calibrations, saliencies)  # refuses unknown ones before any work
    tried: list[Tried] = []
    for piece, found in _made(cutter, pieces, gammas, scratch, everywhere):
        if isinstance(found, NirvanaError):
            raise found
        tried += [replace(one, calibration=piece.windows) for one in found]
    tried.sort(key=lambda one: one.place)
    return _selection(tried, _divergences(cutter, tried, tokens), heldout)


def _made(
    cutter: Cutter,
    pieces: Sequence[Piece],
    gammas: Sequence[float | None],
    scratch: Path,
    everywhere: Everywhere | None,
) -> Iterable[tuple[Piece, list[Tried] | NirvanaError]]:
    if everywhere is None:
        return ((piece, candidates_of(cutter, piece, gammas, scratch)) for piece in pieces)
    names = {"model_name": cutter.model_name, "seed": cutter.seed, "cost": cutter.cost}
    return everywhere(pieces, Work(cutter.dense.path, cutter.recipe, names, tuple(gammas), scratch))


def _refuse_infeasible(cutter: Cutter, saliencies: Sequence[str], gammas: Sequence[float | None]) -> None:
    """Before any work; what curves allow is known once there are some."""
    shape, recipe = cutter.dense.shape, cutter.recipe
    for gamma in gammas:
        if not all(reads_curves(recipe, saliency) for saliency in saliencies):
            removed_counts(
                shape,
                sparsity=recipe.sparsity,
                gamma=default_gamma(shape) if gamma is None else gamma,
                round_to=width_step(recipe, shape),
            )


def _divergences(cutter: Cutter, tried: Sequence[Tried], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """KL per window [P, M]."""
    [quality] = masked_quality(
        cutter.dense,
        [one.plan for one in tried],
        [tokens],
        reconstructions=[one.reconstruction for one in tried],
        progress=cutter.progress,
    )
    return quality.divergence


def _heldout_tokens(heldout: Sequence[TokenWindows]) -> NDArray[np.int64]:
    """All held-out windows [M, T]."""
    lengths = {windows.tokens.shape[1] for windows in heldout if len(windows.tokens)}
    if len(lengths) != 1:
        raise NirvanaError(
            f"Candidates are compared on held-out windows of one length, got lengths {sorted(lengths)}."
        )
    return np.concatenate([windows.tokens for windows in heldout if len(windows.tokens)])


def _selection(
    tried: Sequence[Tried],
    divergences: NDArray[np.float64],
    heldout: Sequence[TokenWindows],
) -> Selection:
    """Rank candidates by their KL per window [P, M]."""
    means = divergences.mean(axis=1)
    order = np.argsort(means, kind="stable")
    winner = int(order[0])
    results = []
    for index, (one, by_window) in enumerate(zip(tried, divergences, strict=True)):
        text = one.calibration
        results.append(
            CandidateResult(
                source=text.source if text else None,
                seed=text.seed if text else None,
                draw=text.draw if text else None,
                text_sha256=text.text_sha256 if text else None,
                saliency=one.plan.saliency,
                gamma=one.plan.gamma,
                kl=float(means[index]),
                kl_standard_error=_standard_error(by_window),
                behind=float(means[index] - means[winner]),
                behind_standard_error=_standard_error(by_window - divergences[winner]),
            )
        )
    return Selection(
        candidates=tuple(results),
        winner=winner,
        runner_up=int(order[1]) if len(order) > 1 else None,
        plan=tried[winner].plan,
        calibration=tried[winner].calibration,
        scores=tried[winner].scores,
        curves=tried[winner].curves,
        heldout_sources=tuple(dict.fromkeys(windows.source for windows in heldout)),
        heldout_windows=divergences.shape[1],
        heldout_tokens=sum(windows.tokens.size for windows in heldout),
    )


def _standard_error(values: NDArray[np.float64]) -> float | None:
    """Of the mean of ``values``; None for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
