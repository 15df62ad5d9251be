"""``nirvana-deploy report OUT``: write the report again from the records of an output folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .arguments import OUTPUT
from .common import echo
from .options import json_option


@click.command("report")
@click.argument("out", type=OUTPUT)
@json_option
def report(out: Path, as_json: bool) -> None:
    """Write report.md and report.html into OUT.

    Reads OUT's manifest.json, plan.json and benchmark.json. Nothing is measured again; a part that is
    missing is named in the report with the command that makes it.

    \b
    Example:
      nirvana-deploy report smollm2-s0.4
    """
    from nirvana_deploy.pipeline.folder import report_folder

    markdown, page = report_folder(out)
    if as_json:
        echo(json.dumps({"schema": 1, "markdown": str(markdown), "html": str(page)}))
    else:
        echo(f"{page}\n{markdown}")
