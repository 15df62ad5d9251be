"""``nirvana-deploy inspect DIR|plan.json|x.engine``: what was kept, where, and what the folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .arguments import DESCRIBED
from .common import echo, echo_json, echo_table
from .engine_page import engine_lines
from .options import json_option

if TYPE_CHECKING:
    from nirvana_deploy.output.inspection import Inspection


@click.command("inspect")
@click.argument("path", type=DESCRIBED)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what was kept and where.

    PATH is an output folder, a plan.json, or an engine. Per layer: the KV groups and FFN neurons kept. For a
    folder also its sizes, the time of each stage, and whether the exports were verified. For an engine what
    its JSON says, once its bytes are proved to be those described.

    \b
    Examples:
      nirvana-deploy inspect smollm2-s0.4
      nirvana-deploy inspect smollm2-s0.4/plan.json --json | jq .plan.budget
      nirvana-deploy inspect smollm2-s0.4/engine/pruned.engine
    """
    from nirvana_deploy.runtime.tensorrt.record import ENGINE_SUFFIX, read_engine_record

    if path.suffix == ENGINE_SUFFIX:
        record = read_engine_record(path)
        if as_json:
            echo(json.dumps(record.to_json(), indent=1))
        else:
            echo("\n".join(engine_lines(path, record)))
        return
    from nirvana_deploy.output.inspection import inspect_path

    inspection = inspect_path(path)
    if as_json:
        echo_json(inspection.as_json())
        return
    _print_plan(inspection)
    _print_folder(inspection)


def _print_plan(inspection: Inspection) -> None:
    from nirvana_deploy.base.units import format_count, format_share
    from nirvana_deploy.report.table import ABSENT, text_bar

    budget = inspection.plan.get("budget")
    if budget:
        removed, asked = budget["met_removed_share"], budget["asked_removed_share"]
        dense, kept = budget["parameters_dense"], budget["parameters_kept"]
        echo(
            f"{inspection.model or inspection.path}: {format_share(removed)} of the linear weights removed "
            f"(asked {format_share(asked)}), {format_count(dense)} parameters to {format_count(kept)}"
        )
        settings = ("saliency", "gamma", "allocation", "round_to", "seed")
        echo(", ".join(f"{s} {inspection.plan[s]}" for s in settings if inspection.plan.get(s) is not None))
    if not inspection.layers:
        return
    rows = [
        [
            layer.label,
            f"{len(layer.kept_groups)} of {layer.of_groups}",
            text_bar(len(layer.kept_groups), layer.of_groups, width=min(8, layer.of_groups)),
            # a cross-attention has no FFN
            f"{layer.kept_neurons:,} of {layer.of_neurons:,}" if layer.of_neurons else ABSENT,
            text_bar(layer.kept_neurons, layer.of_neurons, width=24) if layer.of_neurons else "",
        ]
        for layer in inspection.layers
    ]
    echo_table(["layer", "KV groups", "", "FFN neurons", ""], rows)


def _print_folder(inspection: Inspection) -> None:
    from nirvana_deploy.base.units import format_bytes, format_number, format_seconds
    from nirvana_deploy.report.table import ABSENT

    if inspection.folder_bytes:
        echo()
        sizes = [[name, format_bytes(size_bytes)] for name, size_bytes in inspection.folder_bytes.items()]
        echo_table(["folder", "size"], sizes)
    if inspection.stages:
        rows = []
        for name, stage in inspection.stages.items():
            seconds, peak = stage["seconds"], stage["peak_rss_bytes"]
            time = ABSENT if seconds is None else format_seconds(seconds)
            rows.append([name, time, ABSENT if peak is None else format_bytes(peak)])
        echo()
        echo_table(["stage", "time", "peak memory"], rows)
    for found in inspection.verification:
        difference = (
            "" if found.max_abs_diff is None else f", up to {format_number(found.max_abs_diff, digits=2)}"
        )
        verdict = "passed" if found.passed else "FAILED"
        echo(f"verification of {found.model}: {verdict}, {found.num_checks} checks{difference}")
    if inspection.missing_files:
        echo(f"missing, though the manifest lists them: {', '.join(inspection.missing_files)}")
