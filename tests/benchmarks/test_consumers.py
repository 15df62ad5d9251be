"""The table "where does it run": a row for what ran and passed, a reason for what did not.

And programs that have no place of their own: optimum, transformers.js and lm-evaluation-harness.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import optimum_onnx, transformers_js
from builders.choices import TASK, harness_scores, harness_version, write_counting
from builders.plans import plan_for
from builders.scripts import ROOT, script
from builders.tiny import KINDS, write_tiny

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_checkpoint
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.prune.checkpoint import slice_checkpoint

NEW_TOKENS = 12
QUESTIONS = 200
PROMPTS = np.random.default_rng(6).integers(3, 272, size=(2, 9))
MASK = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])


def found(outcome: str, test: str = "a", artifact: str = "GGUF", **more: str) -> dict[str, Any]:
    return {
        "consumer": "llama.cpp",
        "artifact": artifact,
        "proof": "equal tokens",
        "version": "1",
        "outcome": outcome,
        "test": test,
        **more,
    }


def test_only_what_passed_is_claimed() -> None:
    consumers = script("consumers")
    rows = consumers.rows_of([found("passed"), found("passed", "b")])
    record = {"rows": rows, "not_run": [{"consumer": "vLLM", "artifact": "HF folder", "reason": "no wheel"}]}
    assert consumers.section(record).splitlines()[2:] == [
        "| llama.cpp 1 | GGUF | equal tokens |",
        "| vLLM | HF folder | not run: no wheel |",
    ]


@pytest.mark.parametrize(("outcome", "cell"), [("failed", "FAILED"), ("skipped", "not run: no node here")])
def test_one_test_that_does_not_pass_takes_the_row_away(outcome: str, cell: str) -> None:
    consumers = script("consumers")
    worse = found(outcome, "b", reason="no node here")
    rows = consumers.rows_of([found("passed"), worse, found("passed", "c")])
    assert rows[0]["tests"] == ["a", "b", "c"]
    table = consumers.section({"rows": rows, "not_run": []})
    assert "equal tokens" not in table and f"| GGUF | {cell} |" in table


def test_a_record_is_made_in_pieces(tmp_path: Path) -> None:
    record, codes = tmp_path / "record.json", []
    command = [sys.executable, str(ROOT / "benchmarks" / "consumers.py"), "--json", str(record)]
    for piece in ([found("passed"), found("passed", "b", artifact="ONNX")], [found("failed", "b")]):
        (tmp_path / "piece.json").write_text(json.dumps(piece))
        done = subprocess.run([*command, "--found", str(tmp_path / "piece.json")], check=False)
        codes.append(done.returncode)
    rows = json.loads(record.read_text())["rows"]
    assert codes == [0, 1]  # what ran again replaces what it said before; the rest stays
    assert {row["tests"][0]: row["outcome"] for row in rows} == {"a": "passed", "b": "failed"}


def test_every_test_that_the_record_cites_is_there_and_marked() -> None:
    record = json.loads((ROOT / "benchmarks/results/consumers.json").read_text())
    for row in record["rows"]:
        for test in row["tests"]:
            file, _, name = test.partition("::")
            marked = consumers_in(ROOT / file)[name.partition("[")[0]]
            assert row["consumer"] in marked, test


def consumers_in(file: Path) -> dict[str, set[str]]:
    """Test in a file -> the programs that its marks name."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            marks = [one for one in node.decorator_list if isinstance(one, ast.Call)]
            found[node.name] = {
                str(ast.literal_eval(mark.args[0]))
                for mark in marks
                if ast.unparse(mark.func) == "pytest.mark.consumer"
            }
    return found


def test_config_lies_beside_a_graph_that_its_readers_can_run(tiny_llama: Path, tmp_path: Path) -> None:
    """optimum and transformers.js read one shape for all layers there."""
    for allocation in ("dense", "uniform", "global"):
        checkpoint = tiny_llama
        if allocation != "dense":
            checkpoint = tmp_path / allocation
            slice_checkpoint(
                Checkpoint.open(tiny_llama), plan_for(tiny_llama, allocation=allocation), checkpoint
            )
        beside = (
            onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / f"{allocation}-onnx").path
            / "config.json"
        )
        assert beside.is_file() == (allocation != "global")
        if beside.is_file():
            assert config_json(beside.parent) == config_json(checkpoint)
    with pytest.raises(NirvanaError, match=r"no \*\.safetensors.*\n.*that it was exported from"):
        resolve_model(str(tmp_path / "uniform-onnx"))


