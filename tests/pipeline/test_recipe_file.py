"""recipe.toml: written, read back, changed, refused; and the command that shows it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from builders.jobs import SHORT, write_short_recipe
from builders.tiny import write_tiny
from click.testing import CliRunner

from nirvana_deploy import prune_export
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.pipeline.before import as_recorded
from nirvana_deploy.pipeline.job import Job, all_fields, job_of
from nirvana_deploy.pipeline.recipe_file import read_recipe, recipe_toml, write_recipe


@pytest.fixture
def job() -> Job:
    options = {"sparsity": 0.4, "preset": "paper", "eval_text": "a text.txt", "gamma": 2}
    return job_of("smollm2", {**options, "quantize": ["int8"]})


def test_a_recipe_is_read_as_it_was_written(job: Job, tmp_path: Path) -> None:
    write_recipe(job, tmp_path / "r.toml")
    assert read_recipe(tmp_path / "r.toml") == job
    assert job.quantization.quantize == ("int8",) and job.pruning.gamma == 2.0


def test_a_text_for_quality_may_be_the_only_one_or_one_of_several(tmp_path: Path) -> None:
    for written, texts in (("'a.txt'", ("a.txt",)), ("['a.txt', 'b, c.txt']", ("a.txt", "b, c.txt"))):
        (tmp_path / "r.toml").write_text(
            f"schema = 1\nmodel = 'm'\n[pruning]\nsparsity = 0.4\n[calibration]\neval_text = {written}\n"
        )
        job = read_recipe(tmp_path / "r.toml")
        assert job.calibration.eval_text == tuple(map(Path, texts))
        assert job_of("m", {"sparsity": 0.4, "eval_text": texts}) == job
        recorded = as_recorded(job.calibration.eval_text)  # one as manifests always held it
        assert recorded == (texts[0] if len(texts) == 1 else list(texts))
    assert as_recorded(()) is None
    typed = ["recipe", "m", "--sparsity", "0.4", "--eval-text", "a.txt", "--eval-text", "b, c.txt", "--json"]
    shown = CliRunner().invoke(commands, typed)
    assert json.loads(shown.stdout)["calibration"]["eval_text"] == list(texts)


def test_every_option_stands_in_it_under_its_help(job: Job) -> None:
    text = recipe_toml(job)
    for field in all_fields():
        assert f"\n{field.name} = " in text or f"\n# {field.name} =\n" in text
        assert field.option.help.split()[0] in text
    assert tomllib.loads(text)["pruning"]["sparsity"] == 0.4


def test_options_win_over_the_base(job: Job) -> None:
    changed = job_of(job.model, {"sparsity": 0.2}, base=job)
    assert changed.pruning.sparsity == 0.2 and changed.quantization == job.quantization


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model = 1\nschema = 1", "model = 1 is not allowed"),
        ("schema = 2\nmodel = 'm'", "schema = 1"),
        ("model = 'm'", "schema = 1"),
        ("schema = 1\nmodel = 'm'\n[prune]\n", "unknown section or key 'prune'. Did you mean 'pruning'?"),
        ("schema = 1\nmodel = 'm'\npruning = 3", "pruning = 3 is not allowed; it takes a section"),
        ("schema = 1\nmodel = 'm'", "[pruning]: 'sparsity' is missing; it takes a number."),
        (
            "schema = 1\nmodel = 'm'\n[pruning]\nsparsity = '0.4'",
            "[pruning]: sparsity = '0.4' is not allowed",
        ),
        (
            "schema = 1\nmodel = 'm'\n[pruning]\nsparsty = 0.4",
            "unknown key 'sparsty'. Did you mean 'sparsity'",
        ),
        (
            "schema = 1\nmodel = 'm'\n[pruning]\nsparsity = 0.4\n[calibration]\nseq_len = 1",
            "[calibration]: seq_len = 1 is not allowed",
        ),
        ("schema = [", "is not valid TOML"),
        (f"schema = 1\nmodel = {'[' * 5000}", "nested too deeply"),
        (
            "schema = 1\nmodel = 'm'\n[pruning]\nsparsity = 0.4\n[engine]\nengines = 7",
            "engines = 7 is not allowed; it takes a list of",
        ),
        (
            "schema = 1\nmodel = 'm'\n[pruning]\nsparsity = 0.4\n[export]\nflavor = 1979-05-27",
            "flavor = datetime.date(1979, 5, 27) is not allowed",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(NirvanaError) as error:
        read_recipe(tmp_path / "r.toml")
    assert sentence in error.value.message and "\n" not in error.value.message


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"does not exist\.\nnirvana-deploy recipe"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.integration
def test_the_command_shows_it_and_its_file_does_the_same_job(tmp_path: Path) -> None:
    shown = CliRunner().invoke(commands, ["recipe", "smollm2", "--sparsity", "0.4", "--quantize", "w4"])
    assert shown.exit_code == 0, shown.output
    (tmp_path / "r.toml").write_text(shown.stdout)
    assert read_recipe(tmp_path / "r.toml") == job_of("smollm2", {"sparsity": 0.4, "quantize": ["w4"]})
    again = ["recipe", "--recipe", str(tmp_path / "r.toml"), "--sparsity", "0.3", "--json"]
    changed = CliRunner().invoke(commands, again)
    assert json.loads(changed.stdout)["pruning"]["sparsity"] == 0.3
    assert json.loads(changed.stdout)["quantization"]["quantize"] == ["w4"]


def test_a_model_that_is_typed_wins_over_the_recipe(job: Job, tmp_path: Path) -> None:
    write_recipe(job, tmp_path / "r.toml")
    for typed, model in ((["other"], "other"), ([], job.model)):
        shown = CliRunner().invoke(
            commands, ["recipe", *typed, "--recipe", str(tmp_path / "r.toml"), "--json"]
        )
        assert json.loads(shown.stdout)["model"] == model


def test_neither_model_nor_recipe_is_a_usage_error() -> None:
    for arguments in (["prune-export", "--sparsity", "0.4"], ["recipe", "smollm2"]):
        assert CliRunner().invoke(commands, arguments).exit_code == 2


@pytest.mark.integration
def test_a_recipe_redoes_the_job(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "llama-tied")
    options = {"sparsity": 0.3, "gamma": 1.0, "round_to": 4, "num_sequences": 4, "seq_len": 16, **SHORT}
    prune_export(str(model), out=tmp_path / "first", until="checkpoint", **options)
    recipe = tmp_path / "first" / "recipe.toml"
    result = CliRunner().invoke(
        commands, ["prune", "--recipe", str(recipe), "--out", str(tmp_path / "again")]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    for name in ("plan.json", "recipe.toml", "checkpoint/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_a_short_recipe_is_one(tmp_path: Path) -> None:
    assert (
        read_recipe(write_short_recipe(Path("m"), tmp_path / "r.toml", sparsity=0.1)).measurement.repeats == 2
    )
