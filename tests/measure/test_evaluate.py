"""``evaluate``: the tangent kernel, windows of a wished length, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from builders import choices
from builders.choices import TASK, harness_scores, harness_version, write_choices
from builders.jobs import SHORT
from builders.tiny import write_tiny
from click.testing import CliRunner

from nirvana_deploy import prune_export
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError, install_extra
from nirvana_deploy.cli.evaluate import evaluate
from nirvana_deploy.measure.recipe import Evaluation
from nirvana_deploy.measure.zero_shot.tasks import evaluate_tasks
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.pipeline.folder import evaluate_folder
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan_file import read_plan
from nirvana_deploy.runtime.recipe import Place

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load
OPTIONS: dict[str, Any] = {
    "sparsity": 0.3,
    "gamma": 1.0,
    "round_to": 4,
    "num_sequences": 4,
    "seq_len": 16,
    **SHORT,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with ONNX models, not benchmarked; tests write their records into it."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = str(write_tiny(folder / "model", "llama-tied"))
    prune_export(model, out=folder / "out", run_benchmark=False, threads=1, **OPTIONS)
    return folder / "out"


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and no ONNX model."""
    folder = tmp_path_factory.mktemp("cut")
    model = str(write_tiny(folder / "model", "qwen2"))
    prune_export(model, out=folder / "out", until="checkpoint", **OPTIONS)
    return folder / "out"


