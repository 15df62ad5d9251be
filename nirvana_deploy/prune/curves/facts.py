"""Whose curves they are: of which model, measured on which windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.weights import WeightSource
from nirvana_deploy.prune.curves.curve import AGAIN, Curves

_WEIGHTS = "weights_sample_sha256"
"""Files of earlier versions lack it, and are read all the same: nothing else in them contradicts."""
_WINDOWS = "windows_sha256"
_SAMPLED_ROWS = 16
"""Of each tensor: a fine-tune changes every row of what it trains. Hashing 8B whole takes a minute."""


def model_facts(checkpoint: Checkpoint) -> dict[str, str]:
    """What makes curves those of one model: its dimensions, and a sample of its weights."""
    shape = checkpoint.shape
    layers = [[layer.site, layer.query_heads, layer.kv_heads, layer.ffn_width] for layer in shape.layers]
    return {
        "family": shape.family.name,
        "layers": json.dumps(layers, separators=(",", ":")),
        "hidden_size": str(shape.hidden_size),
        _WEIGHTS: _sampled(checkpoint.weights),
    }


def facts_of(checkpoint: Checkpoint, windows: NDArray[np.int64]) -> dict[str, str]:
    """What makes curves those of one model and of calibration ``windows`` [N, T]."""
    digest = hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest()
    return {**model_facts(checkpoint), _WINDOWS: digest}


def require_curves_of(
    curves: Curves, facts: Mapping[str, str], path: Path, *, hint: str | None = AGAIN
) -> None:
    """Raise NirvanaError for curves of another model, or measured on other windows."""
    for key, wanted in facts.items():
        found = curves.facts.get(key)
        if found == wanted or (found is None and key == _WEIGHTS):
            continue
        what = {
            _WINDOWS: "other calibration windows",
            _WEIGHTS: "a model of the same shape and other weights",
        }.get(key, "another model")
        raise NirvanaError(
            f"{path} was measured on {what}: {key} is {found!r:.60} there and {wanted!r:.60} here.", hint=hint
        )


def _sampled(weights: WeightSource) -> str:
    """sha256 of names, dtypes, shapes and some rows of all tensors; the same however they lie in files."""
    digest = hashlib.sha256()
    for name in weights.names():
        shape = weights.shape(name)
        digest.update(f"{name} {weights.dtype(name)} {shape}\n".encode())
        rows = torch.linspace(0, shape[0] - 1, min(shape[0], _SAMPLED_ROWS)).round().long()
        digest.update(weights.rows(name, rows).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
