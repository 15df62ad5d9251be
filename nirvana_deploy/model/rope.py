"""Rotary frequencies of a checkpoint, as transformers computes them from its config."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.config import LONGROPE, same_at_every_length

_FIXED = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the sequence length


def rotary_frequencies(
    config: PreTrainedConfig, *, head_dim: int, kind: str = "", share: float = 1.0
) -> tuple[torch.Tensor, float]:
    """(inverse frequencies float32 [d share/2], factor on cosine and sine) for a decoder's config.

    Those of LongRoPE are its short ones (``context_tokens`` of ``config.py``). ``kind`` is the key of one of
    several rotary embeddings, ``share`` how much of a head is turned. Raises NirvanaError for a rope type
    whose frequencies change with the sequence length, where a static graph would silently compute something
    else, for parameters that it lacks, and for heads of which another share is turned.
    """
    turned = int(head_dim * share)
    if turned % 2:
        raise NirvanaError(
            f"Unsupported: head_dim {head_dim}, {turned} elements turned; a rotary embedding turns pairs."
        )
    parameters: dict[str, Any] = (config.rope_parameters[kind] if kind else config.rope_parameters) or {}
    rope_type = parameters.get("rope_type", "default")
    # one of several LongRoPEs would need a context of its own
    if rope_type not in _FIXED and not (
        rope_type == LONGROPE and (not kind or same_at_every_length(parameters))
    ):
        known = ", ".join((*_FIXED, *(() if kind else (LONGROPE,))))
        raise NirvanaError(f"Unsupported: rope_type {rope_type!r}; supported: {known}.")
    if rope_type == "default":
        if not isinstance(theta := parameters.get("rope_theta"), int | float) or not theta > 0:
            raise NirvanaError(f"config.json: rope_theta must be a positive number, got {theta!r}.")
        exponents = torch.arange(0, turned, 2, dtype=torch.float32) / turned
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    frequencies, scaling = _by_transformers(config, parameters, head_dim)
    if len(frequencies) != turned // 2:
        raise NirvanaError(
            f"Unsupported: rope_parameters {parameters} turn {2 * len(frequencies)} of {head_dim} elements."
        )
    return frequencies, scaling


def _by_transformers(
    config: PreTrainedConfig, parameters: dict[str, Any], head_dim: int
) -> tuple[torch.Tensor, float]:
    rope_type = parameters["rope_type"]
    config = copy.copy(config)
    config.__dict__.pop("_heterogeneity_spec", None)  # the frequencies are the dense model's
    config.rope_parameters = parameters
    config.head_dim = head_dim
    try:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise NirvanaError(
            f"config.json: rope_parameters {parameters} are no {rope_type} rotary embedding: "
            f"{type(error).__name__}: {error}."
        ) from error
    if not torch.isfinite(frequencies).all():
        raise NirvanaError(
            f"config.json: rope_parameters {parameters} are no {rope_type} rotary embedding: "
            "its angles are not finite."
        )
    return frequencies.float(), float(scaling)
