"""Torch is a runtime like the others: chosen by name, verified, measured, and generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.jobs import SHORT
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from click.testing import CliRunner

from nirvana_deploy import NirvanaError, load_checkpoint, prune_export
from nirvana_deploy.cli.main import commands
from nirvana_deploy.measure.recipe import Evaluation, Workload
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.folder import benchmark_folder, evaluate_folder
from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.runtime.registry import open_runner, runtime_for
from nirvana_deploy.runtime.runner import greedy_tokens
from nirvana_deploy.verify.stage import compare_in


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    model = str(write_tiny(folder / "model", "llama-tied"))
    options = {"sparsity": 0.3, "round_to": 4, "num_sequences": 4, "seq_len": 16, "threads": 1}
    return prune_export(model, out=folder / "out", run_benchmark=False, **options, **SHORT).out


@pytest.mark.parametrize("write", [lambda to: write_tiny(to, "qwen3"), lambda to: write_t5(to, "flan-t5")])
def test_it_generates_what_transformers_generates(write: object, tmp_path: Path) -> None:
    folder = write(tmp_path / "m")  # type: ignore[operator]
    prompt = np.array([[5, 9, 40, 7]])
    with open_runner(folder) as runner:
        assert runner.runtime == runtime_for(folder) == "torch"
        found = greedy_tokens(runner, prompt, max_new_tokens=6)
    made = (
        load_checkpoint(folder)
        .generate(torch.from_numpy(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None)[0]
        .tolist()
    )
    assert found == (made[4:] if runner.start_token is None else made[1:])


def test_what_is_no_checkpoint_is_refused(finished: Path) -> None:
    with pytest.raises(NirvanaError, match=r"runtime torch runs a checkpoint folder, and .*onnx is none"):
        open_runner(finished / "onnx", runtime="torch")
    with pytest.raises(NirvanaError, match=r"onnxruntime-cpu runs an ONNX folder, and .*checkpoint is none"):
        open_runner(finished / "checkpoint", runtime="onnxruntime-cpu")


@pytest.mark.integration
def test_a_folder_is_verified_evaluated_and_measured_in_it(finished: Path) -> None:
    reports = compare_in(Run.open(finished), "torch", threads=1)
    assert set(reports) == {str(finished.parent / "model"), "checkpoint"}
    assert all(report.passed for report in reports.values())
    before = Run.open(finished).result("quality", dict[str, Any])["variants"]["pruned"]["perplexity"]
    measured = evaluate_folder(finished, Evaluation(), Place(runtime="torch", threads=1))
    assert measured["variants"]["pruned"]["perplexity"] == pytest.approx(before, rel=1e-4)
    workload = Workload(prompt_tokens=4, new_tokens=2, repeats=1, warmup=0, threads=1)
    benchmark = benchmark_folder(finished, workload, runtime="torch")
    assert [variant["path"] for variant in benchmark["variants"]][1] == "checkpoint"


def test_generate_takes_a_checkpoint(finished: Path) -> None:
    for path in (finished, finished / "checkpoint"):
        result = CliRunner().invoke(
            commands, ["generate", str(path), "--prompt", "Hi", "--max-new-tokens", "2", "--runtime", "torch"]
        )
        assert result.exit_code == 0 and "(torch)" in result.stderr, (result.output, result.exception)
