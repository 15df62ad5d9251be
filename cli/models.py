"""``nirvana-deploy models``: the short names that MODEL may be."""

from __future__ import annotations

import dataclasses

import click

from .common import echo_json, terminal


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")
def models(as_json: bool) -> None:
    """List the aliases of models, and the families that are handled.

    Of an alias: hub id, parameters, family, licence, and whether it works today. Of a family: what can be
    removed, who else runs what is made of it, and on which weights the whole way was tried: real ones,
    relabelled ones (a real Llama's under the name of the family), or random ones alone.

    Besides an alias, MODEL may be a hub id, a folder with safetensors, or a .gguf file.

    \b
    Example:
      nirvana-deploy models
      nirvana-deploy prune-export smollm2 --sparsity 0.4
    """
    from nirvana_deploy.model.families import FAMILIES
    from nirvana_deploy.model.sources import ALIASES

    families = [
        {
            "family": name,
            "architecture": family.architecture,
            "removes": list(family.units),
            "genai": family.genai_type is not None,
            "gguf": family.gguf.name if family.gguf else None,
            "tried_on": family.tried_on,
        }
        for name, family in FAMILIES.items()
    ]

    if as_json:
        rows = [
            {
                "alias": name,
                **dataclasses.asdict(alias),
                "supported": alias.supported,
                "exported": alias.supported,
            }
            for name, alias in ALIASES.items()
        ]
        echo_json({"models": rows, "families": families})
        return

    from rich import box
    from rich.table import Table

    console = terminal(width_of_a_pipe=160)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("alias", "hub id", "parameters", "family", "licence", "supported"):
        table.add_column(column, overflow="fold")
    for name, alias in ALIASES.items():
        supported = "[green]yes[/]" if alias.supported else "[yellow]not yet[/]"
        table.add_row(name, alias.hub_id, alias.parameters, alias.family, alias.licence, supported)
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("family", "architecture", "removes", "onnxruntime-genai", "llama.cpp", "tried on"):
        table.add_column(column, overflow="fold")
    for name, family in FAMILIES.items():
        table.add_row(
            name,
            family.architecture,
            ", ".join(family.units),
            "yes" if family.genai_type else "no",
            family.gguf.name if family.gguf else "no",
            f"{family.tried_on} weights",
        )
    console.print(table)
