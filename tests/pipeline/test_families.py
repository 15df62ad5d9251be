"""Every further family down the arrow, on a tiny random model: transformers is what it is compared with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.plans import logits_of, plan_for
from builders.tiny import MORE_KINDS, VOCABULARY, write_tiny
from numpy.typing import NDArray

from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.curves.budget import Budget, allocate
from nirvana_deploy.prune.curves.measure_curves import measure_curves
from nirvana_deploy.prune.refit.reconstruct import reconstruct_layers
from nirvana_deploy.prune.refit.selection import select_and_refit
from nirvana_deploy.prune.slicing import MaskedWeights
from nirvana_deploy.prune.streaming.model import StreamedModel
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.torch import open_checkpoint
from nirvana_deploy.verify.against_torch import logits_checks, verify_onnx
from nirvana_deploy.verify.tolerance import RELATIVE_TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load
WINDOWS = np.random.default_rng(3).integers(3, VOCABULARY, size=(8, 20))


@pytest.fixture(scope="module", params=list(MORE_KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dense(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("families") / kind, kind)


@pytest.fixture(scope="module")
def pruned(dense: Path) -> Path:
    """Layers differ in heads, where they may, and in widths."""
    slice_checkpoint(Checkpoint.open(dense), plan_for(dense), dense.with_name("pruned"))
    return dense.with_name("pruned")


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_sliced_equals_masked_and_the_streamed_model_that_of_transformers(
    dense: Path, tmp_path: Path, allocation: str
) -> None:
    checkpoint, windows = Checkpoint.open(dense), torch.from_numpy(WINDOWS)
    expected = logits_of(dense, WINDOWS)
    torch.testing.assert_close(StreamedModel(checkpoint).logits(windows), expected, rtol=1e-4, atol=1e-4)
    plan = plan_for(dense, allocation=allocation)
    slice_checkpoint(checkpoint, plan, tmp_path / "pruned")
    masked = StreamedModel(checkpoint, MaskedWeights(checkpoint.weights, checkpoint.shape, plan))
    found = logits_of(tmp_path / "pruned", WINDOWS)
    torch.testing.assert_close(found, masked.logits(windows), rtol=1e-4, atol=1e-4)
    assert (found - expected).abs().max() > 0.1
    again = StreamedModel(Checkpoint.open(tmp_path / "pruned")).logits(windows)
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)


def test_curves_choose_and_the_refit_is_closer_to_the_dense_model(dense: Path, tmp_path: Path) -> None:
    checkpoint, expected = Checkpoint.open(dense), logits_of(dense, WINDOWS)
    plan = plan_for(dense)
    slice_checkpoint(checkpoint, plan, tmp_path / "plain")
    reconstruct_layers(checkpoint, plan, WINDOWS, tmp_path / "refit")
    slice_checkpoint(checkpoint, plan, tmp_path / "refitted", reconstruction=tmp_path / "refit")
    far, near = ((logits_of(tmp_path / one, WINDOWS) - expected).norm() for one in ("plain", "refitted"))
    assert near < 0.9 * far
    kept = allocate(checkpoint.shape, measure_curves(checkpoint, WINDOWS), Budget(sparsity=0.3, round_to=4))
    chosen = select_and_refit(checkpoint, kept.counts, WINDOWS, tmp_path / "chosen")
    assert [(len(g), len(n)) for g, n in zip(chosen.groups, chosen.neurons, strict=True)] == [
        (one.groups, one.neurons) for one in kept.counts
    ]


def test_every_runtime_computes_what_transformers_does(dense: Path, pruned: Path, tmp_path: Path) -> None:
    """Portable in ONNX Runtime and onnxruntime-genai, the other flavors in ONNX Runtime."""
    for folder in (dense, pruned):
        onnx = onnx_from_checkpoint(Checkpoint.open(folder), tmp_path / folder.name).path
        report = verify_onnx(folder, onnx, new_tokens=12, threads=1)
        assert report.passed and report.greedy[1].not_run is None, report
    reference = open_checkpoint(pruned)
    for flavor, options in (("gqa", {}), ("static-cache", {"cache_tokens": 64})):
        onnx = onnx_from_checkpoint(Checkpoint.open(pruned), tmp_path / flavor, flavor=flavor, **options).path  # type: ignore[arg-type]
        checks = logits_checks(reference, OrtDecoder(onnx, threads=1), RELATIVE_TOLERANCE)
        assert len(checks) == 5 and all(check.passed for check in checks), (flavor, checks)


@pytest.mark.parametrize("kind", ["gemma3", "granite"], scope="module")  # what is rounded besides weights
def test_half_precision_is_verified(pruned: Path, tmp_path: Path) -> None:
    onnx = onnx_from_checkpoint(Checkpoint.open(pruned), tmp_path / "onnx", dtype="fp16").path
    report = verify_onnx(pruned, onnx, new_tokens=4, threads=1)
    assert report.passed, report


def test_all_linears_run_in_integers(pruned: Path, tmp_path: Path) -> None:
    onnx = onnx_from_checkpoint(Checkpoint.open(pruned), tmp_path / "onnx").path
    wanted = log_softmax(OrtDecoder(onnx, threads=1).prefill(WINDOWS)[0])
    for scheme in ("int8", "w4"):
        done = quantize_onnx(onnx, tmp_path / scheme, Quantization(scheme=scheme), calibration=WINDOWS)
        assert done.coverage.found == done.coverage.promised >= 21, done.coverage
        found = log_softmax(OrtDecoder(tmp_path / scheme, threads=1).prefill(WINDOWS)[0])
        assert (np.exp(wanted) * (wanted - found)).sum(-1).mean() < 0.3


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(torch.tensor(logits, dtype=torch.float64).log_softmax(-1))


@pytest.mark.consumer(
    "transformers",
    artifact="HF folders, global: tiny Gemma 3",
    proof="a fresh process loads them with the module beside the weights, and their logits are the same",
    package="transformers",
)
def test_a_fresh_process_loads_them_with_transformers_alone(tmp_path: Path) -> None:
    for kind in MORE_KINDS:
        dense = write_tiny(tmp_path / "dense" / kind, kind)
        slice_checkpoint(Checkpoint.open(dense), plan_for(dense), tmp_path / kind)
    script = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
tokens, found = torch.tensor(json.loads(sys.argv[1])), {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        found[folder] = model(tokens).logits[:, -1].tolist()
assert "nirvana_deploy" not in sys.modules
print(json.dumps(found))
"""
    folders = [str(tmp_path / kind) for kind in MORE_KINDS]
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(WINDOWS[:2].tolist()), *folders],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for folder, logits in json.loads(result.stdout.splitlines()[-1]).items():
        expected = logits_of(Path(folder), WINDOWS[:2])[:, -1]
        np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
