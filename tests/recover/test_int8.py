"""Trained for int8: linears compute what integers compute, and what is deployed is what was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders.jobs import SHORT
from builders.recovering import Cut, kl_of
from builders.tiny import write_tiny
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.layout import RECOVERY
from nirvana_deploy.pipeline.folder import quantize_folder
from nirvana_deploy.pipeline.prune_export import prune_export
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.graph.layer_runner import Runner
from nirvana_deploy.quantize.int8.decide import without_head
from nirvana_deploy.quantize.int8.rewrite import quantize_weight
from nirvana_deploy.quantize.int8.spec import Int8Spec, read_record
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.recover import before
from nirvana_deploy.recover.learning import int8_decision
from nirvana_deploy.recover.learning.int8_decision import TrainedLinear, read_decision
from nirvana_deploy.recover.learning.int8_training import compute_in_int8, rounded_weight
from nirvana_deploy.recover.recipe import Recovery

KEPT = {"recover_for": "int8", "learning_rate": 4e-4}


@pytest.fixture
def one_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing it is proved where int8 is."""
    monkeypatch.setattr(int8_decision, "choose_alpha", lambda *_, **__: (0.5, ()))


def test_a_linear_computes_what_integers_compute() -> None:
    random = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 4))
    x = torch.randn(5, 24, generator=random)
    x[0, 3] = 40.0  # an outlier
    x[1, 7] = -9.0  # clipped
    factors = np.exp2(np.arange(24) % 3 - 1).astype(np.float32)
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach()
    compute_in_int8(model, {"0": TrainedLinear(factors, bound=4.0, outliers=(3,))})
    found = model[0](x)
    smoothed = (weight.numpy() * factors).T
    smoothed[3] = 0.0
    codes, scales = quantize_weight(smoothed.copy())
    steps = np.clip(np.rint(x.numpy() / factors / np.float32(4 / 127)), -128, 127)
    expected = steps @ codes * np.float32(4 / 127) * scales + x[:, 3:4].numpy() @ weight[:, 3:4].numpy().T
    np.testing.assert_allclose((found - bias).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    gradient = model[0].parametrizations.weight.original.grad
    assert gradient is not None and (gradient != 0).all()
    assert not hasattr(model[1], "parametrizations")


def test_rounded_once_more_nothing_changes() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(3))
    factors = torch.exp2(torch.arange(40) % 5 - 2.0)
    once = rounded_weight(weight, factors, [1, 30])
    torch.testing.assert_close(rounded_weight(once, factors, [1, 30]), once, rtol=1e-6, atol=0)
    assert len(torch.unique((once * factors)[5, 2:30])) < 28 and torch.equal(once[:, 30], weight[:, 30])


def codes_in(folder: Path) -> dict[str, NDArray[np.int8]]:
    """Integers [K, N] of a quantized folder, by linear."""
    model = onnx.load(folder / "model.onnx")
    end = ".weight_quantized"
    tensors = (one for one in model.graph.initializer if one.name.endswith(end))
    return {one.name.removesuffix(end): numpy_helper.to_array(one) for one in tensors}


@pytest.mark.usefixtures("one_alpha")
@pytest.mark.parametrize("kind", ["llama-tied", pytest.param("phi3", marks=pytest.mark.slow)])
def test_what_is_deployed_is_what_was_trained(tmp_path: Path, text: Path, kind: str) -> None:
    cut = Cut(tmp_path, kind, text)
    done = cut.recover(**KEPT)
    assert done.course.kept_step > 0
    trained = tmp_path / "recovery"
    slice_checkpoint(cut.dense, cut.plan, tmp_path / "after", recovery=trained)
    after = Checkpoint.open(tmp_path / "after")
    onnx_from_checkpoint(after, tmp_path / "onnx")
    spec = without_head(Int8Spec.from_json(read_record(trained)["int8"]))
    recipe = Quantization(scheme="int8")
    quantize_onnx(tmp_path / "onnx", tmp_path / "int8", recipe, decided={"int8": spec.to_json()})
    found = codes_in(tmp_path / "int8")
    assert len(found) > 8
    for name, codes in found.items():
        weight = after.weights.load(f"{name}.weight").float()
        [how] = read_decision(trained, {name: weight.shape[1]}).values()
        smoothed = (weight.numpy() * how.factors).T
        smoothed[list(how.outliers)] = 0.0
        scale = np.abs(smoothed).max(0) / 127
        np.testing.assert_allclose(codes * scale, smoothed, atol=1e-5 * np.abs(smoothed).max())
    watch = done.text.watch
    best = min(point.kl for point in done.course.curve)
    assert kl_of_onnx(tmp_path / "int8", cut.dense, watch) == pytest.approx(best, rel=0.02)
    # which is not what the same weights compute in float
    assert kl_of(after, cut.dense, watch) != pytest.approx(best, rel=1e-4)


