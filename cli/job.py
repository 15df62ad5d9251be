"""Options of a whole job, shared by ``prune-export``, ``prune`` and ``recipe``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.engine.recipe import Engines
from nirvana_deploy.export.recipe import Export
from nirvana_deploy.measure.recipe import Measurement
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.quantize.recipe import Schemes
from nirvana_deploy.recover.recipe import Recovery

from .arguments import Model
from .options import ShownOption, recipe_options, typed

if TYPE_CHECKING:
    from nirvana_deploy.pipeline.given_curves import GivenCurves
    from nirvana_deploy.pipeline.job import Job

Command = TypeVar("Command", bound=Callable[..., Any])

model_argument = click.argument("model", type=Model(), required=False)
recipe_option = click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    default=None,
    help="Take options from this recipe.toml; options typed here win.",
)
pruning_options = recipe_options(Pruning, Calibration, Recovery, required=False)
deployment_options = recipe_options(Export, Schemes, Engines, Measurement)

curves_option = click.option(
    "--curves",
    "curves_at",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE|OUT",
    help="Take the curves of an earlier run on the same model, and calibrate as it did: an output folder, "
    "or its curves.safetensors.",
    cls=ShownOption,
    show_default="measure them",
)
dry_run_option = click.option(
    "--dry-run",
    is_flag=True,
    help="Print which stages would run, what they would write, and about how much time, memory and disk "
    "they would take; write nothing. Recorded runs took 0.7 to 2 times the time counted. A model that is not "
    "on this machine is fetched.",
)


def folder_options(command: Command) -> Command:
    """Add the options for a job's output folder."""
    options = [
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            default=None,
            help="Output folder.",
            cls=ShownOption,
            show_default="./<model>-s<sparsity>",
        ),
        click.option("--resume", is_flag=True, help="Continue after the last finished stage in --out."),
        click.option("--force", is_flag=True, help="Overwrite an earlier run in --out."),
        dry_run_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def given_curves(path: Path | None) -> GivenCurves | None:
    """The curves that an option names."""
    if path is None:
        return None
    from nirvana_deploy.pipeline.given_curves import GivenCurves

    return GivenCurves.at(path)


def job_from(
    model: str | None,
    recipe_file: Path | None,
    options: dict[str, Any],
    curves: GivenCurves | None = None,
) -> Job:
    """Build the job from the recipe file, if any, and the typed options, which win.

    Without a recipe file, text is drawn as for ``curves``.
    """
    if recipe_file is None:
        if model is None:
            raise click.UsageError("Missing argument 'MODEL', or --recipe FILE.")
        if options["sparsity"] is None:
            raise click.UsageError(
                "Missing option '--sparsity', for example --sparsity 0.4, or a budget, as --max-kl 0.2."
            )
    from nirvana_deploy.pipeline.job import job_of
    from nirvana_deploy.pipeline.recipe_file import read_recipe

    if recipe_file is None:
        return job_of(
            model or "", typed(options) if curves is None else curves.calibrated_alike(typed(options))
        )
    base = read_recipe(recipe_file)
    return job_of(model or base.model, typed(options), base=base)
