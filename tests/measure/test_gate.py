"""A required quality is held on every model that was cut, and on every kind of text."""

from __future__ import annotations

from typing import Any

import pytest

from nirvana_deploy.base.errors import QualityError
from nirvana_deploy.measure.gate import require_quality
from nirvana_deploy.measure.recipe import Evaluation, Gate

VARIANTS: dict[str, Any] = {
    "dense": {"perplexity": 10.0, "kl_vs_dense": 0.0, "parts": {"code": {"perplexity": 4.0}}},
    "dense-w4": {"perplexity": 30.0, "kl_vs_dense": 2.0},
    "pruned": {"perplexity": 11.0, "kl_vs_dense": 0.1, "parts": {"code": {"perplexity": 6.0}}},
    "pruned-w4": {"perplexity": 12.0, "kl_vs_dense": 0.25},
}


@pytest.mark.parametrize(
    ("limits", "missed"),
    [
        ({}, []),
        ({"require_kl": 0.25}, []),
        ({"require_kl": 0.2}, ["KL of pruned-w4 is 0.25, required at most 0.2"]),
        ({"require_perplexity_ratio": 1.5}, []),
        ({"require_perplexity_ratio": 1.3}, ["perplexity of pruned is 1.5 times dense's on code"]),
        (
            {"require_perplexity_ratio": 1.15, "require_kl": 0.01},
            ["KL of pruned is", "KL of pruned-w4", "on code", "perplexity of pruned-w4 is 1.2 times"],
        ),
    ],
)
def test_what_is_missed_is_named(limits: dict[str, float], missed: list[str]) -> None:
    if not missed:
        require_quality(VARIANTS, Evaluation(**limits))
        return
    with pytest.raises(QualityError) as refused:
        require_quality(VARIANTS, Gate(**limits))
    assert refused.value.exit_code == 3 and all(one in str(refused.value) for one in missed)
    assert str(refused.value).count("required at most") == len(missed) and "dense-w4" not in str(
        refused.value
    )


def test_what_was_not_measured_is_missed() -> None:
    with pytest.raises(QualityError, match="KL of pruned is not measured"):
        require_quality({"pruned": {"perplexity": 3.0}}, Gate(require_kl=1.0))
    with pytest.raises(QualityError, match="was not measured beside dense's"):
        require_quality({"pruned": {"perplexity": 3.0}}, Gate(require_perplexity_ratio=2.0))


@pytest.mark.parametrize("variants", [{}, {"dense": VARIANTS["dense"]}])
@pytest.mark.parametrize("limits", [{"require_kl": 1e9}, {"require_perplexity_ratio": 1e9}])
def test_where_no_cut_model_was_measured_all_is_missed(
    variants: dict[str, Any], limits: dict[str, float]
) -> None:
    """A folder without ONNX models is evaluated by its tasks alone."""
    require_quality(variants, Gate())
    with pytest.raises(QualityError, match=r"that of no cut model was measured\.\n.*nirvana-deploy evaluate"):
        require_quality(variants, Gate(**limits))
