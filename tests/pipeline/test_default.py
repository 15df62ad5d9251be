"""What a user gets who names no preset, on tiny models: curves, selection inside the refit, a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from click.testing import CliRunner
from safetensors import safe_open

from nirvana_deploy import NirvanaError, load_checkpoint, prune_export
from nirvana_deploy.base.artifact import files_under
from nirvana_deploy.cli.main import commands
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.curves.curve import read_curves
from nirvana_deploy.prune.plan import pruned_shape
from nirvana_deploy.prune.plan_file import read_plan

OPTIONS: dict[str, Any] = {
    "sparsity": 0.3,
    "calib": "pydoc",
    "num_sequences": 8,
    "seq_len": 16,
    "round_to": 4,
    "heldout_sequences": 3,
    "heldout_len": 24,
}


def tiny_llama(folder: Path) -> Path:
    return write_tiny(folder, "llama-tied")


def tiny_t5(folder: Path) -> Path:
    return write_t5(folder, "flan-t5")


def stages_of(out: Path) -> dict[str, Any]:
    stages: dict[str, Any] = json.loads((out / "manifest.json").read_text())["stages"]
    return stages


@pytest.mark.integration
@pytest.mark.parametrize("write", [tiny_llama, tiny_t5])
def test_the_default_cuts_by_curves_and_resumes(write: Callable[[Path], Path], tmp_path: Path) -> None:
    dense, out = write(tmp_path / "model"), tmp_path / "out"
    prune_export(str(dense), out=out, until="checkpoint", **OPTIONS)
    first = stages_of(out)
    assert list(first) == ["calibrate", "curves", "plan", "reconstruct", "checkpoint"]
    assert set(first["curves"]["files"]) == {"curves.safetensors"}

    shape, plan = Checkpoint.open(dense).shape, read_plan(out / "plan.json")
    assert (plan.allocation, plan.saliency, plan.gamma) == ("curves", "refit", None)
    assert plan.reconstruct == {"ridge": "auto"}
    curves = read_curves(out / "curves.safetensors")
    lost = sum(
        curve.at(of - len(kept))
        for layer, groups, neurons in zip(plan.layers, curves.groups, curves.neurons, strict=True)
        for curve, of, kept in (
            (groups, layer.of_groups, layer.kept_groups),
            (neurons, layer.of_neurons, layer.kept_neurons),
        )
    )
    assert plan.curves is not None and plan.curves["predicted_kl"] == pytest.approx(lost) and lost > 0
    assert plan.budget.met_removed_share >= 0.3

    made = load_checkpoint(out / "checkpoint")
    assert Checkpoint.open(out / "checkpoint").shape.layers == pruned_shape(shape, plan).layers
    weights = dict(made.named_parameters())
    for file in files_under(out / "reconstruction"):
        with safe_open(file, framework="pt") as written:
            for name in written.keys():  # noqa: SIM118 (no mapping)
                assert torch.equal(weights[name], written.get_tensor(name))

    prune_export(str(dense), out=out, until="checkpoint", resume=True, **OPTIONS)
    assert stages_of(out) == first  # their seconds too: nothing was done again
    other = prune_export(str(dense), out=tmp_path / "other", until="checkpoint", **OPTIONS)
    for name in ("plan.json", "curves.safetensors", "checkpoint/model.safetensors"):
        assert (other.out / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sparsity": 0.0}, r"sparsity must be above 0 and at most 0\.\d+, got 0\.0"),
        ({"sparsity": 0.97}, r"sparsity must be above 0 and at most 0\.\d+, got 0\.97"),
        ({"num_sequences": 1, "seq_len": 64}, "Curves need at least 2 calibration windows"),
        ({"gamma": 1.0}, r"gamma 1\.0 divides the budget .* and so do the curves"),
        ({"gamma": 1.0, "allocation": "uniform"}, r"gamma 1\.0 divides the budget .* and so do the curves"),
        ({"reconstruct": False}, "'refit' chooses units inside the refit"),
        ({"allocation": "global"}, "'global' ranks units over all layers"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    model = tiny_llama(tmp_path / "model")
    with pytest.raises(NirvanaError, match=complaint):
        prune_export(str(model), out=tmp_path / "out", until="checkpoint", **{**OPTIONS, **change})
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
def test_a_plan_of_the_default_is_cut_again(tmp_path: Path) -> None:
    """By ``prune --plan``, which refits nothing and says so."""
    model = tiny_llama(tmp_path / "model")
    out = prune_export(str(model), out=tmp_path / "out", until="checkpoint", **OPTIONS).out
    command = ["prune", str(model), "--plan", str(out / "plan.json"), "--out", str(tmp_path / "again")]
    done = CliRunner().invoke(commands, command)
    assert done.exit_code == 0, done.output
    assert "a plan alone gives the cut alone" in done.stderr
    shapes = [Checkpoint.open(folder / "checkpoint").shape for folder in (out, tmp_path / "again")]
    assert shapes[0] == shapes[1]
    shown = CliRunner().invoke(commands, ["inspect", str(out)])
    assert "saliency refit, allocation curves, round_to 4" in shown.stdout
