"""--curves: another sparsity from curves of an earlier run; those of other models and windows are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.jobs import SHORT
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.prune_export import prune_export

TEXT: dict[str, Any] = {"calib": "pydoc", "num_sequences": 8, "seq_len": 24}
OTHER: dict[str, Any] = {**SHORT, "preset": "best", "round_to": 4}


def cut(model: Path, out: Path, **options: Any) -> Path:
    prune_export(str(model), out=out, until="checkpoint", **{**OTHER, "sparsity": 0.3, **options})
    return out


@pytest.fixture(scope="module")
def first(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(tiny_llama, tmp_path_factory.mktemp("curves") / "first", **TEXT)


@pytest.mark.parametrize("name", ["", "curves.safetensors"])
def test_another_sparsity_is_what_it_would_be_with_curves_of_its_own(
    first: Path, tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    with_its_own = cut(tiny_llama, tmp_path / "own", sparsity=0.2, **TEXT)
    given = cut(tiny_llama, tmp_path / "given", sparsity=0.2, curves=first / name)
    for file in ("plan.json", "curves.safetensors", "calibration.safetensors", "checkpoint/config.json"):
        assert (given / file).read_bytes() == (with_its_own / file).read_bytes(), file
    options = Run.open(given).manifest["options"]
    assert {name: options[name] for name in TEXT} == TEXT


def test_curves_outside_their_folder_serve_the_same_windows_alone(
    first: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "elsewhere.safetensors"
    shutil.copy(first / "curves.safetensors", file)
    found = Run.open(cut(tiny_llama, tmp_path / "out", curves=file, min_neurons=8, **TEXT))
    assert found.manifest["stages"]["curves"]["result"]["taken_from"] == str(file)
    with pytest.raises(NirvanaError, match="measured on other calibration windows") as refused:
        cut(tiny_llama, tmp_path / "other", curves=file, **{**TEXT, "seed": 1})
    assert refused.value.hint == "Calibrate as the run that measured them did, or leave --curves out."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calib": "code"}, "--calib code draws other windows .*, with --calib pydoc"),
        ({"seed": 1}, "--seed 1 draws other windows"),
        ({"num_sequences": 4}, "--num-sequences 4 draws other windows .* --num-sequences 8"),
        ({"saliency": "nirvana", "allocation": "global"}, "and --allocation global reads none"),
        ({"saliency": "nirvana,taylor"}, "chooses among several candidates"),
        ({"curves": "nowhere"}, r"--curves nowhere: nowhere does not exist"),
    ],
)
def test_what_they_do_not_serve_is_refused_before_any_work(
    first: Path, tiny_llama: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NirvanaError, match=message):
        cut(tiny_llama, tmp_path / "out", **{"curves": first, **options})
    assert not (tmp_path / "out").exists()


def test_a_fine_tune_of_the_same_shape_is_another_model(
    first: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_llama, tuned)
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    for curves in (first, first / "curves.safetensors"):
        with pytest.raises(NirvanaError, match="a model of the same shape and other weights"):
            cut(tuned, tmp_path / "out", curves=curves)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_chose_among_several_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    several = {**TEXT, "calib": "pydoc,code", "selection_sequences": 4, "selection_len": 16}
    chose = cut(tiny_llama, tmp_path / "chose", **several)
    with pytest.raises(NirvanaError, match="another stage chose among several"):
        cut(tiny_llama, tmp_path / "out", curves=chose)


def test_the_command_line_takes_them_and_leaves_them_out_of_the_forecast(
    first: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    typed = ["prune", str(tiny_llama), "--sparsity", "0.2", "--round-to", "4"]
    typed += ["--curves", str(first), "--out", str(tmp_path / "out")]
    runner = CliRunner()
    told = runner.invoke(commands, [*typed, "--dry-run", "--json"], catch_exceptions=False)
    stages = {one["name"]: one["finished"] for one in json.loads(told.stdout)["stages"]}
    assert stages["curves"] and not stages["reconstruct"]
    done = runner.invoke(commands, typed, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "curves: taken from" in done.output
    plan = runner.invoke(commands, [*typed, "--plan", "plan.json"])
    assert plan.exit_code == 2 and "leave out --curves" in plan.output
    budget = ["prune-export", str(tiny_llama), "--max-kl", "0.2", "--curves", str(first)]
    assert "leave out --curves" in runner.invoke(commands, budget).output
