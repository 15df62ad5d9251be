"""Presets: what ``--preset`` sets, beside the options that are typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.base.registry import look_up
from nirvana_deploy.calibrate.mixture import MIX_AT_HAND

PRESETS: dict[str, dict[str, Any]] = {
    "best": {},
    "paper": {
        "saliency": "nirvana",
        "allocation": "global",
        "round_to": 8,
        "reconstruct": False,
        "ridge": 1.0,
        "calib": "pydoc",
        "num_sequences": 32,
        "seq_len": 128,
    },
    "fast": {
        "saliency": "wanda-sp",
        "allocation": "uniform",
        "reconstruct": True,
        "ridge": 1.0,
        "calib": MIX_AT_HAND,
        "num_sequences": 64,
        "seq_len": 128,
        "heldout_sequences": 8,
        "new_tokens": 32,
    },
}
"""Options by preset; what one leaves out is the default of its recipe."""


RECOVERIES: dict[str, dict[str, Any]] = {
    "paper": {
        "recover_method": "lora",
        "lora_rank": 8,
        "kl_weight": 0.0,
        "next_token_weight": 1.0,
        "learning_rate": 1e-4,
        "recover_batch": 16,
        "recover_schedule": "linear",
        "recover_warm_up": 50,
    },
}
"""Options by preset of ``recover``: a model is trained one way, however it was cut."""


def with_preset(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with those of the preset that they name, if any; ``defaults`` are the recipes'."""
    preset = options.get("preset")
    if preset not in PRESETS:  # none, or a name that its recipe refuses
        return dict(options)
    touched = {name for one in PRESETS.values() for name in one}
    return {**{name: defaults[name] for name in touched}, **PRESETS[preset], **options}


def with_recovery(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` for a model that is cut, with what the preset that they name says of recovery, if any.

    Raises NirvanaError for a preset that says nothing of it.
    """
    own = dict(options)
    preset = own.pop("preset", None)
    return own if preset is None else {**look_up(preset, RECOVERIES, what="preset of recovery"), **own}
