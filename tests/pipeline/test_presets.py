"""Presets: they expand, typed options win, they win over a recipe's file; paper is what it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from builders.jobs import SHORT
from builders.plans import shape_of
from click.testing import CliRunner

from nirvana_deploy import prune_export
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.pipeline.job import all_fields, job_of
from nirvana_deploy.pipeline.presets import PRESETS, RECOVERIES, with_recovery
from nirvana_deploy.pipeline.recipe_file import read_recipe, write_recipe
from nirvana_deploy.prune.plan import default_gamma, make_plan
from nirvana_deploy.prune.plan_file import write_plan
from nirvana_deploy.prune.recipe import PRESETS as NAMES
from nirvana_deploy.prune.scores_file import read_scores
from nirvana_deploy.recover.recipe import RECOVERIES as RECOVERY_NAMES
from nirvana_deploy.recover.recipe import Recovery, weights_of

DEFAULTS = {field.name: field.default for field in all_fields() if not field.required}


def test_presets_are_those_of_the_option_and_set_options() -> None:
    assert tuple(PRESETS) == NAMES
    names = {field.name for field in all_fields()}
    for name, options in PRESETS.items():
        assert set(options) <= names - {"preset", "sparsity"}, name
        for key, value in options.items():  # what a preset says is allowed
            assert job_of("m", {"sparsity": 0.1, key: value})


@pytest.mark.parametrize("preset", NAMES)
def test_a_preset_sets_its_options_and_no_others(preset: str) -> None:
    found = job_of("m", {"sparsity": 0.1, "preset": preset}).options()
    expected = {**DEFAULTS, **PRESETS[preset], "sparsity": 0.1, "preset": preset}
    assert found == job_of("m", expected).options()
    for key, value in PRESETS[preset].items():
        assert found[key] == value


def test_paper_recovers_as_the_authors_do() -> None:
    """NIRVANA's settings: LoRA of rank 8 by the next token, 16 windows, 50 steps of warm-up."""
    assert tuple(RECOVERIES) == RECOVERY_NAMES
    found = Recovery(**RECOVERIES["paper"])
    assert (found.recover_method, found.lora_rank, found.recover_batch) == ("lora", 8, 16)
    assert weights_of(found) == (0.0, 1.0, 0.0) and found.recover_warm_up == 50
    assert job_of("m", {"sparsity": 0.1, "preset": "paper"}).recovery == Recovery()  # a cut alone


def test_a_preset_for_a_model_that_is_cut_says_how_it_is_recovered_alone() -> None:
    options = with_recovery({"recover": "1M", "preset": "paper", "learning_rate": 3e-4})
    assert options == RECOVERIES["paper"] | {"recover": "1M", "learning_rate": 3e-4}
    assert with_recovery({"recover": "1M"}) == {"recover": "1M"}
    with pytest.raises(NirvanaError, match=r"Unknown preset of recovery 'fast'.*Known: paper"):
        with_recovery({"preset": "fast"})


def test_the_default_is_the_best() -> None:
    assert job_of("m", {"sparsity": 0.1}) == job_of("m", {"sparsity": 0.1, "preset": "best"})


def test_typed_options_win() -> None:
    typed = {"sparsity": 0.1, "preset": "paper", "saliency": "taylor", "num_sequences": 7}
    found = job_of("m", typed)
    assert found.pruning.saliency == "taylor" and found.calibration.num_sequences == 7
    assert found.pruning.allocation == "global" and not found.pruning.reconstruct


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(NirvanaError, match=r"preset = 'papr' is not allowed.*best.*paper.*fast"):
        job_of("m", {"sparsity": 0.1, "preset": "papr"})


def test_a_preset_wins_over_a_recipe_and_options_over_both(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    written = {"sparsity": 0.1, "preset": "fast", "ridge": 0.5, "seq_len": 64, "heldout_len": 48}
    write_recipe(job_of("m", written), file)
    assert job_of("m", {}, base=read_recipe(file)) == job_of("m", written)

    def shown(*options: str) -> dict[str, Any]:
        done = CliRunner().invoke(commands, ["recipe", "--recipe", str(file), "--json", *options])
        assert done.exit_code == 0, done.output
        sections: dict[str, Any] = json.loads(done.stdout)
        return {**sections["pruning"], **sections["calibration"]}

    paper = shown("--preset", "paper")
    assert paper == paper | PRESETS["paper"] | {"preset": "paper"}
    assert paper["heldout_len"] == 48  # of which presets say nothing
    best = shown("--preset", "best")
    for key in PRESETS["paper"]:
        assert best[key] == DEFAULTS[key]
    typed = shown("--preset", "paper", "--saliency", "taylor")
    assert typed["saliency"] == "taylor" and typed["allocation"] == "global"
    assert shown()["ridge"] == 0.5


@pytest.mark.parametrize("gamma", [None, 1.0])
def test_paper_gives_the_bytes_of_the_plan_of_its_scores(
    tiny_llama: Path, tmp_path: Path, gamma: float | None
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"round_to": 4, "num_sequences": 4, "seq_len": 16, **SHORT, "preset": "paper"}
    options |= {} if gamma is None else {"gamma": gamma}
    done = prune_export(str(tiny_llama), out=out, until="checkpoint", sparsity=0.3, **options)
    assert list(done.manifest["stages"]) == ["calibrate", "score", "plan", "checkpoint"]
    record = done.manifest["stages"]["calibrate"]["result"]
    keys = ("source", "num_sequences", "seq_len", "text_sha256", "seed", "draw")
    plan = make_plan(
        shape_of(tiny_llama),
        read_scores(out / "scores.safetensors"),
        sparsity=0.3,
        gamma=default_gamma(shape_of(tiny_llama)) if gamma is None else gamma,
        allocation="global",
        round_to=4,
        saliency="nirvana",
        seed=0,
        model_name=done.plan.model["name"],
        calibration={key: record[key] for key in keys},
    )
    write_plan(plan, tmp_path / "plan.json")
    assert (out / "plan.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    assert record["source"] == "pydoc"


def test_paper_keeps_the_units_that_it_kept_when_it_was_the_default(
    tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    """As the version before there were presets chose them; whole numbers, so the same on every machine."""
    sizes: dict[str, Any] = {**SHORT, "calib": str(text), "round_to": 4, "num_sequences": 4, "seq_len": 16}
    done = prune_export(str(tiny_llama), out=tmp_path / "out", until="checkpoint", sparsity=0.3, **sizes)
    layers = json.loads((done.out / "plan.json").read_text(encoding="utf-8"))["layers"]
    kept = [[layer["kept_groups"], layer["kept_neurons"]] for layer in layers]
    assert [(groups, len(neurons)) for groups, neurons in kept] == [
        ([0, 1, 2], 40),
        ([0, 1, 2], 36),
        ([1], 16),
    ]
    found = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    assert found == "2c2c73f9c0b43a7ab903e2c88a0c3e5c407ca2cdd0dd89f8618444c199023e48"
