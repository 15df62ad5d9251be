"""Definitions of the numbers, by hand."""

from __future__ import annotations

import pytest

from nirvana_deploy.export.footprint import Footprint
from nirvana_deploy.measure.bounds import Work
from nirvana_deploy.measure.worker import RoundSample
from nirvana_deploy.measure.workloads.measured import (
    comparisons_of,
    comparisons_of_rounds,
    kv_cache_bytes,
    points_of,
    times_of,
    times_of_rounds,
)
from nirvana_deploy.measure.workloads.named import Request
from nirvana_deploy.measure.workloads.server import ServedSample
from nirvana_deploy.measure.workloads.turns import Answered, AnsweredRound


def answered(
    *, prompt: int = 8, ttft: float = 100, gaps: tuple[float, ...] = (10, 30), joules: float | None = None
) -> Answered:
    request = Request(2, prompt, len(gaps) + 1, seed=0, index=0)
    return Answered(request, RoundSample(ttft - 1, ttft, gaps), joules)


def test_latencies_and_rates_by_hand() -> None:
    """Two batches of two sequences: 140 ms for 3 tokens each, then 360 ms for 2 each."""
    found = times_of([answered(), answered(prompt=4, ttft=300, gaps=(60,))])
    assert found["ttft_ms"]["p50"] == 200 and found["ttft_ms"]["p99"] == pytest.approx(298)
    assert found["e2e_ms"]["min"] == 140 and found["e2e_ms"]["max"] == 360
    assert found["tpot_ms"]["p50"] == 40  # of (140 - 100) / 2 and (360 - 300) / 1
    assert found["itl_ms"]["p50"] == 30  # of 10, 30 and 60: tokens count alike
    assert found["seconds"] == 0.5
    assert found["requests_per_s"] == 4 / 0.5
    assert found["output_tokens_per_s"] == (2 * 3 + 2 * 2) / 0.5
    assert found["total_tokens_per_s"] == (2 * (8 + 3) + 2 * (4 + 2)) / 0.5
    assert found["energy_joules"] is found["energy_joules_per_output_token"] is None
    assert [one["itl_ms"] for one in found["batches"]] == [[10, 30], [60]]


def round_of(*ttft: float, seconds: float, joules: float | None = None) -> AnsweredRound:
    """A round of requests of four tokens, 10 ms apart."""
    request = Request(1, 8, 4, seed=0, index=0)
    answers = tuple(Answered(request, ServedSample(one, (10, 10, 10)), None) for one in ttft)
    return AnsweredRound(answers, seconds, joules)


def test_requests_that_are_open_together_share_the_seconds_of_their_round() -> None:
    found = times_of_rounds([round_of(50, 70, seconds=0.25, joules=3), round_of(90, seconds=0.15, joules=1)])
    assert found["ttft_ms"]["p50"] == 70 and found["tpot_ms"]["max"] == 10 and found["e2e_ms"]["max"] == 120
    assert found["seconds"] == 0.4 and found["round_seconds"] == [0.25, 0.15]
    assert found["requests_per_s"] == 3 / 0.4 and found["output_tokens_per_s"] == 3 * 4 / 0.4
    assert found["energy_joules_per_output_token"] == 4 / 12
    assert [one["round"] for one in found["batches"]] == [0, 0, 1]


def test_ratios_of_servers_are_of_rounds() -> None:
    """Twice as fast to the first token in each round's mean, at one and a half the rate."""
    dense = [round_of(100, 300, seconds=0.6 * k) for k in range(1, 7)]
    pruned = [round_of(150, 50, seconds=0.4 * k) for k in range(1, 7)]
    (found,) = comparisons_of_rounds({"dense": dense, "pruned": pruned}, "dense")
    assert (found["variant"], found["baseline"]) == ("pruned", "dense")
    for metric, times in (("ttft", 2), ("tpot", 1), ("e2e", 230 / 130), ("rate", 1.5)):
        ratio = found[f"{metric}_speedup"]
        assert (ratio["p50"], ratio["low"]) == (pytest.approx(times), pytest.approx(times))
        assert ratio["confidence"] > 0.95


def test_energy_is_a_sum_or_nothing() -> None:
    known = times_of([answered(joules=4.0), answered(joules=2.0)])
    assert (known["energy_joules"], known["energy_joules_per_output_token"]) == (6.0, 0.5)
    assert times_of([answered(joules=4.0), answered()])["energy_joules"] is None


def test_ratios_are_of_the_same_request() -> None:
    """Twice as fast on each of eight requests of different lengths."""
    dense = [answered(ttft=100.0 * k, gaps=(10.0 * k,) * k) for k in range(1, 9)]
    pruned = [answered(ttft=50.0 * k, gaps=(5.0 * k,) * k) for k in range(1, 9)]
    (found,) = comparisons_of({"dense": dense, "pruned": pruned}, "dense")
    for metric in ("ttft", "tpot", "e2e"):
        ratio = found[f"{metric}_speedup"]
        assert (ratio["p50"], ratio["low"], ratio["high"]) == (2, 2, 2) and ratio["confidence"] > 0.95


def test_one_request_has_no_interval() -> None:
    (found,) = comparisons_of({"dense": [answered()], "pruned": [answered(ttft=50)]}, "dense")
    assert found["ttft_speedup"] == {"p50": 2, "low": 2, "high": 2, "confidence": 0}


def test_a_curve_has_each_value_and_ratios_beside() -> None:
    by_value = {
        value: {"dense": [answered(ttft=value)], "pruned": [answered(ttft=value / 4)]} for value in (40, 80)
    }
    curves, (ratios,) = points_of(by_value, "dense")
    assert [(one["name"], [p["value"] for p in one["points"]]) for one in curves] == [
        ("dense", [40, 80]),
        ("pruned", [40, 80]),
    ]
    assert curves[1]["points"][1]["ttft_ms"]["p50"] == 20
    assert [point["ttft_speedup"]["p50"] for point in ratios["points"]] == [4, 4]


def test_the_cache_at_the_end_of_the_longest_batch() -> None:
    longest = Request(batch_size=4, prompt_tokens=10, new_tokens=3, seed=0, index=0)
    decoder = Work(1, Footprint(1, kv_cache_bytes_per_token=100), (), (), logit_bytes=1)
    assert kv_cache_bytes(decoder, longest) == 4 * 12 * 100  # the third new token is read by nobody
    both = Footprint(1, kv_cache_bytes_per_token=100, cross_cache_bytes_per_token=7)
    translator = Work(1, both, (), (), logit_bytes=1, encoder_decoder=True)
    assert kv_cache_bytes(translator, longest) == 4 * (3 * 100 + 10 * 7)  # a start token, two new ones
