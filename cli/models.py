"""``nirvana-deploy models``: the short names that MODEL may be."""

from __future__ import annotations

import dataclasses

import click

from .common import echo, echo_json, echo_table
from .options import json_option


@click.command("models")
@json_option
def models(as_json: bool) -> None:
    """List the aliases of models, and the families that are handled.

    Of an alias: hub id, size, licence. Of a family: what can be removed, whether onnxruntime-genai and
    llama.cpp run what is made of it, and on which weights the whole way was tried: real ones, relabelled ones
    (a real Llama's under the name of the family), or random ones alone. --json says more.

    Besides an alias, MODEL may be a hub id, a folder with safetensors, or a .gguf file.

    \b
    Examples:
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

    names = (
        [
            name,
            alias.hub_id,
            alias.parameters,
            alias.licence + ("" if alias.supported else ", not supported yet"),
        ]
        for name, alias in ALIASES.items()
    )
    echo_table(["alias", "hub id", "size", "licence"], names, texts=4)
    echo()
    handled = (
        [
            name,
            ", ".join(family.units),
            "yes" if family.genai_type else "no",
            family.gguf.name if family.gguf else "no",
            family.tried_on,
        ]
        for name, family in FAMILIES.items()
    )
    echo_table(["family", "removes", "genai", "llama.cpp", "weights tried"], handled, texts=5)
