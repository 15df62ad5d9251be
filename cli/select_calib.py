"""``nirvana-deploy select-calib MODEL``: choose calibration set, gamma and saliency by KL divergence."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from nirvana_deploy.prune.recipe import Pruning, Selection
from nirvana_deploy.search.recipe import Where

from .arguments import Model
from .common import TerminalProgress, echo, echo_json, echo_table
from .options import json_option, recipe_options, taken


@click.command("select-calib")
@click.argument("model", type=Model())
@recipe_options(Selection, Where)
@json_option
def select_calib(model: str, as_json: bool, **options: Any) -> None:
    """Try calibration sets, gammas and saliencies, and rank them by KL(dense || pruned).

    Each candidate is scored, planned and masked, never built. The KL is measured on held-out windows of
    every corpus, which no candidate contains. Writes nothing.

    \b
    Examples:
      nirvana-deploy select-calib smollm2 --sparsity 0.4 --candidates 4 --corpora pydoc,self
      nirvana-deploy select-calib smollm2 --sparsity 0.4 --candidates 1 --gamma auto --saliency nirvana,taylor
    """
    from nirvana_deploy.calibrate.mixture import sources_of
    from nirvana_deploy.calibrate.windows import calibration_candidates
    from nirvana_deploy.model.checkpoint import Checkpoint
    from nirvana_deploy.model.sources import resolve_model
    from nirvana_deploy.prune.choosing.choices import listed
    from nirvana_deploy.prune.choosing.select import gamma_grid, select_cut
    from nirvana_deploy.prune.cutting import Cutter
    from nirvana_deploy.search.workers import run_points

    recipe, where, progress = taken(Selection, options), taken(Where, options), TerminalProgress()
    source = resolve_model(model, progress=progress)
    checkpoint = Checkpoint.open(source.path)
    names = sources_of(recipe.corpora)
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
    gammas = (
        gamma_grid(checkpoint.shape, sparsity=recipe.sparsity, round_to=recipe.round_to)
        if recipe.gammas == "auto"
        else [_gamma(text) for text in listed(recipe.gammas)]
    )
    plain = Pruning(
        sparsity=recipe.sparsity,
        allocation=recipe.allocation,
        round_to=recipe.round_to,
        reconstruct=False,
    )
    with TemporaryDirectory() as scratch:
        selection = select_cut(
            Cutter(checkpoint, plain, seed=recipe.seed, model_name=source.name, progress=progress),
            sets.calibrations,
            sets.heldout,
            saliencies=listed(recipe.saliencies),
            gammas=gammas,
            scratch=Path(scratch),
            everywhere=None if where == Where() else partial(run_points, where=where),
        )
    if as_json:
        echo_json(selection.to_json())
        return
    echo_table(
        ("candidate (corpus seed.draw saliency gamma)", "KL, nats", "standard error", "behind", "+-"),
        [
            (
                one.name,
                _number(one.kl),
                _number(one.kl_standard_error),
                *_lag(one.behind, one.behind_standard_error),
            )
            for one in sorted(selection.candidates, key=lambda one: one.kl)
        ],
        title=f"KL(dense || pruned) on {selection.heldout_tokens:,} held-out tokens, "
        f"sparsity {recipe.sparsity:g}",
    )
    echo(selection.verdict)


def _gamma(text: str) -> float | None:
    """A gamma; None is M/A."""
    if text.upper() == "M/A":
        return None
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor M/A.", param_hint="--gamma") from None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _lag(behind: float, standard_error: float | None) -> tuple[str, str]:
    """Distance to the winner; nothing for the winner itself."""
    return (_number(behind), _number(standard_error)) if behind else ("", "")
