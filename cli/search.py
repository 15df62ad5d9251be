"""``nirvana-deploy search MODEL``: the best model under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.export.recipe import Export
from nirvana_deploy.measure.recipe import Measurement
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.search.recipe import Search, Target

from .common import TerminalProgress, echo, echo_json, echo_table
from .forecast_page import show_search
from .job import dry_run_option, model_argument, recipe_option
from .options import ShownOption, json_option, recipe_options, taken, typed
from .talk import command_line


@click.command("search")
@model_argument
@recipe_option
@recipe_options(Search, Target)
@recipe_options(Pruning, Calibration, Export, Measurement, without=("sparsity",))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder of the search.",
    cls=ShownOption,
    show_default="./<model>-search",
)
@click.option("--resume", is_flag=True, help="Go on with the points that --out lacks.")
@click.option("--force", is_flag=True, help="Overwrite an earlier search in --out.")
@dry_run_option
@json_option
def search(
    model: str | None,
    recipe_file: Path | None,
    out: Path | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Try sparsities and precisions on MODEL, and say which to deploy under a budget.

    The dense model in each precision is a point like any other. Calibration, curves and the dense model are
    made once; each cut is an output folder in --out.

    \b
    Examples:
      nirvana-deploy search smollm2 --max-kl 0.2
      nirvana-deploy search smollm2 --sparsity 0,0.1,0.2 --precision none,w4 --max-weights-bytes 300MB
      nirvana-deploy search smollm2 --sparsity 0,0.2 --try recover=20m --try "saliency=flap cost=bytes"
    """
    from nirvana_deploy.pipeline.forecast.search import forecast_search
    from nirvana_deploy.pipeline.recipe_file import read_recipe
    from nirvana_deploy.pipeline.searching.search import search_points
    from nirvana_deploy.report.pages.front import BRIEF, BRIEF_NAMES, columns, rows

    recipe, target = taken(Search, options), taken(Target, options)
    base = None if recipe_file is None else read_recipe(recipe_file)
    model = model or (base.model if base else None)
    if model is None:
        raise click.UsageError("Missing argument 'MODEL', or --recipe FILE.")
    how: dict[str, Any] = {"base": base, "out": out, "recipe": recipe, "resume": resume, "force": force}
    how |= {"progress": TerminalProgress(), **typed(options)}
    if dry_run:
        show_search(forecast_search(model, **how), as_json=as_json)
        return
    found = search_points(model, target=target, command=command_line(), **how)
    record = found.record
    if as_json:
        typed_here = {"next": found.commands, "next_typed_in": "the folder where this was typed"}
        echo_json({"out": str(found.out), **record, **typed_here})
        return
    title = f"{model}: {len(found.points)} points"
    headers = [BRIEF_NAMES.get(header, header) for header in columns(record, BRIEF)]
    echo_table(headers, rows(record, BRIEF), title=title, beside=True)
    if found.page is None:
        echo(f"Part {recipe.shard} is in {found.out}: copy the parts together, and repeat without --shard.")
        return
    echo(record["verdict"])
    for command in found.commands:
        echo(f"  {command}")
    echo(f"Page: {found.page}")
