"""Workloads and sweeps on tiny decoders, each in a process of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders.tiny_decoder import KV_HEADS, write_tiny_decoder

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.footprint import Footprint
from nirvana_deploy.measure.benchmark import Variant
from nirvana_deploy.measure.bounds import Work
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.workloads import session
from nirvana_deploy.measure.workloads.named import NamedWorkload, WorkloadFile
from nirvana_deploy.measure.workloads.sweep import sweeps_of
from nirvana_deploy.report.pages.workloads import cautions

pytestmark = pytest.mark.integration
KV_BYTES = 4 * 2 * 4 * sum(KV_HEADS)
FEW = NamedWorkload("few", WorkloadFile(prompt_tokens=(3, 5), new_tokens=4, requests=6, batch_size=2))


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Variant]:
    footprint = Footprint(weight_bytes_per_step=1504, kv_cache_bytes_per_token=KV_BYTES)
    work = Work(288, footprint, products=(), mixings=(), logit_bytes=88)
    folder = tmp_path_factory.mktemp("tiny")
    return [
        Variant(name, write_tiny_decoder(folder / name, seed=seed), 976, 88, work)
        for seed, name in enumerate(("dense", "pruned"))
    ]


def test_a_workload_is_measured(variants: list[Variant]) -> None:
    found = session.measure_workload(variants, FEW, threads=1)
    assert found["file"]["prompt_tokens"] == [3, 5] and found["environment"]["threads"] == 1
    assert len(found["watch"]["samples"]) == 4  # the longest ahead, then three batches
    dense, pruned = found["variants"]
    for one in (dense, pruned):
        assert [len(batch["itl_ms"]) for batch in one["batches"]] == [3, 3, 3]
        assert {batch["prompt_tokens"] for batch in one["batches"]} <= {3, 5}
        assert one["kv_cache_bytes"] == 2 * (5 + 4 - 1) * KV_BYTES
        assert one["load_ms"] > 0 and one["peak_rss_bytes"] > 1e6
        assert one["seconds"] == pytest.approx(3 * one["e2e_ms"]["mean"] / 1e3)
    (ratio,) = found["comparisons"]
    by_hand = [
        before["ttft_ms"] / after["ttft_ms"]
        for before, after in zip(dense["batches"], pruned["batches"], strict=True)
    ]
    assert ratio["ttft_speedup"]["p50"] == pytest.approx(np.median(by_hand))


def test_a_model_that_does_not_load_is_named_and_the_other_timed(
    variants: list[Variant], tmp_path: Path
) -> None:
    both = [replace(variants[0], path=tmp_path), variants[1]]
    (sweep,) = sweeps_of(["threads=1,2"], Workload(prompt_tokens=4, new_tokens=3, repeats=2))
    for found in (session.measure_workload(both, FEW, threads=1), session.measure_sweep(both, sweep)):
        assert [one["name"] for one in found["variants"]] == ["pruned"] and found["comparisons"] == []
        assert "holds no model.onnx" in found["failed"][0]["reason"]
        assert cautions(found)[-1].startswith("dense was not timed: ")


@pytest.mark.parametrize("text", ["context=2,6", "batch=1,3", "threads=1,2"])
def test_an_axis_is_swept(variants: list[Variant], text: str) -> None:
    base = Workload(prompt_tokens=4, new_tokens=3, repeats=2, threads=1)
    (sweep,) = sweeps_of([text], base)
    found = session.measure_sweep(variants, sweep)
    assert [one["name"] for one in found["variants"]] == ["dense", "pruned"]
    for one in found["variants"]:
        assert tuple(point["value"] for point in one["points"]) == sweep.values
        assert all(len(point["tpot_ms"]["samples"]) == 2 for point in one["points"])
    (ratios,) = found["comparisons"]
    dense, pruned = (one["points"][1]["tpot_ms"]["samples"] for one in found["variants"])
    assert ratios["points"][1]["tpot_speedup"]["p50"] == pytest.approx(np.median(np.divide(dense, pruned)))


def test_a_cache_that_no_memory_holds_is_refused_ahead(variants: list[Variant]) -> None:
    huge = WorkloadFile(prompt_tokens=2**31 - 1, new_tokens=4, requests=4096, batch_size=4096)
    with pytest.raises(NirvanaError, match=r"huge: the KV cache of 4096 x .* needs at least"):
        session.measure_workload(variants, NamedWorkload("huge", huge), threads=1)
