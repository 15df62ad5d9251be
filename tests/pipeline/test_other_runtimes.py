"""An output folder in another runtime than ONNX Runtime: verified, measured, judged, and told of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders.extras import needs
from builders.jobs import TINY_JOB
from builders.tiny import write_tiny

from nirvana_deploy import prune_export
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.pipeline.folder import benchmark_folder, evaluate_folder
from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.verify.folder import verify_folder

needs("openvino")
pytestmark = pytest.mark.integration

ELSEWHERE, HERE = "openvino-cpu", "onnxruntime-cpu"
SHORT = Workload(prompt_tokens=8, new_tokens=4, repeats=2, threads=1)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    model = str(write_tiny(folder / "model", "llama-tied"))
    prune_export(model, out=folder / "out", **TINY_JOB)
    return folder / "out"


def test_verify_compares_it_with_onnx_runtime(out: Path) -> None:
    check = verify_folder(out, threads=1, runtime=ELSEWHERE)
    assert check.passed
    assert len(check.compared) == 2
    for report in check.compared.values():
        [greedy] = report.greedy
        assert greedy.runtime == ELSEWHERE and greedy.passed and greedy.equal_prompts + greedy.ties > 0


def test_evaluate_finds_the_quality_that_onnx_runtime_finds(out: Path) -> None:
    found = {
        runtime: evaluate_folder(out, place=Place(runtime=runtime, threads=1))["variants"]
        for runtime in (HERE, ELSEWHERE)
    }
    for name in ("dense", "pruned"):
        here, elsewhere = (found[runtime][name] for runtime in (HERE, ELSEWHERE))
        assert elsewhere["perplexity"] == pytest.approx(here["perplexity"], rel=1e-4)
        assert elsewhere["kl_vs_dense"] == pytest.approx(here["kl_vs_dense"], abs=1e-4)


def test_a_benchmark_keeps_what_was_found_in_the_other_runtime(out: Path) -> None:
    def runtimes() -> dict[str, list[str]]:
        record = json.loads((out / "benchmark.json").read_text())
        assert len({one["runtime"] for one in record["variants"]}) == 1
        return {
            record["variants"][0]["runtime"]: [one["name"] for one in record["variants"]],
            **{one["runtime"]: list(one["variants"]) for one in record.get("other_runtimes", [])},
        }

    benchmark_folder(out, SHORT, runtime=ELSEWHERE)
    both = {ELSEWHERE: ["dense", "pruned"], HERE: ["dense", "pruned"]}
    assert runtimes() == both and next(iter(runtimes())) == ELSEWHERE
    assert f"Times {ELSEWHERE}" in (out / "report.md").read_text()
    benchmark_folder(out, SHORT)
    assert runtimes() == both and next(iter(runtimes())) == HERE
    another = Workload(prompt_tokens=9, new_tokens=4, repeats=2, threads=1)
    benchmark_folder(out, another)  # whose times do not compare
    assert runtimes() == {HERE: ["dense", "pruned"]}
    assert "In other runtimes" not in (out / "report.md").read_text()
