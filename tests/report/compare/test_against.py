"""A benchmark against an earlier one: slow-downs and losses are found, noise and another machine are not."""

from __future__ import annotations

from dataclasses import replace
from math import log
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from builders.reports import frozen, frozen_records

from nirvana_deploy.base.errors import NirvanaError, RegressionError
from nirvana_deploy.output.records import Records
from nirvana_deploy.report.compare.against import Changes, changes_since
from nirvana_deploy.report.compare.alike import Folder

ROUNDS, WINDOWS = 21, 32
TIMES = ("Prefill", "TTFT", "TPOT")


def measured(
    seed: int, *, slower: float = 1.0, busy: float = 1.0, kl: float = 1.0, rounds: int = ROUNDS
) -> Records:
    """The frozen folder measured once more, with a noise of 2 % in time and none in quality.

    ``slower`` and ``kl`` are factors of the pruned model, ``busy`` one of all times.
    """
    random = np.random.default_rng(seed)
    records = frozen_records()
    assert records.benchmark is not None and records.manifest is not None
    qualities = records.manifest["stages"]["quality"]["result"]["variants"]
    for variant in records.benchmark["variants"]:
        cut = variant["name"] != "dense"
        for key in ("prefill_ms", "ttft_ms", "tpot_ms"):
            factor = busy * (slower if cut else 1.0)
            samples = factor * variant[key]["p50"] * np.exp(0.02 * random.standard_normal(rounds))
            variant[key] = {"p50": float(np.median(samples)), "samples": samples.tolist()}
        text = np.random.default_rng(3).standard_normal(WINDOWS)
        quality = {**variant["quality"], "nll_by_window": (3 + 0.2 * text).tolist()}
        quality["kl_vs_dense"] *= kl if cut else 1.0
        quality["kl_by_window"] = (quality["kl_vs_dense"] * np.exp(0.3 * text)).tolist()
        qualities[variant["name"]] = quality
    return records


def compared(before: Records, now: Records, *, tolerance: float = 0.03) -> Changes:
    return changes_since(Folder("old", before), Folder("new", now), tolerance=tolerance)


def verdicts(found: Changes, variant: str = "pruned") -> dict[str, str]:
    return {one.measure: one.verdict for one in found.changes if one.variant == variant}


def changed(records: Records, record: str, key: str, **values: Any) -> Records:
    content = getattr(records, record)
    content[key] = {**content.get(key, {}), **values}
    return records


def test_the_same_model_measured_twice_is_never_worse() -> None:
    for seed in range(1, 30):
        found = compared(measured(0), measured(seed))
        found.require_none_worse()
        assert not found.worse and found.cautions == ()
    assert verdicts(found)["KL to dense"] == verdicts(found)["Perplexity"] == "unchanged"


def test_a_slower_model_is_found() -> None:
    found = compared(measured(0), measured(1, slower=1.2))
    assert {measure: verdicts(found)[measure] for measure in TIMES} == dict.fromkeys(TIMES, "worse")
    assert {one.variant for one in found.worse} == {"pruned"}
    (tpot,) = [one for one in found.worse if one.measure == "TPOT"]
    assert tpot.low is not None and tpot.high is not None and tpot.low < 1.2 < tpot.high
    with pytest.raises(
        RegressionError, match=r"^Worse than old beyond noise: .*pruned: TPOT is 1\.\d+ times"
    ) as error:
        found.require_none_worse()
    assert error.value.exit_code == 4
    assert verdicts(compared(measured(0), measured(1, slower=0.8)))["TPOT"] == "better"
    assert (
        verdicts(compared(measured(0), measured(1, slower=1.2), tolerance=0.5))["TPOT"] == "within tolerance"
    )


