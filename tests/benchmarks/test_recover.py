"""The benchmark of recovery: its table, and its comparison of two models."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from builders.jobs import SHORT
from builders.plans import plan_for
from builders.scripts import ROOT
from builders.tiny import VOCABULARY, write_tiny

from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.pipeline.prune_export import prune_export
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.divergence import masked_quality
from nirvana_deploy.quantize.int8.spec import read_record

COURSE: dict[str, object] = {
    "tokens": 16384,
    "seconds": 100.0,
    "writing_seconds": 20.0,
    "kept_step": 16,
    "curve": [{"step": 4, "tokens": 4096}, {"step": 16, "tokens": 16384}],
}


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recover

    return recover


def test_whole_logits_give_what_streamed_states_give(page: ModuleType, tmp_path: Path) -> None:
    dense = Checkpoint.open(write_tiny(tmp_path / "dense", "llama-tied"))
    plan = plan_for(dense.path, sparsity=0.3)
    slice_checkpoint(dense, plan, tmp_path / "cut")
    windows = np.random.default_rng(3).integers(3, VOCABULARY, (3, 24))
    [expected] = masked_quality(dense, [plan], [windows])
    found = page.compared(dense.load(), Checkpoint.open(tmp_path / "cut").load(), {"text": windows})["text"]
    assert found["kl"] == pytest.approx(expected.divergence[0].mean(), rel=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(expected.loss[0].mean()), rel=1e-4)
    assert found["dense_perplexity"] == pytest.approx(np.exp(expected.dense_loss.mean()), rel=1e-4)


def test_the_table_has_a_line_a_budget(page: ModuleType) -> None:
    text = {"wiki": {"perplexity": 30.0, "dense_perplexity": 20.0}}
    cut = {"sparsity": 0.2, "method": None, "text": None, "budget": "0", "texts": text}
    better = {"wiki": {"perplexity": 24.0, "dense_perplexity": 20.0}}
    after = {"sparsity": 0.2, "method": "distill", "text": "mix", "budget": "16k", "course": COURSE}
    lines = page.table([{**after, "texts": better}, cut]).splitlines()
    assert lines[2] == "| 0.2 | the cut |  | 0 | 0 | 30.0, 1.50x |  |  |  |"
    assert lines[3] == "| 0.2 | distill | mix | 16,384 | 2 | 24.0, 1.20x |  |  |  |"


def test_twenty_answers_are_counted_and_shown_beside_accuracy(page: ModuleType) -> None:
    assert len(set(page.ASKED)) == 20
    answers = dict.fromkeys(page.ASKED, " and again and again and again and again")
    assert page.written(answers) == {"prompts": 20, "loops": 20, "says_paris": False}
    found = page.written(answers | {"The capital of France is": " Paris, on the Seine."})
    assert found == {"prompts": 20, "loops": 19, "says_paris": True}
    tasks = {
        "files": {"boolq": {"metric": "acc"}, "piqa": {"metric": "acc_norm"}},
        "variants": {"model": {"boolq": {"acc,none": 0.5}, "piqa": {"acc_norm,none": 0.3}}},
        "means": {"variants": {"model": {"mean": 0.4, "standard_error": 0.01}}},
    }
    text = {"wiki": {"perplexity": 30.0, "dense_perplexity": 20.0}}
    cut = {"sparsity": 0.2, "method": None, "text": None, "budget": "0", "texts": text}
    row = {**cut, "written": found, "tasks": tasks, "rounded": "w4", "rounded_texts": text}
    header, _, plain, rounded = page.table([row]).splitlines()
    assert header.endswith("| wiki | loops of 20 | Paris | zero-shot |")
    assert plain.endswith("| 30.0, 1.50x | 19 | yes | 0.400 ± 0.010 (0.300) |")
    assert rounded.endswith("| 30.0, 1.50x |  |  |  |")


def test_a_model_in_four_bits_has_a_line_of_its_own(page: ModuleType) -> None:
    text, worse = ({"wiki": {"perplexity": value, "dense_perplexity": 20.0}} for value in (24.0, 26.0))
    row = {"sparsity": 0.2, "method": "distill", "for": "w4", "text": "mix", "budget": "16k", "texts": text}
    lines = page.table([row | {"rounded_texts": worse, "course": COURSE}]).splitlines()
    assert lines[2].startswith("| 0.2 | distill, for w4 | mix |") and "24.0, 1.20x" in lines[2]
    assert lines[3].startswith("| 0.2 | distill, for w4, w4 by search | mix |") and "26.0, 1.30x" in lines[3]


def test_what_is_judged_as_deployed_is_what_the_folder_deploys(
    page: ModuleType, tmp_path: Path, text: Path
) -> None:
    """Codes fitted to the folder's calibration windows, as ``quantize`` fits them by default."""
    write_tiny(tmp_path / "model", "llama-tied")
    options = {**SHORT, "run_benchmark": False, "quantize": ("w4",)}
    out = tmp_path / "out"
    prune_export(str(tmp_path / "model"), sparsity=0.3, calib=str(text), out=out, until="quality", **options)
    dense = Checkpoint.open(tmp_path / "model")
    windows = {"text": np.random.default_rng(3).integers(3, VOCABULARY, (3, 24))}
    folders = {"dense": out / "dense/onnx", "w4": out / "onnx-w4"}
    expected = page.judged_folders(folders, windows, 1)["w4"]["text"]
    found = page.deployed("w4", out, dense, windows)["text"]
    assert found["kl"] == pytest.approx(expected["kl_vs_dense"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert read_record(out / "onnx-w4")["weights"]["rounding"] == "gptq"


def test_a_state_that_was_kept_before_the_last_is_told(page: ModuleType) -> None:
    course = COURSE | {"kept_step": 4}
    row = {
        "sparsity": 0.2,
        "method": "distill",
        "text": "mix",
        "budget": "16k",
        "texts": {},
        "course": course,
    }
    assert "| 16,384, kept 4,096 |" in page.table([row])


def test_what_is_unusual_is_named_and_tells_rows_apart(page: ModuleType) -> None:
    old = {"sparsity": 0.2, "method": "distill", "text": "mix", "budget": "16k", "learning_rate": 1e-4}
    same = {**old, "saliency": "refit", "allocation": "curves", "seed": 0, "batch": 4, "seq_len": None}
    assert page.key(old) == page.key({**same, "reconstruct": True, "steps": 1, "for": None})
    assert page.key(old | {"rounded": True}) == page.key({**same, "rounded": "w4"})
    others: list[dict[str, object]] = [{"learning_rate": 3e-4}, {"steps": 2}, {"saliency": "taylor"}]
    more: list[dict[str, object]] = [{}, {"rounded": "w4"}, {"rounded": "w4", "deployed": True}]
    assert len({page.key(old | other) for other in [*others, *more, {"patience": 99}]}) == 7
    assert page.key(old) == page.key(old | {"patience": 4})
    names = [page.name_of(old | other) for other in others]
    assert names == ["distill, rate 0.0003", "distill, 2 steps", "distill, taylor"]


def test_the_figure_has_a_line_for_each_cut(page: ModuleType, tmp_path: Path) -> None:
    def course(tokens: int) -> dict[str, object]:
        return {"tokens": tokens, "curve": [{"tokens": 0, "kl": 1.0}, {"tokens": tokens, "kl": 0.5}]}

    row = {"sparsity": 0.2, "method": "distill", "text": "mix", "budget": "16k", "course": course(16)}
    rows = [row, row | {"saliency": "random"}, row | {"steps": 2, "courses_before": [course(8)]}]
    page.draw([{"sparsity": 0.2, "method": None, "text": None}, *rows], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_recovery_on_paper_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recover_bounds
    from scale import SHAPES

    shape = shape_from_config(SHAPES["tiny"])
    linear, ends = shape.linear_parameters, shape.embedding_parameters
    live, stored, blocks = (
        recover_bounds.cost(shape, sparsity=0.1, method=method, teacher=teacher)
        for method, teacher in (("distill", "live"), ("distill", "stored"), ("layers", "one block"))
    )
    head = ends / 2  # an untied one
    assert live.operations == pytest.approx(2 * linear + 6 * 0.9 * linear + (2 + 6) * head)
    assert live.memory_bytes - stored.memory_bytes == 4 * (linear + ends)
    assert stored.disk_bytes == 2 * shape.hidden_size + 4 and not blocks.disk_bytes
    assert blocks.memory_bytes < live.memory_bytes / 4


def test_what_the_largest_probabilities_hide_is_the_kl_within_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from teacher_cache import lost_in_rest

    p, q = torch.tensor([[0.6, 0.2, 0.1, 0.1]]), torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    whole = float((p * (p / q).log()).sum())
    seen = 0.6 * np.log(0.6 / 0.5) + 0.4 * np.log(0.4 / 0.5)  # one and the others
    assert lost_in_rest(p.log(), q.log(), 1) == pytest.approx(1 - seen / whole, rel=1e-5)
    assert lost_in_rest(p.log(), q.log(), 3) == pytest.approx(0, abs=1e-6)


def test_a_step_of_recovery_is_told_by_model_and_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recover_speed

    row = {"model": "smollm2", "sparsity": 0.2, "batch": 4, "seq_len": 256, "threads": 1, "way": "layers"}
    found = {"seconds": 8.0, "tokens_per_second": 128.0, "peak_rss_bytes": 2.5e9, "moments_bytes": 1e8}
    shown = recover_speed.section([row | found | {"bfloat16": False}])
    assert "| smollm2, 0.2 removed | layers | 8.0 s | 128 | 2.50 GB | 0.10 GB |" in shown
    assert "4 windows of 256 tokens, 1 threads, float32" in shown
    assert recover_speed.section([]) == "Not measured yet."
