"""Choose calibration set, gamma and saliency by held-out KL.

A candidate is a calibration set (a draw from a corpus), a saliency and a gamma. Each is scored, planned and
*masked*, never built; the one whose masked model is closest to the dense one on held-out windows wins. All
candidates meet the same windows and are compared by paired differences, whose standard error is far below
that of each KL. One scoring serves every gamma.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.calibrate.overlap import refuse_overlap
from nirvana_deploy.calibrate.stage import calibration_record
from nirvana_deploy.calibrate.windows import TokenWindows
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.curves.curve import Curves
from nirvana_deploy.prune.cutting import Cutter, reads_curves
from nirvana_deploy.prune.divergence import masked_quality
from nirvana_deploy.prune.plan import PrunePlan, default_gamma, largest_sparsity, make_plan, removed_counts
from nirvana_deploy.prune.recipe import REFIT
from nirvana_deploy.prune.saliency.gradient import saliency_named
from nirvana_deploy.prune.saliency.units import UnitScores
from nirvana_deploy.prune.streaming.score import DEFAULT_MICRO_BATCH, score_units

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
    heldout_sources: tuple[str, ...]
    heldout_windows: int
    heldout_tokens: int

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


@dataclass(frozen=True)
class _Tried:
    plan: PrunePlan
    calibration: TokenWindows | None
    scores: UnitScores | None
    reconstruction: Path | None = None


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


def select_calibration(
    checkpoint: Checkpoint,
    calibrations: Sequence[TokenWindows],
    heldout: Sequence[TokenWindows],
    *,
    sparsity: float,
    saliencies: Sequence[str] = ("nirvana",),
    gammas: Sequence[float | None] = (None,),
    allocation: str = "global",
    round_to: int = 8,
    seed: int = 0,
    model_name: str = "",
    micro_batch: int = DEFAULT_MICRO_BATCH,
    progress: Progress = SILENT,
) -> Selection:
    """Try every saliency with every calibration set and every gamma; the least held-out KL wins.

    ``calibrations`` are windows [N, T] each, ``heldout`` one or more sets [M, T'] with one T', all counted
    together; a ``gamma`` of None is M/A; ``seed`` serves the saliency ``random`` alone. Saliencies that need
    no data are tried once. The checkpoint is not touched and nothing is written. Raises NirvanaError, before
    any work, for no candidates, unknown names, a gamma that the model does not allow at this sparsity, or
    held-out text that overlaps calibration text.
    """
    shape = checkpoint.shape
    if not (calibrations and saliencies and gammas):
        raise NirvanaError("Nothing to choose from: give at least one calibration set, saliency and gamma.")
    for gamma in gammas:
        removed_counts(
            shape,
            sparsity=sparsity,
            gamma=default_gamma(shape) if gamma is None else gamma,
            round_to=round_to,
        )
    tokens = _heldout_tokens(heldout)
    refuse_overlap(calibrations, heldout)
    tried: list[_Tried] = []
    for calibration, saliency, scores in _scored(
        checkpoint, calibrations, saliencies, seed, micro_batch, progress
    ):
        for gamma in gammas:
            plan = make_plan(
                shape,
                scores,
                sparsity=sparsity,
                gamma=gamma,
                allocation=allocation,
                round_to=round_to,
                saliency=saliency,
                seed=seed,
                model_name=model_name,
                calibration=None if calibration is None else calibration_record(calibration),
            )
            tried.append(_Tried(plan, calibration, scores))
    return _selection(tried, _divergences(checkpoint, tried, tokens, progress), heldout)


def select_cut(
    cutter: Cutter,
    calibrations: Sequence[TokenWindows],
    heldout: Sequence[TokenWindows],
    *,
    saliencies: Sequence[str],
    gammas: Sequence[float | None],
    scratch: Path,
) -> Selection:
    """As :func:`select_calibration`, of candidates cut and refitted as the recipe of ``cutter`` says.

    Refits of an encoder-decoder are not compared (its candidates are masked): plain cuts are. ``scratch`` is
    a folder for the refits of all candidates.
    """
    dense, recipe, progress = cutter.dense, cutter.recipe, cutter.progress
    tokens = _heldout_tokens(heldout)
    refuse_overlap(calibrations, heldout)
    by_set: dict[int, Curves] = {}

    def curves_of(windows: TokenWindows | None, saliency: str) -> Curves | None:
        if not reads_curves(recipe, saliency):
            return None
        windows = windows or calibrations[0]
        if id(windows) not in by_set:
            by_set[id(windows)] = cutter.curves(windows.tokens)
        return by_set[id(windows)]

    inside: list[tuple[TokenWindows | None, str, UnitScores | None]] = [
        (windows, REFIT, None) for windows in calibrations if REFIT in saliencies
    ]
    scored = [name for name in saliencies if name != REFIT]
    inside += _scored(dense, calibrations, scored, cutter.seed, recipe.micro_batch, progress)
    tried: list[_Tried] = []
    for windows, saliency, scores in inside:
        curves = curves_of(windows, saliency)
        for gamma in gammas if curves is None else (None,):
            plan, refitted = cutter.candidate(
                windows,
                scores,
                saliency=saliency,
                gamma=gamma,
                curves=curves,
                out=scratch / f"candidate-{len(tried)}",
            )
            shown = None if dense.shape.family.encoder_decoder else refitted
            tried.append(_Tried(plan, windows, scores, shown))
    return _selection(tried, _divergences(dense, tried, tokens, progress), heldout)


def _divergences(
    checkpoint: Checkpoint, tried: Sequence[_Tried], tokens: NDArray[np.int64], progress: Progress
) -> NDArray[np.float64]:
    """KL per window [P, M]."""
    [quality] = masked_quality(
        checkpoint,
        [one.plan for one in tried],
        [tokens],
        reconstructions=[one.reconstruction for one in tried],
        progress=progress,
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


def _scored(
    checkpoint: Checkpoint,
    calibrations: Sequence[TokenWindows],
    saliencies: Sequence[str],
    seed: int,
    micro_batch: int,
    progress: Progress,
) -> Iterator[tuple[TokenWindows | None, str, UnitScores]]:
    """Unit scores of every saliency by every calibration set."""
    methods = [saliency_named(name) for name in saliencies]  # refuses unknown ones before any work
    for name, method in zip(saliencies, methods, strict=True):
        if not method.needs_data:
            yield None, name, score_units(checkpoint, None, saliency=name, seed=seed, progress=progress)
        else:
            for calibration in calibrations:
                scores = score_units(
                    checkpoint, calibration.tokens, saliency=name, micro_batch=micro_batch, progress=progress
                )
                yield calibration, name, scores


def _selection(
    tried: Sequence[_Tried],
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
        heldout_sources=tuple(dict.fromkeys(windows.source for windows in heldout)),
        heldout_windows=divergences.shape[1],
        heldout_tokens=sum(windows.tokens.size for windows in heldout),
    )


def _standard_error(values: NDArray[np.float64]) -> float | None:
    """Of the mean of ``values``; None for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