def test_a_loss_of_quality_is_found_by_windows_of_the_same_text() -> None:
    """A rise of 8 % is far within the spread between windows, and beyond that of their ratios."""
    found = compared(measured(0), measured(1, kl=1.08))
    assert [(one.variant, one.measure) for one in found.worse] == [("pruned", "KL to dense")]
    assert verdicts(compared(measured(0), measured(1, kl=1.02)))["KL to dense"] == "within tolerance"
    earlier = measured(0)
    assert earlier.manifest is not None
    for quality in earlier.manifest["stages"]["quality"]["result"]["variants"].values():
        del quality["nll_by_window"], quality["kl_by_window"]
    found = compared(earlier, measured(1, kl=1.08))
    assert not found.worse and verdicts(found)["KL to dense"] == "not compared"
    assert found.cautions[-1].startswith("Quality is not compared: old has no numbers by window")


def by_kind(records: Records, **kl_by_kind: list[float]) -> Records:
    """``records`` whose pruned model has this KL in the windows of each kind."""
    assert records.manifest is not None
    quality = records.manifest["stages"]["quality"]["result"]["variants"]["pruned"]
    quality["parts"] = {
        kind: {
            "perplexity": 9.0,
            "nll_by_window": [log(9.0)] * len(kl),
            "kl_vs_dense": fmean(kl),
            "kl_by_window": kl,
        }
        for kind, kl in kl_by_kind.items()
    }
    return records


def test_a_kind_of_few_windows_can_be_worse() -> None:
    before = by_kind(measured(0), prose=[0.1, 0.2, 0.1, 0.3], code=[0.2, 0.4, 0.1])
    now = by_kind(measured(1), prose=[0.1, 0.25, 0.09, 0.28], code=[0.25, 0.48, 0.13])
    found = compared(before, now)
    assert [(one.variant, one.measure) for one in found.worse] == [("pruned", "KL to dense, code")]
    assert verdicts(found)["KL to dense, prose"] == "no difference shown"
    assert [row[1] for row in found.table().rows if "," in row[1]] == ["KL to dense, code"]
    assert found.cautions == ()


def test_what_windows_cannot_tell_is_said() -> None:
    before = by_kind(measured(0), prose=[0.1], code=[0.2, 0.0], self=[0.1, 0.2])
    found = compared(before, by_kind(measured(1), prose=[0.3], code=[0.3, 0.1], self=[0.2]))
    assert not found.worse and found.cautions == (
        "Not compared: KL to dense, prose of pruned: a single window tells no difference from noise.",
        "Not compared: KL to dense, code of pruned: a window where it is 0 has no ratio.",
        "Not compared: Perplexity, self of pruned; KL to dense, self of pruned: 2 windows before, 1 now.",
    )
    assert verdicts(found)["Perplexity, prose"] == "unchanged"


def test_a_machine_that_is_slower_for_all_is_not_the_cuts_fault() -> None:
    """Beyond noise for all of them: the baseline alone is worse, and a caution says what to think."""
    found = compared(measured(0), measured(1, busy=1.3))
    assert {one.variant for one in found.worse} == {"dense"}
    assert verdicts(found)["TPOT"] == "as the baseline"
    assert any("dense, the baseline, takes 1." in said for said in found.cautions)


def test_the_baseline_of_now_is_looked_up_by_its_name() -> None:
    """An earlier record that compared with another model excuses nothing."""
    before, now = measured(0), measured(1, slower=1.3)
    assert before.benchmark is not None
    for comparison in before.benchmark["comparisons"]:
        comparison["baseline"] = "pruned"
    before.benchmark["variants"].reverse()
    assert verdicts(compared(before, now))["TPOT"] == "worse"
    before.benchmark["variants"] = [one for one in before.benchmark["variants"] if one["name"] != "dense"]
    assert verdicts(compared(before, now))["TPOT"] == "worse"


def test_times_of_another_runtime_are_not_judged() -> None:
    now = measured(1, slower=2.0)
    assert now.benchmark is not None
    for variant in now.benchmark["variants"]:
        variant["runtime"] = "openvino-cpu"
    found = compared(measured(0), now)
    assert {verdicts(found)[measure] for measure in TIMES} == {"not compared"} and not found.worse
    assert found.cautions == (
        "Times are not compared: runtime onnxruntime-cpu before, openvino-cpu now. "
        "Measure both in one: --runtime onnxruntime-cpu",
    )


