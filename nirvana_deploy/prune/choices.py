"""What the selector chooses among, read from the recipes."""

from __future__ import annotations

from dataclasses import dataclass

from nirvana_deploy.calibrate.mixture import parts_of, sources_of
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.plan import default_gamma, removed_counts
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.prune.saliency.gradient import saliency_named
from nirvana_deploy.prune.select import gamma_grid

_AUTO_SALIENCIES = ("nirvana", "taylor")
_AUTO_CANDIDATES = 4


@dataclass(frozen=True)
class Choices:
    """The candidates; one of each means that there is nothing to choose."""

    corpora: tuple[str, ...]
    candidates: int
    """Disjoint calibration sets drawn from each corpus."""
    saliencies: tuple[str, ...]
    gammas: tuple[float, ...]

    @property
    def single(self) -> bool:
        """Whether there is only one candidate."""
        return len(self.corpora) * self.candidates * len(self.saliencies) * len(self.gammas) == 1


def choices_of(calibration: Calibration, pruning: Pruning, shape: ModelShape) -> Choices:
    """The candidates of a job.

    Raises NirvanaError, before any work, for an unknown saliency or a gamma that cannot meet the sparsity.
    """
    auto = calibration.calib == "auto"
    saliencies = _AUTO_SALIENCIES if pruning.saliency == "auto" else listed(pruning.saliency)
    for name in saliencies:
        saliency_named(name)
    return Choices(
        corpora=_corpora(calibration.calib, shape),
        candidates=calibration.candidates or (_AUTO_CANDIDATES if auto else 1),
        saliencies=saliencies,
        gammas=_gammas(pruning, shape),
    )


def listed(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated option, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _corpora(calib: str, shape: ModelShape) -> tuple[str, ...]:
    """The sources to draw from, a mixture being one of them; its shares are checked before any work."""
    if calib == "auto":
        return ("pydoc", "self") if shape.family.writes_text else ("pydoc",)
    corpora = sources_of(calib)
    for corpus in corpora:
        parts_of(corpus, writes_text=shape.family.writes_text)
    return corpora


def _gammas(recipe: Pruning, shape: ModelShape) -> tuple[float, ...]:
    if recipe.gamma == "auto":
        gammas = gamma_grid(shape, sparsity=recipe.sparsity, round_to=recipe.round_to)
    else:
        gammas = (default_gamma(shape) if recipe.gamma is None else recipe.gamma,)
    for gamma in gammas:
        removed_counts(shape, sparsity=recipe.sparsity, gamma=gamma, round_to=recipe.round_to)
    return gammas
