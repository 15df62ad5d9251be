"""``nirvana-deploy recipe MODEL``: everything that a job would do, as recipe.toml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import echo, echo_json
from .job import deployment_options, job_from, model_argument, pruning_options, recipe_option
from .options import json_option

if TYPE_CHECKING:
    from nirvana_deploy.pipeline.job import Job


@click.command("recipe")
@model_argument
@pruning_options
@deployment_options
@recipe_option
@json_option
def recipe(model: str | None, recipe_file: Path | None, as_json: bool, **options: Any) -> None:
    """Show the recipe of a job without running it: every option with its value, checked.

    \b
    Examples:
      nirvana-deploy recipe smollm2 --sparsity 0.4 --quantize w4 > my.toml
      nirvana-deploy prune-export --recipe my.toml --sparsity 0.3
    """
    show(job_from(model, recipe_file, options), as_json=as_json)


def show(job: Job, *, as_json: bool) -> None:
    """Print a job: as recipe.toml, or as JSON."""
    from nirvana_deploy.pipeline.job import as_json as sections
    from nirvana_deploy.pipeline.recipe_file import recipe_toml

    if as_json:
        echo_json(sections(job))
    else:
        echo(recipe_toml(job), nl=False)