@pytest.mark.parametrize(
    ("record", "key", "values", "said"),
    [
        ("benchmark", "environment", {"cpu": "Other CPU"}, "cpu Example CPU @ 2.50GHz before, Other CPU now"),
        ("benchmark", "workload", {"new_tokens": 32}, "--prompt-tokens 128 --new-tokens 64 --batch-size 1 "),
    ],
)
def test_times_of_another_machine_or_workload_are_not_judged(
    record: str, key: str, values: dict[str, Any], said: str
) -> None:
    found = compared(measured(0), changed(measured(1, slower=2.0, kl=2.0), record, key, **values))
    assert {verdicts(found)[measure] for measure in TIMES} == {"not compared"}
    assert said in found.cautions[0] and found.cautions[0].startswith("Times are not compared: ")
    assert [one.measure for one in found.worse] == ["KL to dense"]


def test_other_versions_recipes_and_busy_machines_are_cautions() -> None:
    now = changed(measured(1), "benchmark", "environment", onnxruntime="1.30.0")
    changed(now, "manifest", "options", sparsity=0.5)
    changed(now, "benchmark", "watch", cautions=["The machine was busy."])
    found = compared(measured(0, rounds=6), now)
    assert found.cautions == (
        "The environment is another: onnxruntime 1.23.2 before, 1.30.0 now.",
        "The recipe is another: sparsity 0.4 before, 0.5 now.",
        "Now: The machine was busy.",
        "6 rounds show no difference between two runs with a confidence of 95%: seven of each may "
        "(--repeats).",
    )
    assert verdicts(found)["TPOT"] == "no difference shown"


def test_another_text_is_not_compared() -> None:
    now = changed(measured(1, kl=3.0), "benchmark", "evaluation", source="file other.txt")
    found = compared(measured(0), now)
    assert found.cautions[0].startswith("Quality is not compared: the text is pydoc, held-out windows before")
    assert verdicts(found)["KL to dense"] == "not compared" and not found.worse


def test_another_model_is_refused() -> None:
    other = changed(measured(1), "manifest", "model", files={"model.safetensors": "0" * 64}, name="other")
    with pytest.raises(
        NirvanaError, match="old is the benchmark of another model: smollm2 there, other here"
    ):
        compared(measured(0), other)
    alone = measured(1)
    assert alone.benchmark is not None
    alone.benchmark["variants"][0]["parameters"] = 7
    with pytest.raises(NirvanaError, match="another model: 134,515,008 parameters"):
        compared(Records(None, None, measured(0).benchmark), Records(None, None, alone.benchmark))


def test_what_is_missing_is_said_or_refused() -> None:
    now = measured(1)
    assert now.benchmark is not None
    now.benchmark["variants"] = now.benchmark["variants"][:1]
    assert compared(measured(0), now).cautions[-1] == "Not measured any more: pruned."
    now.benchmark["variants"][0]["name"] = "x"
    with pytest.raises(
        NirvanaError, match="no model in common that was timed alike: dense, pruned there, x here"
    ):
        compared(measured(0), now)


def test_results_are_shown_in_brief_and_whole() -> None:
    found = compared(measured(0), measured(1, slower=1.2))
    assert repr(found) == "Changes(against 'old', 3 of 39 worse)"
    assert found.as_json()["worse"] == 3 and found.as_json()["changes"][0]["measure"] == "Prefill"
    assert "worse" in found._repr_html_()


def with_workloads(records: Records, seed: int, *, slower: float = 1.0, busy: float = 1.0) -> Records:
    """``records`` with the frozen workloads, timed again with 2 % of noise; 24 requests."""
    random, timed = np.random.default_rng(seed), frozen("workloads")
    timed["workloads"], (workload,) = timed["workloads"][:1], timed["workloads"][:1]
    for variant in workload["variants"]:
        factor = busy * (slower if variant["name"] != "dense" else 1.0)
        first = variant["batches"][0]
        noises = factor * np.exp(0.02 * random.standard_normal(24))
        variant["batches"] = [
            {**first, "ttft_ms": noise * 80, "itl_ms": [noise * 10] * 7} for noise in noises.tolist()
        ]
    for sweep in timed["sweeps"]:
        for variant in sweep["variants"]:
            factor = busy * (slower if variant["name"] != "dense" else 1.0)
            for point in variant["points"]:
                samples = factor * point["tpot_ms"]["p50"] * np.exp(0.02 * random.standard_normal(ROUNDS))
                point["tpot_ms"] = {"p50": float(np.median(samples)), "samples": samples.tolist()}
    return replace(records, workloads=timed)


