"""``nirvana-deploy report OUT``: write the report again, compare folders, or find what got worse."""

from __future__ import annotations

import json
from pathlib import Path

import click

from nirvana_deploy.measure.recipe import Tolerance

from .arguments import MEASURED
from .common import echo, echo_json, echo_table, warn
from .options import json_option, recipe_options

_PAGES = (".html", ".md")


@click.command("report")
@click.argument(
    "outs",
    metavar="OUT...",
    nargs=-1,
    required=True,
    type=MEASURED,
)
@click.option("--compare", is_flag=True, help="Set several finished folders side by side.")
@click.option(
    "--against",
    metavar="PATH",
    type=MEASURED,
    help="Compare with an earlier output folder or benchmark.json: exit code 4 if something got worse.",
)
@recipe_options(Tolerance)
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --compare: write the page into FILE, which ends in .html or .md.",
)
@click.option("--force", is_flag=True, help="Replace FILE.")
@json_option
def report(
    outs: tuple[Path, ...],
    compare: bool,
    against: Path | None,
    tolerance: float,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write report.md and report.html into OUT, and a model card into each of its model folders.

    Reads OUT's manifest.json, plan.json and benchmark.json. Nothing is measured again; a part that is
    missing is named in the report with the command that makes it.

    With --compare, finished folders of one model or of several stand side by side: a row for each model,
    what differs in their recipes, what they write, and the one to take. What does not compare is said.

    With --against, nothing is written: OUT's benchmark (or one that 'benchmark --out' wrote) is compared with
    an earlier one of the same model. Exit code 4 when a time, a perplexity, a KL or a size got worse beyond
    noise and by more than --tolerance.

    \b
    Examples:
      nirvana-deploy report smollm2-s0.4
      nirvana-deploy report --compare smollm2-s0.2 smollm2-s0.4 --out compared.html
      nirvana-deploy report smollm2-s0.4 --against last-week/benchmark.json
    """
    if against is not None:
        if compare or len(outs) > 1:
            raise click.UsageError("--against compares one OUT with an earlier one; leave --compare out.")
        _against(outs[0], against, tolerance, as_json=as_json)
        return
    if compare:
        _compare(outs, out, force=force, as_json=as_json)
        return
    if out is not None or force:
        raise click.UsageError("--out and --force go with --compare: a report lies in its folder.")
    if len(outs) > 1:
        raise click.UsageError("Several folders: add --compare to set them side by side.")
    from nirvana_deploy.pipeline.folder import report_folder

    markdown, page = report_folder(outs[0])
    if as_json:
        echo(json.dumps({"schema": 1, "markdown": str(markdown), "html": str(page)}))
    else:
        echo(f"{page}\n{markdown}")


def _against(out: Path, earlier: Path, tolerance: float, *, as_json: bool) -> None:
    from nirvana_deploy.pipeline.against import compare_with_earlier

    found = compare_with_earlier(out, earlier, tolerance=tolerance)
    if as_json:
        echo_json(found.as_json())
    else:
        warn(found.cautions)
        table = found.table()
        echo_table(table.headers, table.rows, texts=2)
    found.require_none_worse()


def _compare(outs: tuple[Path, ...], out: Path | None, *, force: bool, as_json: bool) -> None:
    if out is not None and out.suffix not in _PAGES:
        raise click.BadParameter(f"{out} ends in neither .html nor .md.", param_hint="--out")
    from nirvana_deploy.pipeline.compare import compare_folders, write_comparison
    from nirvana_deploy.report.compare.page import BRIEF, brief_rows

    found = compare_folders(outs)
    if out is not None:
        write_comparison(found, out, reads=outs, force=force)
    if as_json:
        echo_json(found.as_json())
        return
    warn(found.alike.cautions)
    echo_table(BRIEF, brief_rows(found))
    if found.recipe.rows:
        echo_table(found.recipe.headers, found.recipe.rows, title="What differs in their recipes")
    if out is not None:
        echo(f"Page: {out}")
    echo(f"{found.title}. {found.why}")