def harness(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> None:
    """Stand in for lm_eval: record the call, answer in its shape, print as it does."""

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        print("hf (pretrained=...)")  # noqa: T201
        if "nonsense" in arguments["tasks"]:
            raise KeyError("nonsense")
        accuracy = {"alias": "piqa", "sample_len": 5, "acc,none": 0.6, "acc_stderr,none": "N/A"}
        return {"results": {task: dict(accuracy) for task in arguments["tasks"]}}

    module = ModuleType("lm_eval")
    module.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", module)


def test_ntk_is_measured_recorded_and_reported(out: Path) -> None:
    result = CliRunner().invoke(evaluate, [str(out), "--ntk", "--ntk-windows", "2", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "Adam kernel: change measured" in result.stdout and "Perplexity" in result.stdout
    record = json.loads((out / "ntk.json").read_text())
    assert record["windows"] == 2 and record["window_tokens"] == 24 and "held out" in record["source"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stages"]["ntk"]["result"] == record
    assert "ntk.json" in manifest["stages"]["ntk"]["files"]
    for page in ("report.md", "report.html"):
        text = (out / page).read_text()
        assert "Does it still learn like the dense model?" in text and "random" in text
    assert 'aria-label="Change of the tangent kernel' in (out / "report.html").read_text()


def test_a_folder_without_onnx_is_measured_by_its_kernel_alone(cut: Path) -> None:
    result = evaluate_folder(cut, Evaluation(ntk=True, ntk_windows=1))
    assert set(result) == {"ntk"} and "ntk" in (cut / "manifest.json").read_text()


def test_a_missing_dense_model_is_named(cut: Path) -> None:
    model = cut.parent / "model"
    model.rename(cut.parent / "elsewhere")
    try:
        with pytest.raises(NirvanaError, match=r"no longer at .*\nPut it back there"):
            evaluate_folder(cut, Evaluation(ntk=True, ntk_windows=1))
    finally:
        (cut.parent / "elsewhere").rename(model)


def test_windows_of_a_text_have_the_wished_length(out: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("A text of its own, long enough for a few windows of evaluation. " * 20)
    result = evaluate_folder(
        out, Evaluation(eval_text=text, window_tokens=50, max_windows=3), Place(threads=1)
    )
    assert result["window_tokens"] == 50 and result["variants"]["pruned"]["tokens"] == 3 * 49
    with pytest.raises(NirvanaError, match="longer than the model's 512 positions"):
        evaluate_folder(out, Evaluation(eval_text=text, window_tokens=2048))
    usage = CliRunner().invoke(evaluate, [str(out), "--window", "512"])
    assert usage.exit_code == 2 and "--eval-text" in usage.output


def test_tasks_without_the_harness_name_the_extra(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    before = (out / "quality.json").stat().st_mtime_ns
    with pytest.raises(MissingExtraError, match="'lm-eval', which is not installed") as caught:
        evaluate_folder(out, Evaluation(tasks="piqa"))
    assert caught.value.hint == install_extra("eval")
    assert (out / "quality.json").stat().st_mtime_ns == before  # said before any work


def test_tasks_are_run_on_both_models_and_reported(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    harness(monkeypatch, calls)
    result = CliRunner().invoke(evaluate, [str(cut), "--tasks", "piqa, arc_easy", "--limit", "5", "--json"])
    assert result.exit_code == 0, result.output
    variants = json.loads(result.stdout)["tasks"]["variants"]
    assert variants["pruned"] == {"piqa": {"acc,none": 0.6}, "arc_easy": {"acc,none": 0.6}}
    dense, pruned = calls  # a folder without ONNX: its checkpoints
    assert dense["tasks"] == ["piqa", "arc_easy"] and dense["limit"] == 5 and dense["model"] == "hf"
    assert dense["batch_size"] == 8 and not dense["log_samples"] and "task_manager" not in dense
    assert dense["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "trust_remote_code" not in dense["model_args"]
    assert pruned["model_args"]["trust_remote_code"] is True
    assert pruned["model_args"]["pretrained"].endswith("checkpoint")
    assert "arc\\_easy | acc | 0.600 | 0.600" in (cut / "report.md").read_text()


def test_foreign_code_and_unknown_tasks_are_refused(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    harness(monkeypatch, calls)
    with pytest.raises(NirvanaError, match="cannot run nonsense on the pruned model"):
        evaluate_tasks({"pruned": cut / "checkpoint"}, ["nonsense"])
    changed = tmp_path / "changed"
    slice_checkpoint(Checkpoint.open(cut.parent / "model"), read_plan(cut / "plan.json"), changed)
    with (changed / "modeling_nirvana.py").open("a") as module:
        module.write("import os\n")
    with pytest.raises(NirvanaError, match="not this package's"):
        evaluate_tasks({"pruned": changed}, ["piqa"])
    assert len(calls) == 1


def test_tasks_run_on_what_is_asked(out: Path, cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    harness(monkeypatch, calls)
    for on, names in (
        (None, ["dense", "pruned"]),
        ("checkpoint", ["dense", "pruned"]),
        ("both", ["dense", "pruned", "dense checkpoint", "pruned checkpoint"]),
    ):
        found = evaluate_folder(out, Evaluation(tasks="piqa", tasks_on=on), Place(threads=1))
        assert list(found["tasks"]["variants"]) == names
    assert [call["model"] for call in calls] == ["onnxruntime"] * 2 + ["hf"] * 2 + ["onnxruntime"] * 2 + [
        "hf"
    ] * 2
    assert calls[1]["model_args"] == {"pretrained": str(out / "onnx")} and "batch_size" not in calls[1]
    with pytest.raises(NirvanaError, match="no ONNX model to run tasks on"):
        evaluate_folder(cut, Evaluation(tasks="piqa", tasks_on="onnx"))
    with pytest.raises(NirvanaError, match="nowhere is not a folder"):
        evaluate_folder(cut, Evaluation(tasks="piqa", task_folder=cut / "nowhere"))
    usage = CliRunner().invoke(evaluate, [str(out), "--include-path", str(out)])
    assert usage.exit_code == 2 and "--tasks" in usage.output


def test_a_bad_tasks_file_is_refused_before_any_work(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    harness(monkeypatch, calls)
    before = (out / "quality.json").stat().st_mtime_ns
    bad = tmp_path / "piqa.jsonl"
    bad.write_text('{"query": "Question: why?", "choices": ["so", "no"], "gold": 2}\n')
    result = CliRunner().invoke(evaluate, [str(out), "--tasks", str(bad)])
    assert isinstance(result.exception, NirvanaError) and "line 1, key 'gold' is 2" in str(result.exception)
    bad.write_text('{"query": "Question: why?", "choices": ["so", "no"], "gold": 1}\n')
    with pytest.raises(NirvanaError, match="piqa is asked for both as a file and as a task of the harness"):
        evaluate_folder(out, Evaluation(tasks=f"{bad},piqa"))
    assert not calls and (out / "quality.json").stat().st_mtime_ns == before


def test_a_task_that_generates_names_the_way_out(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def generates(**arguments: Any) -> dict[str, Any]:
        raise NotImplementedError

    harness(monkeypatch, [])
    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", generates)
    with pytest.raises(NirvanaError, match="gsm8k has a task that generates text") as caught:
        evaluate_tasks({"pruned": out / "onnx"}, ["gsm8k"])
    assert "--tasks-on checkpoint" in str(caught.value.hint)


@pytest.mark.consumer(
    "lm-evaluation-harness",
    artifact="ONNX folder and HF folder of a tiny Llama, dense and global",
    proof="the same accuracies on a local multiple-choice task, by onnxruntime and by transformers",
    version=harness_version(),
)
def test_the_harness_finds_the_same_on_onnx_and_checkpoint(out: Path, tmp_path: Path) -> None:
    if harness_version() == "not installed":
        pytest.skip("needs lm-eval: pip install 'nirvana-deploy[eval]'")
    text = Path(choices.__file__).read_text()
    write_choices(tmp_path / "tasks", text, questions=5, context_words=5, choice_words=2)
    variants = harness_scores(out, tmp_path, "--tasks-on", "both")
    for name in ("dense", "pruned"):
        on_onnx, on_checkpoint = variants[name][TASK], variants[f"{name} checkpoint"][TASK]
        assert on_onnx.keys() == on_checkpoint.keys() >= {"acc,none", "acc_norm,none"}
        for metric, value in on_onnx.items():
            assert abs(value - on_checkpoint[metric]) <= 0.005
        assert 0 < on_onnx["acc,none"] < 1
    assert variants["dense"] != variants["pruned"]