def test_a_workload_and_a_sweep_that_got_slower_are_found_request_by_request() -> None:
    before = with_workloads(measured(0), 1)
    name = before.workloads["workloads"][0]["name"] if before.workloads else ""
    found = verdicts(compared(before, with_workloads(measured(0), 2)))
    assert found[f"{name}: TTFT"] in ("no difference shown", "within tolerance")
    slower = compared(before, with_workloads(measured(0), 2, slower=1.2))
    worse = {one.measure for one in slower.worse}
    assert worse >= {f"{name}: TTFT", f"{name}: TPOT", f"{name}: E2E", "TPOT, context 128"}
    assert {one.variant for one in slower.worse} == {"pruned"}
    assert f"{name}: TTFT" in [row[1] for row in slower.table().rows]
    busy = verdicts(compared(before, with_workloads(measured(0), 2, busy=1.3)))
    assert busy[f"{name}: TPOT"] == busy["TPOT, context 128"] == "as the baseline"


def test_requests_at_a_server_are_compared_by_their_rounds() -> None:
    """Six rounds of four requests each: the interval is that of six pairs of means."""
    before, now = with_workloads(measured(0), 1), with_workloads(measured(0), 2)
    means = []
    for records in (before, now):
        assert records.workloads is not None
        for variant in records.workloads["workloads"][0]["variants"]:
            for index, batch in enumerate(variant["batches"]):
                batch["round"] = index // 4
            times = [batch["ttft_ms"] for batch in variant["batches"]]
            means.append(np.reshape(times, (6, 4)).mean(axis=1))
    found = [one for one in compared(before, now).changes if one.measure.endswith(": TTFT")]
    dense = next(one for one in found if one.variant == "dense")
    ratios = means[2] / means[0]
    assert (dense.low, dense.high) == (pytest.approx(ratios.min()), pytest.approx(ratios.max()))


def test_a_workload_of_another_file_is_not_compared() -> None:
    before, now = with_workloads(measured(0), 1), with_workloads(measured(0), 2, slower=2.0)
    assert now.workloads is not None
    now.workloads["workloads"][0]["file"]["seed"] = 7
    found = compared(before, now)
    name = now.workloads["workloads"][0]["name"]
    assert verdicts(found)[f"{name}: TTFT"] == "not compared"
    assert f"Workload {name}: Times are not compared: its file is another." in found.cautions


def test_workloads_alone_are_compared_with_those_of_a_folder_or_of_another_record() -> None:
    """What ``benchmark A B --workload`` writes has no times outside of them."""
    timed = with_workloads(measured(0), 1).workloads
    slower = with_workloads(measured(0), 2, slower=1.2)
    before, now = Records(None, None, None, timed), Records(None, None, None, slower.workloads)
    found = compared(before, now)
    assert {one.variant for one in found.worse} == {"pruned"}
    assert {one.measure for one in found.worse} == {one.measure for one in compared(before, slower).worse}
    assert slower.workloads is not None
    for one in (*slower.workloads["workloads"], *slower.workloads["sweeps"]):
        for variant in one["variants"]:
            variant["name"] = f"their:{variant['name']}"
    with pytest.raises(NirvanaError, match=r"timed alike: .*chat: dense, pruned.* their:dense"):
        compared(before, now)
    with pytest.raises(NirvanaError, match=r"timed alike: chat: dense, pruned.* there, dense, pruned here"):
        compared(before, replace(measured(1), workloads=None))


def test_more_memory_is_worse_from_5_percent_on() -> None:
    for factor, verdict in ((1.04, "within tolerance"), (1.06, "worse"), (0.9, "better")):
        now = measured(0)
        assert now.benchmark is not None
        now.benchmark["variants"][1]["peak_rss_bytes"] *= factor
        assert verdicts(compared(measured(0), now))["Peak memory"] == verdict
