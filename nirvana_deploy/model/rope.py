"""Rotary frequencies of a checkpoint, as transformers computes them from its config."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nirvana_deploy.base.errors import NirvanaError

_FIXED = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the sequence length


def rotary_frequencies(config: PreTrainedConfig, *, head_dim: int) -> tuple[torch.Tensor, float]:
    """(inverse frequencies float32 [d/2], factor on cosine and sine) for a decoder's config.

    Raises NirvanaError for a rope type whose frequencies change with the sequence length: a static graph
    would silently compute something else.
    """
    parameters: dict[str, Any] = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in _FIXED:
        raise NirvanaError(
            f"Unsupported: rope_type {kind!r}; supported: {', '.join(_FIXED)}.",
        )
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    config = copy.copy(config)
    config.__dict__.pop("_heterogeneity_spec", None)  # the frequencies are the dense model's
    config.head_dim = head_dim
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.float(), float(scaling)
