"""Make the candidates of a choice, here or in other processes: those of one calibration set at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.windows import TokenWindows
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.curves.curve import Curves
from nirvana_deploy.prune.cutting import Cutter, reads_curves
from nirvana_deploy.prune.plan import PrunePlan
from nirvana_deploy.prune.recipe import REFIT, Pruning
from nirvana_deploy.prune.saliency.gradient import saliency_named
from nirvana_deploy.prune.saliency.units import UnitScores
from nirvana_deploy.prune.streaming.score import score_units


@dataclass(frozen=True)
class Tried:
    """A candidate, cut."""

    place: tuple[int, int, int]
    """In the order of saliency, calibration set, gamma."""
    plan: PrunePlan
    calibration: TokenWindows | None
    scores: UnitScores | None
    curves: Curves | None
    reconstruction: Path | None


@dataclass(frozen=True)
class Piece:
    """The candidates of one calibration set, or those that read none."""

    number: int
    windows: TokenWindows | None
    saliencies: tuple[tuple[int, str], ...]
    """With their places in the list."""
    measured_on: TokenWindows
    """What curves are measured on, if they decide."""


Everywhere = Callable[
    [Sequence[Piece], Callable[[Piece], list[Tried]]], Iterable[tuple[Piece, list[Tried] | NirvanaError]]
]
"""Does work, which is pickled, on each piece: ``run_points`` of the room ``search``."""


@dataclass(frozen=True)
class Work:
    """Makes the candidates of a piece in another process, which sees the same files."""

    dense: Path
    recipe: Pruning
    cutter: dict[str, Any]
    """Its other arguments."""
    gammas: tuple[float | None, ...]
    scratch: Path

    def __call__(self, piece: Piece) -> list[Tried]:
        """The candidates, without the windows, which need not travel back."""
        cutter = Cutter(Checkpoint.open(self.dense), self.recipe, **self.cutter)
        made = candidates_of(cutter, piece, self.gammas, self.scratch)
        return [replace(one, calibration=None) for one in made]


def pieces_of(calibrations: Sequence[TokenWindows], saliencies: Sequence[str]) -> list[Piece]:
    """All that is to be tried; raises NirvanaError for an unknown saliency."""
    reading: list[tuple[int, str]] = []
    blind: list[tuple[int, str]] = []
    for place, name in enumerate(saliencies):
        reads = name == REFIT or saliency_named(name).needs_data
        (reading if reads else blind).append((place, name))
    sets = enumerate(calibrations if reading else ())
    pieces = [Piece(number, windows, tuple(reading), windows) for number, windows in sets]
    return pieces + ([Piece(0, None, tuple(blind), calibrations[0])] if blind else [])


def candidates_of(cutter: Cutter, piece: Piece, gammas: Sequence[float | None], scratch: Path) -> list[Tried]:
    """Each saliency with each gamma; one set of curves serves all. Refits are written to ``scratch``."""
    tried: list[Tried] = []
    measured: Curves | None = None
    for place, saliency in piece.saliencies:
        scores = None if saliency == REFIT else _scores(cutter, piece, saliency)
        curves = None
        if reads_curves(cutter.recipe, saliency):
            curves = measured = measured or cutter.curves(piece.measured_on.tokens)
        for number, gamma in enumerate(gammas if curves is None else (None,)):
            at = (place, piece.number, number)
            plan, refitted = cutter.candidate(
                piece.measured_on if cutter.recipe.reconstruct else piece.windows,
                scores,
                saliency=saliency,
                gamma=gamma,
                curves=curves,
                out=scratch / "-".join(["candidate", *map(str, at)]),
            )
            tried.append(Tried(at, plan, piece.windows, scores, curves, refitted))
    return tried


def _scores(cutter: Cutter, piece: Piece, saliency: str) -> UnitScores:
    return score_units(
        cutter.dense,
        None if piece.windows is None else piece.windows.tokens,
        saliency=saliency,
        seed=cutter.seed,
        micro_batch=cutter.recipe.micro_batch,
        progress=cutter.progress,
    )
