"""What a job is said to take before it begins, beside what jobs took."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import pytest
from builders.jobs import TINY_JOB, write_short_recipe
from builders.scripts import ROOT
from click.testing import CliRunner

from nirvana_deploy.base import resources
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.output import stage
from nirvana_deploy.pipeline.before import checked
from nirvana_deploy.pipeline.folder import forecast_recovery
from nirvana_deploy.pipeline.forecast import costs
from nirvana_deploy.pipeline.forecast.costs import Costs
from nirvana_deploy.pipeline.forecast.forecast import LEAST, MOST, Speed, forecast, without
from nirvana_deploy.pipeline.forecast.search import forecast_search
from nirvana_deploy.pipeline.forecast.stages import stages_of
from nirvana_deploy.pipeline.job import job_of
from nirvana_deploy.pipeline.prune_export import prune_export
from nirvana_deploy.prune.choosing.choices import choices_of
from nirvana_deploy.prune.refit import dense_states
from nirvana_deploy.search.recipe import Search

SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
MACHINE = Speed(operations_per_s=90e9, read_bytes_per_s=1e10)
"""That of benchmarks/NOTES.md, on pipeline/searching/search.py: one thread with AVX-512."""
RESULTS = ROOT / "benchmarks" / "results"


def costs_of_smollm2(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Costs:
    shape = shape_from_config(SMOLLM2)
    monkeypatch.setattr(costs, "peak_rss_bytes", lambda: 550_000_000)
    job = job_of("smollm2", {"sparsity": 0.2, **options})
    choices = choices_of(job.calibration, job.pruning, shape)
    return Costs(job, choices, cast(Checkpoint, SimpleNamespace(shape=shape, path=Path("nowhere"))))


def test_weight_files_have_the_sizes_that_were_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((RESULTS / "search-smollm2-best.json").read_text(encoding="utf-8"))
    for point in record["points"]:
        counted = costs_of_smollm2(monkeypatch, sparsity=point["sparsity"] or 0.2)
        sizes = counted.pruned if point["sparsity"] else counted.dense
        found = counted.weights_bytes(sizes, point["scheme"])
        assert found == pytest.approx(point["weights_bytes"], rel=0.03), point["name"]


def test_a_quantized_head_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = costs_of_smollm2(monkeypatch, sparsity=0.4, quantize_head=True)
    record = json.loads((RESULTS / "smollm2-s0.4.benchmark.json").read_text(encoding="utf-8"))
    recorded = {variant["name"]: variant["weights_bytes"] for variant in record["variants"]}
    for scheme in ("int8", "w4"):
        found = counted.weights_bytes(counted.pruned, scheme)
        assert found == pytest.approx(recorded[f"pruned-{scheme}"], rel=0.03)


CPU_SECONDS = {
    stage.CALIBRATE: 153,
    stage.CURVES: 248,
    stage.RECONSTRUCT: 270,
    stage.quantized("w4"): 130,
    stage.quantized("int8"): 75,
    stage.VERIFY: 44,
    stage.QUALITY: 48 * 1.6,
}
"""benchmarks/NOTES.md, on pipeline/search.py; quality was of the held-out windows alone, and is now of
as many of the unseen text as there are of the largest kind, six tenths."""


@pytest.mark.parametrize("name", CPU_SECONDS)
def test_minutes_are_those_that_were_recorded_within_the_range(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calib = "self:0.6,pydoc:0.2,code:0.2"  # the mixture of the time
    counted = costs_of_smollm2(monkeypatch, calib=calib, quantize=("int8", "w4"), baseline_quantized=False)
    counted = MACHINE.seconds(counted.of(name))
    assert LEAST * counted <= CPU_SECONDS[name] <= MOST * counted


def test_memory_is_that_which_was_recorded_within_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = costs_of_smollm2(monkeypatch, num_sequences=120)
    most = max(counted.of(name).memory_bytes for name in (stage.CURVES, stage.RECONSTRUCT))
    lines = (RESULTS / "recipes.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = [one["peak_rss_bytes"] for one in map(json.loads, lines) if one["recipe"] == "best"]
    usual = median(recorded)  # a process that has made several cuts holds more than one needs
    assert most / 1.5 < usual < 1.5 * most


def test_states_that_scores_leave_to_the_refit_are_counted_where_they_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def memory(name: str, free_bytes: int, **options: Any) -> float:
        free = SimpleNamespace(available=free_bytes)
        monkeypatch.setattr(dense_states.psutil, "virtual_memory", lambda: free)
        return costs_of_smollm2(monkeypatch, preset="fast", **options).of(name).memory_bytes

    windows = job_of("smollm2", {"sparsity": 0.2, "preset": "fast"}).calibration
    assert isinstance(windows.num_sequences, int)
    kept = 2 * 30 * windows.num_sequences * windows.seq_len * 576 * 4
    for name in (stage.SCORE, stage.RECONSTRUCT):
        assert memory(name, 8 * kept) - memory(name, 3 * kept) == kept
    assert memory(stage.SCORE, 8 * kept, reconstruct=False) == memory(stage.SCORE, 3 * kept)
    assert memory(stage.SCORE, 8 * kept, saliency="nirvana") > memory(stage.SCORE, 3 * kept)


TRAINED = {"recover": "400k", "recover_dtype": "float32", "recover_teacher": "live"}


def test_memory_of_recovery_is_that_which_was_recorded_within_a_third(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = (RESULTS / "recover.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [one for one in map(json.loads, lines) if one.get("batch") == 4 and "peak_rss_bytes" in one]
    rows = [one for one in rows if (one["method"], one["for"], one["seq_len"]) == ("distill", None, None)]
    assert len(rows) > 5
    for row in rows:
        counted = costs_of_smollm2(monkeypatch, **{**TRAINED, "sparsity": row["sparsity"]})
        most = counted.of(stage.RECOVER).memory_bytes
        assert most / 1.33 < row["peak_rss_bytes"] < 1.33 * most


def test_memory_and_disk_of_recovery_are_those_of_method_and_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cost(**options: Any) -> costs.Cost:
        return costs_of_smollm2(monkeypatch, **{**TRAINED, **options}).of(stage.RECOVER)

    live, stored = cost(), cost(recover_teacher="stored")
    dense = costs_of_smollm2(monkeypatch).dense
    assert live.memory_bytes - stored.memory_bytes == pytest.approx(4 * dense.parameters, rel=0.01)
    windows = 400_000 // 256 + 32
    on_disk = windows * 256 * (2 * 576 + 4)
    assert stored.spilled_bytes - live.spilled_bytes == pytest.approx(on_disk)
    adapters, blocks = cost(recover_method="lora"), cost(recover_method="layers")
    weights = 0.8 * dense.linear
    assert live.memory_bytes - adapters.memory_bytes > 10 * weights  # gradients and moments of whole weights
    assert live.spilled_bytes == pytest.approx(3 * 12 * weights)
    assert live.spilled_bytes > 10 * adapters.spilled_bytes
    states = 2 * 4 * 400_000 * 576
    assert blocks.memory_bytes - 550_000_000 == pytest.approx(1.15 * states, rel=0.1)
    assert cost(recover_micro_batch=1).memory_bytes < 0.8 * live.memory_bytes


def test_states_on_disk_are_told_before_the_work(tiny_llama: Path) -> None:
    said: list[str] = []
    progress = cast(Any, SimpleNamespace(note=said.append))
    options = {**TINY_JOB, "recover_teacher": "stored", "recover_text": "pydoc"}
    for budget, size in (("6400", r"\d{3} kB"), ("5m", r"at most \d\.\d\d MB")):
        job = job_of(str(tiny_llama), {**options, "recover": budget})
        checked(job, Checkpoint.open(tiny_llama), "checkpoint", progress)
        assert re.search(rf"dense model's states are going to take {size} on disk", "\n".join(said))
        said.clear()


def test_a_dry_run_refuses_a_recovery_without_room(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prune_export(str(tiny_llama), out=out, until="checkpoint", **TINY_JOB)
    monkeypatch.setattr("nirvana_deploy.recover.learning.needs.free_memory_bytes", lambda: 100)
    told = forecast_recovery(out, recover="6400", recover_text="pydoc")
    with pytest.raises(NirvanaError, match=r"Recovery by distill, 4 windows of 16 .* 100 B are free"):
        told.require_room()


def test_every_stage_of_every_job_has_a_cost(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    for options in (
        {},
        {"preset": "best", "recover": "256", "recover_steps": 2},
        {"saliency": "nirvana,taylor", "quantize": ("w8",), "engines": ("tensorrt-rtx",), "dtype": "fp16"},
    ):
        job = job_of(str(tiny_llama), {**TINY_JOB, **options})
        choices = choices_of(job.calibration, job.pruning, checkpoint.shape)
        counted = Costs(job, choices, checkpoint)
        for name in stages_of(job, choices, "report"):
            assert MACHINE.seconds(counted.of(name)) > 0 and counted.of(name).memory_bytes > 0


def test_a_resumed_job_skips_what_is_finished(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune_export(str(tiny_llama), out=out, until="checkpoint", **TINY_JOB)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    job = job_of(str(tiny_llama), TINY_JOB)
    found = forecast(job, out=out, resume=True, speed=MACHINE).forecast
    skipped = [one.name for one in found.stages if one.finished]
    assert skipped == ["calibrate", "score", "plan", "checkpoint"]
    assert found.left[0].name == "onnx"
    (out / "plan.json").unlink()
    found = forecast(job, out=out, resume=True, speed=MACHINE).forecast
    assert [one.name for one in found.stages if one.finished] == ["calibrate", "score"]
    assert {path for path in before if path.name != "plan.json"} == set(out.rglob("*"))
    with pytest.raises(NirvanaError, match="exists already"):
        forecast(job, out=out, speed=MACHINE)
    with pytest.raises(NirvanaError, match=r"made with sparsity 0\.3, not 0\.2"):
        forecast(job_of(str(tiny_llama), {**TINY_JOB, "sparsity": 0.2}), out=out, resume=True, speed=MACHINE)


def test_recovery_makes_anew_what_follows_it(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune_export(str(tiny_llama), out=out, until="checkpoint", **TINY_JOB)
    told = forecast_recovery(out, recover="30m", recover_text="pydoc").forecast
    assert [one.name for one in told.left] == ["recover", "checkpoint"]
    assert told.left[0].seconds == pytest.approx(1800, rel=0.01)


def test_a_search_counts_once_what_its_cuts_share(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Search(sparsities="0,0.2,0.3", precisions="none,w8")
    options = {name: value for name, value in TINY_JOB.items() if name != "sparsity"}
    found = forecast_search(str(tiny_llama), out=tmp_path / "found", recipe=recipe, **options)
    assert (len(found.cuts), found.points) == (2, 6)
    assert {one.name for one in found.cuts[1].stages if one.finished} == {"calibrate", "score", "dense-onnx"}
    assert not (tmp_path / "found").exists()
    first = found.cuts[0]
    assert found.seconds[1] == pytest.approx(first.seconds[1] + found.cuts[1].seconds[1])
    assert without(first, [one.name for one in first.stages]).left == ()


def test_a_sparsity_that_no_plan_reaches_is_said_beside_those_that_one_does(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """What --dry-run says is what the search says."""
    options = {name: value for name, value in TINY_JOB.items() if name != "sparsity"}
    recipe = write_short_recipe(tiny_llama, tmp_path / "my.toml", **{**options, "sparsity": 0.3})
    asked = ["search", "--recipe", str(recipe), "--sparsity", "0.2,0.99", "--precision", "none"]
    asked += ["--no-benchmark", "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(commands, [*asked, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "2 cuts, 2 points" in shown.output and not (tmp_path / "out").exists()
    told = re.search(r"^s0\.99 cannot be made, and would be left out: (.*)$", shown.output, re.MULTILINE)
    assert told is not None
    made = CliRunner().invoke(commands, asked)
    assert made.exit_code == 0, made.output
    points = json.loads((tmp_path / "out/search.json").read_text(encoding="utf-8"))["points"]
    assert [(one["name"], one["failed"]) for one in points] == [("s0.2", None), ("s0.99", told[1])]
    with pytest.raises(NirvanaError, match=r"No cut can be made\. The first, s0\.98"):
        forecast_search(str(tiny_llama), recipe=Search(sparsities="0.98,0.99"), **options)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands, ["prune-export", *arguments, "--dry-run"])


def test_the_command_prints_it_and_makes_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_short_recipe(tiny_llama, tmp_path / "r.toml", sparsity=0.3, calib="pydoc")
    shown = run("--recipe", str(recipe), "--quantize", "w8")
    assert shown.exit_code == 0, shown.output
    rows = [line.split("\t") for line in shown.stdout.splitlines()]
    assert ["Stage", "Would write", "Would take about"] in rows
    assert {"onnx-w8", "verify", "report"} <= {row[0] for row in rows}
    for line in (
        r"^Disk: .*B of files; .*B are free\.$",
        r"^Memory: about .*B at most",
        r"^Time: .*An estimate:",
    ):
        assert re.search(line, shown.stdout, re.MULTILINE)
    told = json.loads(run("--recipe", str(recipe), "--json").stdout)
    assert told["schema"] == 1 and told["seconds_least"] < told["seconds_most"]
    assert told["written_bytes"] == sum(one["written_bytes"] for one in told["stages"])
    assert list(tmp_path.iterdir()) == [recipe]


def test_what_has_no_room_is_shown_and_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _path: SimpleNamespace(free=5))
    result = run(str(tiny_llama), "--sparsity", "0.3", "--calib", "pydoc")
    assert isinstance(result.exception, NirvanaError) and "which has 5.00 B free" in str(result.exception)
    assert "5.00 B are free" in result.stdout
