"""Options that contradict each other are refused before any work, in sentences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.plans import shape_of

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.prune.choosing.choices import Choices, choices_of
from nirvana_deploy.prune.plan import default_gamma
from nirvana_deploy.prune.recipe import Pruning


def choices(model: Path, calibration: dict[str, Any] | None = None, **pruning: Any) -> Choices:
    recipe = Pruning(**{"sparsity": 0.3, "round_to": 4, **pruning})
    return choices_of(Calibration(**(calibration or {})), recipe, shape_of(model))


@pytest.mark.parametrize(
    ("options", "sentence", "hint"),
    [
        ({"reconstruct": False}, "'refit' chooses units inside the refit", "--saliency taylor"),
        (
            {"saliency": "refit,taylor", "reconstruct": False},
            "'refit' chooses units inside the refit",
            "--saliency taylor",
        ),
        ({"allocation": "global"}, "'global' ranks units over all layers", "--preset paper"),
        ({"gamma": 2.0}, "gamma 2.0 divides the budget", "Leave --gamma out"),
        ({"gamma": "auto", "saliency": "nirvana"}, "gamma auto divides the budget", "Leave --gamma out"),
        (
            {"gamma": 2.0, "allocation": "uniform"},
            "gamma 2.0 divides the budget",
            "Leave --gamma out",
        ),
        (
            {"cost": "ms", "saliency": "nirvana", "allocation": "global"},
            "cost 'ms' is minded by curves alone, not by allocation 'global'",
            "--allocation curves",
        ),
        (
            {"cost": "bytes", "saliency": "refit,nirvana", "allocation": "uniform"},
            "cost 'bytes' is minded by curves alone",
            "--allocation curves",
        ),
        (
            {"min_groups": 2, "saliency": "nirvana", "allocation": "global"},
            "min-groups 2 is minded by curves alone, not by allocation 'global'",
            "leave --min-groups out",
        ),
        (
            {"min_neurons": 64, "saliency": "taylor", "allocation": "uniform"},
            "min-neurons 64 is minded by curves alone",
            "leave --min-neurons out",
        ),
    ],
)
def test_contradictions_are_sentences(
    tiny_llama: Path, options: dict[str, Any], sentence: str, hint: str
) -> None:
    with pytest.raises(NirvanaError) as refused:
        choices(tiny_llama, **options)
    assert sentence in refused.value.message and hint in (refused.value.hint or "")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allocation": "uniform"},
        {"allocation": "uniform", "cost": "ms"},
        {"cost": "bytes"},
        {"saliency": "taylor", "reconstruct": False},
        {"saliency": "nirvana", "cost": "ms"},
    ],
)
def test_curves_leave_no_gamma_to_choose(tiny_llama: Path, options: dict[str, Any]) -> None:
    found = choices(tiny_llama, {"calib": "pydoc"}, **options)
    assert found.gammas == (None,) and found.single


def test_without_curves_gamma_is_chosen_or_given(tiny_llama: Path) -> None:
    plain: dict[str, Any] = {"saliency": "nirvana", "allocation": "global"}
    assert choices(tiny_llama, **plain).gammas == (default_gamma(shape_of(tiny_llama)),)
    assert choices(tiny_llama, **plain, gamma=2.0).gammas == (2.0,)
    several = choices(tiny_llama, **plain, gamma="auto")
    assert len(several.gammas) > 1 and not several.single
    mixed = choices(tiny_llama, saliency="refit,taylor", allocation="uniform", gamma=2.0)
    assert mixed.gammas == (2.0,) and mixed.saliencies == ("refit", "taylor")


def test_gamma_has_no_say_where_no_kv_group_can_go(tiny_llama: Path) -> None:
    shape = shape_of(tiny_llama)
    one = replace(shape, layers=tuple(replace(layer, kv_heads=1) for layer in shape.layers))
    plain = Pruning(sparsity=0.2, saliency="wanda-sp", allocation="uniform", reconstruct=False)
    assert choices_of(Calibration(), plain, one).single
    with pytest.raises(NirvanaError, match=r"gamma 2\.0 .* one KV head, which must stay\.\nLeave --gamma"):
        choices_of(Calibration(), replace(plain, gamma=2.0), one)
    with pytest.raises(
        NirvanaError, match=r"\(the largest feasible\), got 0\.9.*\nPass --sparsity \S+ or less\.$"
    ):
        choices_of(Calibration(), replace(plain, sparsity=0.9), one)


def test_auto_tries_saliencies_and_sources(tiny_llama: Path) -> None:
    found = choices(tiny_llama, {"calib": "auto"}, saliency="auto")
    assert found.saliencies == ("nirvana", "taylor") and found.candidates == 4
    assert found.corpora == ("pydoc", "self")


def test_an_unknown_saliency_names_those_there_are(tiny_llama: Path) -> None:
    with pytest.raises(NirvanaError, match="'taylr'"):
        choices(tiny_llama, saliency="taylr")
