"""What the selector chooses among, read from the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.mixture import parts_of, sources_of
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.choosing.select import gamma_grid
from nirvana_deploy.prune.curves.budget import require_feasible
from nirvana_deploy.prune.cutting import budget_of, reads_curves, width_step
from nirvana_deploy.prune.plan import default_gamma, removed_counts
from nirvana_deploy.prune.recipe import REFIT, Pruning
from nirvana_deploy.prune.saliency.gradient import saliency_named

_AUTO_SALIENCIES = ("nirvana", "taylor")
_AUTO_CANDIDATES = 4


@dataclass(frozen=True)
class Choices:
    """The candidates; one of each means that there is nothing to choose."""

    corpora: tuple[str, ...]
    candidates: int
    """Disjoint calibration sets drawn from each corpus."""
    saliencies: tuple[str, ...]
    gammas: tuple[float | None, ...]
    """None alone: curves decide instead."""

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
        if name != REFIT:
            saliency_named(name)
    _require_sense(pruning, saliencies)
    if pruning.cost == "weights" and any(reads_curves(pruning, name) for name in saliencies):
        require_feasible(shape, budget_of(pruning, shape))  # other costs are not known yet
    return Choices(
        corpora=_corpora(calibration.calib, shape),
        candidates=calibration.candidates or (_AUTO_CANDIDATES if auto else 1),
        saliencies=saliencies,
        gammas=_gammas(pruning, saliencies, shape),
    )


def why_groups_stay(shape: ModelShape) -> str | None:
    """Why no KV group of a model can go; None where some can."""
    if any(shape.removable_groups(position) for position in range(len(shape.layers))):
        return None
    if all(layer.kv_heads == 1 for layer in shape.layers):
        return "every layer has one KV head, which must stay"
    return "the KV heads of this model share a norm, and must stay"


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


def _require_sense(recipe: Pruning, saliencies: Sequence[str]) -> None:
    """Raise NirvanaError for options that contradict each other."""
    if REFIT in saliencies and not recipe.reconstruct:
        raise NirvanaError(
            f"saliency {REFIT!r} chooses units inside the refit, and --no-reconstruct leaves that out.",
            hint="Name a saliency, for example --saliency taylor, or refit.",
        )
    if REFIT in saliencies and recipe.allocation == "global":
        raise NirvanaError(
            f"allocation 'global' ranks units over all layers, and saliency {REFIT!r} compares those of one.",
            hint="Pass --allocation curves, or --saliency nirvana; --preset paper is both of NIRVANA's.",
        )
    if recipe.gamma is not None and all(reads_curves(recipe, name) for name in saliencies):
        raise NirvanaError(
            f"gamma {recipe.gamma} divides the budget between MLP and attention, and so do the curves.",
            hint="Leave --gamma out, or pass --allocation global (with --saliency nirvana or another).",
        )
    if recipe.allocation == "curves" or set(saliencies) == {REFIT}:
        return
    minded = (
        ("cost", recipe.cost, recipe.cost != "weights"),
        ("min-groups", recipe.min_groups, recipe.min_groups > 1),
        ("min-neurons", recipe.min_neurons, recipe.min_neurons is not None),
    )
    for name, value, given in minded:
        if given:
            raise NirvanaError(
                f"{name} {value!r} is minded by curves alone, not by allocation {recipe.allocation!r}.",
                hint=f"Pass --allocation curves, or leave --{name} out.",
            )


def _gammas(recipe: Pruning, saliencies: Sequence[str], shape: ModelShape) -> tuple[float | None, ...]:
    if all(reads_curves(recipe, name) for name in saliencies):
        return (None,)
    if recipe.gamma is not None and (why := why_groups_stay(shape)):
        raise NirvanaError(
            f"gamma {recipe.gamma} divides the budget between MLP and attention, but {why}.",
            hint="Leave --gamma out: everything comes from the FFN here.",
        )
    if recipe.gamma == "auto":
        gammas: tuple[float, ...] = gamma_grid(
            shape, sparsity=recipe.sparsity, round_to=width_step(recipe, shape)
        )
    else:
        gammas = (default_gamma(shape) if recipe.gamma is None else recipe.gamma,)
    for gamma in gammas:
        removed_counts(shape, sparsity=recipe.sparsity, gamma=gamma, round_to=width_step(recipe, shape))
    return gammas
