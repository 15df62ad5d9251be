"""Rotary frequencies of a checkpoint, as transformers computes them from its config."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nirvana_deploy.base.errors import NirvanaError

_FIXED = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the sequence length
_LONG = "longrope"


def context_tokens(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model of ``config`` can place; None where it has no end.

    Of LongRoPE (Ding et al., arXiv 2402.13753) it is the length that the model was first trained for: beyond
    it all angles are others, transformers reads all tokens anew, and the keys in a cache would go stale.
    """
    longest: int | None = getattr(config, "max_position_embeddings", None)
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != _LONG or _same_at_every_length(parameters):
        return longest
    trained = parameters.get("original_max_position_embeddings")
    return longest if trained is None else min(trained, longest or trained)


def limited(config: dict[str, Any], tokens: int | None) -> dict[str, Any]:
    """A config.json that asks for at most ``tokens``, for programs that know no other limit."""
    if tokens is None or config.get("max_position_embeddings") in (None, tokens):
        return config
    return config | {"max_position_embeddings": tokens}


def _same_at_every_length(parameters: dict[str, Any]) -> bool:
    return bool(parameters.get("short_factor", ()) == parameters.get("long_factor"))


def rotary_frequencies(
    config: PreTrainedConfig, *, head_dim: int, kind: str = "", share: float = 1.0
) -> tuple[torch.Tensor, float]:
    """(inverse frequencies float32 [d share/2], factor on cosine and sine) for a decoder's config.

    Those of LongRoPE are its short ones (:func:`context_tokens`). ``kind`` is the key of one of several
    rotary embeddings, ``share`` how much of a head is turned. Raises NirvanaError for a rope type whose
    frequencies change with the sequence length, where a static graph would silently compute something else,
    for parameters that it lacks, and for heads of which another share is turned.
    """
    turned = int(head_dim * share)
    if turned % 2:
        raise NirvanaError(
            f"Unsupported: head_dim {head_dim}, {turned} elements turned; a rotary embedding turns pairs."
        )
    parameters: dict[str, Any] = (config.rope_parameters[kind] if kind else config.rope_parameters) or {}
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in (*_FIXED, _LONG):
        raise NirvanaError(f"Unsupported: rope_type {rope_type!r}; supported: {', '.join((*_FIXED, _LONG))}.")
    if rope_type == "default":
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
