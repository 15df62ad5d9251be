"""The families that this project handles: one file each, one line in the table.

What is not in the table is refused by name before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.families.llama import LLAMA
from nirvana_deploy.model.families.mistral import MISTRAL
from nirvana_deploy.model.families.qwen2 import QWEN2
from nirvana_deploy.model.families.qwen3 import QWEN3
from nirvana_deploy.model.families.t5 import GATED_T5, T5
from nirvana_deploy.model.family import Family
from nirvana_deploy.model.shape import ModelShape

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, T5)}
LAYOUTS: tuple[Family, ...] = (*FAMILIES.values(), GATED_T5)
"""Every way to name tensors: the families and their variants."""

_REFUSED = {
    "quantization_config": "weights that are already quantized",
    "num_local_experts": "mixture of experts",
    "attention_chunk_size": "chunked attention",
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed ``config.json``.

    Raises NirvanaError for an architecture, or for a feature of one, that this project does not handle.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        supported = ", ".join(f"{f.architecture} ({f.name})" for f in FAMILIES.values())
        raise NirvanaError(
            f"Unsupported architecture: model_type {model_type!r}, "
            f"architectures {config.get('architectures')}. "
            f"Supported: {supported}."
        )
    family = FAMILIES[model_type].resolve(config)
    for key, feature in _REFUSED.items():
        if config.get(key):
            raise NirvanaError(f"Unsupported: config.json asks for {feature} ({key} = {config[key]!r}).")
    return family


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the shape from a parsed ``config.json``, dense or of a pruned model.

    Raises NirvanaError for an unsupported architecture or a field that is missing or inconsistent.
    """
    family = family_of(config)
    return family.read_shape(config, family)
