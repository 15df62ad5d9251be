"""Which calibration text, gamma and saliency to take: tried on a model, nothing written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.calibrate.mixture import sources_of
from nirvana_deploy.calibrate.windows import calibration_candidates
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.prune.choosing.choices import listed
from nirvana_deploy.prune.choosing.select import Selection, gamma_grid, select_cut
from nirvana_deploy.prune.cutting import Cutter
from nirvana_deploy.prune.recipe import REFIT, Pruning
from nirvana_deploy.prune.recipe import Selection as Candidates
from nirvana_deploy.search.recipe import Where, require_place
from nirvana_deploy.search.workers import run_points


def select_calibration(
    model: str, recipe: Candidates, where: Where | None = None, *, progress: Progress = SILENT
) -> Selection:
    """Rank calibration sets, gammas and saliencies by KL(dense || pruned) on held-out windows.

    Each candidate is scored, planned, refitted if the recipe says so, and masked, never built. A script that
    asks for several processes does so under ``if __name__ == "__main__"``: they are spawned. Raises
    NirvanaError for a gamma that is neither a number nor M/A, an unknown saliency, and text that does not
    suffice.
    """
    where = where or Where()
    require_place(where)
    named = [] if recipe.gammas == "auto" else [_gamma(text) for text in listed(recipe.gammas)]
    source = resolve_model(model, progress=progress)
    checkpoint = Checkpoint.open(source.path)
    names = sources_of(recipe.corpora)
    _require_sense(recipe)
    sets = calibration_candidates(
        names,
        checkpoint,
        candidates=recipe.candidates,
        num_sequences=recipe.num_sequences,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        heldout_sequences=-(-recipe.heldout_sequences // len(names)),
        heldout_len=recipe.heldout_len,
        progress=progress,
    )
    grid = gamma_grid(checkpoint.shape, sparsity=recipe.sparsity, round_to=recipe.round_to)
    cut = Pruning(
        sparsity=recipe.sparsity,
        allocation=recipe.allocation,
        round_to=recipe.round_to,
        reconstruct=recipe.reconstruct,
    )
    # refits are read here that were written on other nodes, which share this folder with us
    with TemporaryDirectory(dir=None if where.cluster is None else Path.cwd()) as scratch:
        return select_cut(
            Cutter(checkpoint, cut, seed=recipe.seed, model_name=source.name, progress=progress),
            sets.calibrations,
            sets.heldout,
            saliencies=listed(recipe.saliencies),
            gammas=named or grid,
            scratch=Path(scratch),
            everywhere=None if where == Where() else partial(run_points, where=where),
        )


def _require_sense(recipe: Candidates) -> None:
    """Raise NirvanaError for what curves do not read, or need."""
    saliencies = listed(recipe.saliencies)
    if REFIT in saliencies and recipe.allocation == "global":
        raise NirvanaError(
            f"saliency {REFIT!r} compares the units of a layer, and --allocation global ranks those of all.",
            hint="Pass --allocation curves or uniform.",
        )
    if REFIT in saliencies and len(saliencies) > 1 and not recipe.reconstruct:
        raise NirvanaError(
            f"saliency {REFIT!r} is always refitted, and the others are not without --reconstruct.",
            hint="Pass --reconstruct, or leave one of them out.",
        )
    if recipe.allocation == "curves" and recipe.gammas != "M/A":
        raise NirvanaError(
            f"--gamma {recipe.gammas} divides the budget between attention and MLP, and so do the curves.",
            hint="Leave --gamma out, or pass --allocation global.",
        )


def _gamma(text: str) -> float | None:
    """A gamma; None is M/A."""
    if text.upper() == "M/A":
        return None
    try:
        return float(text)
    except ValueError:
        raise NirvanaError(
            f"{text!r} is neither a number nor M/A.", hint="For example --gamma 2,M/A"
        ) from None