def jobs_for(
    folder: Path, kinds: Iterable[str], allocations: Sequence[str]
) -> tuple[list[dict[str, Any]], list[list[list[int]]]]:
    """One job for each of ``kinds`` of tiny decoders and ``allocations``, and what torch answers."""
    jobs, wanted = [], []
    for kind in kinds:
        dense = write_tiny(folder / kind, kind)
        for allocation in allocations:
            checkpoint = dense
            if allocation != "dense":
                checkpoint = folder / f"{kind}-{allocation}"
                slice_checkpoint(Checkpoint.open(dense), plan_for(dense, allocation=allocation), checkpoint)
            out = onnx_from_checkpoint(Checkpoint.open(checkpoint), folder / f"{kind}-{allocation}-onnx").path
            order = {"folder": str(out), "kind": "causal", "prompts": PROMPTS.tolist(), "mask": MASK.tolist()}
            jobs.append({**order, "new_tokens": NEW_TOKENS})
            answer = load_checkpoint(checkpoint).generate(
                torch.from_numpy(PROMPTS),
                attention_mask=torch.from_numpy(MASK),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            wanted.append(answer[:, PROMPTS.shape[1] :].tolist())
    return jobs, wanted


@pytest.mark.slow
@pytest.mark.consumer(
    "optimum (ORTModelForCausalLM)",
    artifact="ONNX folder of tiny Llama, Mistral and Qwen2, dense",
    proof=f"{NEW_TOKENS} greedy tokens of a padded batch of each equal transformers'",
    version=optimum_onnx.VERSION,
)
def test_optimum_generates_the_same(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    assert pytestconfig.cache is not None
    python = optimum_onnx.installed_optimum(pytestconfig.cache)
    # it takes hidden_size / num_attention_heads for head_dim, whatever config.json says
    kinds = [kind for kind in KINDS if kind != "qwen3"]
    jobs, wanted = jobs_for(tmp_path, kinds, ["dense"])
    assert optimum_onnx.run_optimum(python, jobs, tmp_path) == wanted


@pytest.mark.consumer(
    "transformers.js",
    artifact="ONNX folder of tiny Llama, Mistral, Qwen2 and Qwen3, dense and uniform",
    proof=f"{NEW_TOKENS} greedy tokens of a padded batch of each equal transformers'",
    version=transformers_js.VERSION,
)
def test_transformers_js_generates_the_same(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    assert pytestconfig.cache is not None
    installed = transformers_js.installed_transformers_js(pytestconfig.cache)
    jobs, wanted = jobs_for(tmp_path, KINDS, ["dense", "uniform"])
    answers = transformers_js.run_transformers_js(installed, jobs, tmp_path)
    assert [[row[PROMPTS.shape[1] :] for row in answer] for answer in answers] == wanted


@pytest.mark.slow
@pytest.mark.consumer(
    "lm-evaluation-harness",
    artifact="ONNX folder and HF folder of SmolLM2, global",
    proof=f"accuracies on {QUESTIONS} local multiple-choice items within 0.5 %",
    version=harness_version(),
)
def test_the_harness_finds_the_same_of_smollm2(tmp_path: Path) -> None:
    if harness_version() == "not installed":
        pytest.skip("needs lm-eval: pip install 'nirvana-deploy[eval]'")
    out, words = (
        tmp_path / "out",
        "prune-export smollm2 --preset paper --sparsity 0.1 --saliency taylor --num-sequences 4",
    )
    command = [sys.executable, "-m", "nirvana_deploy", *words.split(), "--no-baseline", "--no-benchmark"]
    made = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    write_counting(tmp_path / "tasks", questions=QUESTIONS)
    variants = harness_scores(out, tmp_path, "--tasks-on", "both")
    on_onnx, on_checkpoint = variants["pruned"][TASK], variants["pruned checkpoint"][TASK]
    assert on_onnx.keys() == on_checkpoint.keys() >= {"acc,none", "acc_norm,none"}
    for metric, value in on_onnx.items():
        assert abs(value - on_checkpoint[metric]) <= 0.005, (metric, on_onnx, on_checkpoint)
    assert 0.3 < on_onnx["acc,none"] < 1  # it counts better than by guessing one of four
