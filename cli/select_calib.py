"""``nirvana-deploy select-calib MODEL``: choose calibration set, gamma and saliency by KL divergence."""

from __future__ import annotations

from typing import Any

import click

from nirvana_deploy.prune.recipe import Selection
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

    Each candidate is scored, planned and masked, with --reconstruct refitted too, never built. The KL is
    measured on held-out windows of every corpus, which no candidate contains. Writes nothing.

    \b
    Examples:
      nirvana-deploy select-calib smollm2 --sparsity 0.4 --candidates 4 --corpora pydoc,self
      nirvana-deploy select-calib smollm2 --sparsity 0.4 --candidates 1 --gamma auto --saliency nirvana,taylor
      nirvana-deploy select-calib smollm2 --sparsity 0.4 --corpora pydoc,code --reconstruct
    """
    from nirvana_deploy.pipeline.alone.calibration import select_calibration

    recipe, where = taken(Selection, options), taken(Where, options)
    selection = select_calibration(model, recipe, where, progress=TerminalProgress())
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


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _lag(behind: float, standard_error: float | None) -> tuple[str, str]:
    """Distance to the winner; nothing for the winner itself."""
    return (_number(behind), _number(standard_error)) if behind else ("", "")
