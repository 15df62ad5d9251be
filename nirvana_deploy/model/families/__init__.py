"""The families that this project handles: one file each, one line in the table.

What is not in the table is refused by name before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.config import completed, require_computed_here
from nirvana_deploy.model.families.gemma3 import GEMMA3
from nirvana_deploy.model.families.granite import GRANITE
from nirvana_deploy.model.families.llama import LLAMA
from nirvana_deploy.model.families.mistral import MISTRAL
from nirvana_deploy.model.families.olmo2 import OLMO2
from nirvana_deploy.model.families.phi3 import PHI3
from nirvana_deploy.model.families.qwen2 import QWEN2
from nirvana_deploy.model.families.qwen3 import QWEN3
from nirvana_deploy.model.families.refused import refusal
from nirvana_deploy.model.families.smollm3 import SMOLLM3
from nirvana_deploy.model.families.t5 import GATED_T5, T5
from nirvana_deploy.model.family import Family
from nirvana_deploy.model.shape import ModelShape

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, OLMO2, SMOLLM3, GRANITE, PHI3, T5)
}
LAYOUTS: tuple[Family, ...] = (*FAMILIES.values(), GATED_T5)
"""Every way to name tensors: the families and their variants."""

_REFUSED = {
    "num_local_experts": "mixture of experts",
    "attention_chunk_size": "chunked attention",
}


def known_families() -> dict[str, Family]:
    """The families that are handled, by their ``model_type`` in config.json: what each says of a model."""
    return dict(FAMILIES)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed ``config.json``.

    Raises NirvanaError for an architecture, or for a feature of one, that this project does not handle.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise refusal(config, {name: family.architecture for name, family in FAMILIES.items()})
    require_computed_here(config, FAMILIES[model_type])
    for key, feature in _REFUSED.items():
        if config.get(key):
            raise NirvanaError(f"Unsupported: config.json asks for {feature} ({key} = {config[key]!r}).")
    return FAMILIES[model_type].resolve(config)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the shape from a parsed ``config.json``, dense or of a pruned model.

    Keys that are left out count as transformers' config class says. Raises NirvanaError for an unsupported
    architecture and for a value that is of another type, or inconsistent.
    """
    full = completed(config, family_of(config))
    family = FAMILIES[config["model_type"]].resolve(full)
    return family.read_shape(full, family)
