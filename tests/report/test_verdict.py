"""The verdict follows from its rules, and says what kept a model from a better one."""

from __future__ import annotations

from typing import Any

import pytest

from nirvana_deploy.output.records import Records
from nirvana_deploy.report.pages.quality import repeats
from nirvana_deploy.report.verdict import Verdict, verdict

GOOD = {"ratio": 1.05, "kl": 0.05, "speedup": 2.0, "spread": (1.9, 2.1), "megabytes": 100}


def decided(*, passed: bool | None = True, texts: dict[str, Any] | None = None, **models: Any) -> Verdict:
    """Of models as GOOD says, but for what is given."""
    found = {name: GOOD | changes for name, changes in models.items()}
    variants = [
        {
            "name": "dense",
            "weights_bytes": 500e6,
            "quality": {"perplexity": 10.0, "kl_vs_dense": 0.0},
            "tpot_ms": {"p50": 20.0},
        }
    ]
    variants += [
        {
            "name": name,
            "weights_bytes": one["megabytes"] * 1e6,
            "tpot_ms": {"p50": 20.0 / one["speedup"]} if one["speedup"] else None,
            "quality": {"perplexity": 10 * one["ratio"], "kl_vs_dense": one["kl"]} if one["ratio"] else None,
        }
        for name, one in found.items()
    ]
    comparisons = [
        {
            "variant": name,
            "baseline": "dense",
            "tpot_speedup": one["speedup"],
            "tpot_speedup_interval": {
                "low": one["spread"][0],
                "high": one["spread"][1],
                "confidence": one.get("confidence", 0.98),
            },
        }
        for name, one in found.items()
        if one["speedup"]
    ]
    checks = {"passed": passed, "checks": []}
    stages: dict[str, Any] = {}
    if passed is not None:
        stages["verify"] = {"result": {"pruned": checks, "dense": {"passed": True, "checks": []}}}
    if texts is not None:
        stages["answers"] = {
            "result": {"new_tokens": 24, "prompts": ["a"], "variants": texts, "skipped": None}
        }
    benchmark = {"baseline": "dense", "variants": variants, "comparisons": comparisons}
    return verdict(Records({"stages": stages}, None, benchmark))


def test_a_good_model_ships_and_the_reason_has_its_numbers() -> None:
    found = decided(pruned={})
    assert (found.level, found.recommended, found.title) == ("ship", "pruned", "Ship pruned")
    for number in ("2.00", "100 MB instead of 500 MB", "1.05 times dense's perplexity", "KL 0.0500"):
        assert number in found.why


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({"ratio": 1.1}, "ship", "1.10 times"),
        ({"ratio": 1.2}, "care", "Care: 1.20 times dense's perplexity"),
        ({"ratio": 1.31}, "no", "1.31 times dense's perplexity"),
        ({"kl": 0.2}, "care", "KL to dense 0.200"),
        ({"kl": 0.4}, "no", "KL to dense 0.400"),
        ({"speedup": 1.02, "spread": (0.95, 1.1), "megabytes": 490}, "no", "neither faster nor smaller"),
        ({"confidence": 0.94, "megabytes": 490}, "no", "neither faster nor smaller"),  # of five rounds
        ({"confidence": 0.94}, "ship", "no difference in speed shown"),
        ({"speedup": 0.9, "spread": (0.8, 1.0)}, "ship", "100 MB"),  # smaller is worth it, too
        ({"speedup": 1.02, "spread": (0.95, 1.1)}, "ship", "no difference in speed shown (0.950"),
        ({"speedup": None}, "ship", "100 MB"),
    ],
)
def test_each_rule(changes: dict[str, Any], level: str, said: str) -> None:
    found = decided(pruned=changes)
    assert found.level == level and said in found.why
    assert (found.recommended is None) == (level == "no")
    assert ("nirvana-deploy recover" in found.why) == (level == "no")


def test_what_failed_does_not_ship_and_what_nobody_looked_at_ships_with_care() -> None:
    assert decided(pruned={}, passed=False).level == "no"
    unverified = decided(pruned={}, passed=None)
    assert unverified.level == "care" and "it was not verified" in unverified.why


def test_the_fastest_of_the_best_level_is_recommended() -> None:
    models: dict[str, Any] = {
        "pruned": {},
        "pruned-w4": {"speedup": 3.0},
        "pruned-w8": {"speedup": 4.0, "kl": 0.2},
    }
    assert decided(**models).recommended == "pruned-w4"
    alone = decided(**models, **{"dense-w4": {"speedup": 3.5}})
    assert alone.recommended == "dense-w4" and "Quantization alone is the better trade" in alone.why


def test_a_model_that_rambles_where_dense_does_not_needs_care() -> None:
    loop = "the fruit of the fruit of the fruit of the fruit of the fruit of the fruit"
    plain = "Paris, which lies on the Seine and is known for its towers, bridges and bread."
    assert repeats(loop) and not repeats(plain) and not repeats("")
    texts = {"dense": [plain, loop, plain], "pruned": [loop, loop, loop]}
    found = decided(pruned={}, texts=texts)
    assert found.level == "care" and "repeats itself on 2 more prompts" in found.why
    assert decided(pruned={}, texts={"dense": [loop] * 3, "pruned": [loop] * 3}).level == "ship"


def test_without_quality_or_models_there_is_none() -> None:
    found = decided(pruned={"ratio": None})
    assert (found.level, found.recommended) == (
        "open",
        None,
    ) and "pruned: quality was not measured" in found.why
    assert verdict(Records(None, None, None)).title == "No verdict"