def kl_of_onnx(folder: Path, dense: Checkpoint, windows: NDArray[np.int64]) -> float:
    with torch.no_grad():
        log_p = dense.load()(torch.from_numpy(windows)).logits.double().log_softmax(-1)
    log_q = torch.stack([torch.from_numpy(one.copy()) for one in Runner(folder).logits(windows)]).double()
    return float((log_p.exp() * (log_p - log_q.log_softmax(-1))).sum(-1).mean())


@pytest.mark.usefixtures("one_alpha")
def test_a_run_deploys_the_decision_that_it_trained_for(tmp_path: Path, text: Path) -> None:
    options = {**SHORT, "num_sequences": 8, "seq_len": 24, "run_benchmark": False, "calib": str(text)}
    prune_export(
        str(write_tiny(tmp_path / "llama", "llama-tied")),
        out=tmp_path / "out",
        sparsity=0.3,
        recover="400",
        recover_text=str(text),
        recover_for="int8",
        quantize=("int8",),
        **options,
    )
    decided = read_record(tmp_path / "out" / RECOVERY)["int8"]
    deployed = read_record(tmp_path / "out/onnx-int8")["int8"]
    head = {"lm_head": decided["linears"]["lm_head"]}
    assert deployed["linears"] | head == decided["linears"]
    assert deployed["smoothing"] == {k: v for k, v in decided["smoothing"].items() if k != "lm_head"}
    assert "lm_head" in deployed["kept_float"]
    anew = quantize_folder(tmp_path / "out", Quantization(scheme="int8", smooth="none"))
    assert not anew["int8"]["smoothing"]


def test_what_cannot_be_trained_for_int8_is_said(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Checkpoint.open(tiny_llama)
    recipe = Recovery(recover="1k", recover_text="pydoc", recover_for="int8", recover_method="layers")
    with pytest.raises(NirvanaError, match=r"whole cut.*one block of it in memory.\n.*distill"):
        before.require_recovery(recipe, dense, seq_len=24)
    find = before.importlib.util.find_spec  # type: ignore[attr-defined]
    monkeypatch.setattr(
        before.importlib.util,  # type: ignore[attr-defined]
        "find_spec",
        lambda name: None if name == "onnxruntime" else find(name),
    )
    recipe = Recovery(recover="1k", recover_text="pydoc", recover_for="int8")
    with pytest.raises(MissingExtraError, match=r"--recover-for int8 needs.*\n.*pip install .*\[cpu\]"):
        before.require_recovery(recipe, dense, seq_len=24)


def test_widths_without_a_decision_stay_float(tmp_path: Path, text: Path) -> None:
    """Of the written decision, by module."""
    (tmp_path / "quantization.json").write_text(
        '{"schema": 1, "scheme": "int8", "int8": {"alpha": 0.5, "ranges": "minmax",'
        ' "kept_float": {}, "smoothing": {},'
        ' "linears": {"a.qkv.q": {"bound": 2.0, "outliers": []}}}, "factors": {"a.qkv.q": "mnl"}}'
    )
    found = read_decision(tmp_path, {"a.qkv": 3, "a.q": 3})
    assert list(found) == ["a.qkv"] and found["a.qkv"].factors.tolist() == [1, 2, 0.5]
