"""What builds of engines promise, and what they could keep: arithmetic on costs of known law."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from builders.scripts import ROOT


@pytest.fixture
def promises(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import engine_promises

    return engine_promises


def build(variant: str, weights_bytes: float, *, cpu_factor: float = 1.0, form: str = "fp16-concat") -> Any:
    """5 s and 2 s a GB; 400 MB and twice the weights; 20 MB and the weights."""
    return {
        "variant": variant,
        "form": form,
        "weights_bytes": weights_bytes,
        "cpu_s": cpu_factor * (5 + 2e-9 * weights_bytes),
        "peak_own_bytes": 4e8 + 2 * weights_bytes,
        "peak_rss_bytes": 4e8 + 3 * weights_bytes,
        "engine_bytes": 2e7 + weights_bytes,
    }


def test_the_bound_is_the_cost_of_the_pruned_weights_alone(promises: ModuleType) -> None:
    builds = [
        build("dense", 5e8),
        build("pruned", 3.5e8, cpu_factor=1.4),
        build("twin-64", 1e7),
        build("twin-288", 9e7),
    ]
    (one,) = promises.comparisons(builds)
    assert one["bound"] == pytest.approx({"cpu": 5.7 / 6, "memory": 11 / 14, "engine": 37 / 52})
    assert one["cpu_ratio"] == pytest.approx(1.4 * one["bound"]["cpu"])
    assert one["line_error"] == pytest.approx(dict.fromkeys(one["bound"], 0), abs=1e-9)
    assert one["can_be_kept"] == one["kept"] == {"cpu": False, "memory": True, "engine": True}
    assert one["size_deviation"] == pytest.approx(37 / 52 / 0.7 - 1)
    for name, needed in one["weights_needed_bytes"].items():
        line = promises.line_through([builds[0], *builds[2:]], promises.COSTS[name])
        share = promises.COST_PROMISE if name != "engine" else 0.7 * (1 + promises.SIZE_PROMISE)
        assert line.ratio(0.7 * needed, needed) == pytest.approx(share)


def test_a_promise_below_the_share_of_weights_is_never_kept(promises: ModuleType) -> None:
    line = promises.Line(fixed=5.0, slope=2e-9, error=0.0)
    assert line.weights_for(0.8, 0.8) is None and line.weights_for(0.8, 0.75) is not None
    assert promises.Line(fixed=5.0, slope=-1.0, error=0.0).weights_for(0.8, 0.5) is None


def test_only_whole_builds_of_one_form_are_compared(promises: ModuleType) -> None:
    builds = [
        build("dense", 2e8),
        {"variant": "pruned", "form": "fp16-concat", "stopped": "too large"},
        build("uniform", 1e8),
        build("pruned", 1e8, form="w4-concat"),
    ]
    assert [(one["variant"], one["form"], "bound" in one) for one in promises.comparisons(builds)] == [
        ("uniform", "fp16-concat", False)
    ]
    assert "(at best" not in promises.comparison_line(promises.comparisons(builds)[0])


def test_noise_shows_as_distance_from_the_line(promises: ModuleType) -> None:
    builds = [build("dense", 2e8), build("twin-64", 1e7, cpu_factor=1.1), build("twin-288", 1e8)]
    line = promises.line_through(builds, "cpu_s")
    assert 0.01 < line.error < 0.1
