"""A budget in place of a sparsity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.jobs import SHORT, SHORT_ROUNDS
from builders.tiny import write_tiny
from click.testing import CliRunner

from nirvana_deploy.base.errors import NirvanaError, QualityError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.pipeline.forecast.target import forecast_target
from nirvana_deploy.pipeline.searching import target as meeting
from nirvana_deploy.pipeline.searching.target import meet_target
from nirvana_deploy.search.point import Found
from nirvana_deploy.search.recipe import Target

pytestmark = pytest.mark.integration
OPTIONS: dict[str, Any] = {
    **SHORT,
    **SHORT_ROUNDS,
    "num_sequences": 4,
    "seq_len": 16,
    "threads": 1,
    "round_to": 1,
    "gamma": 1.0,
    "run_benchmark": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama-tied"))


def test_a_size_is_met_and_the_trials_go(model: str, tmp_path: Path) -> None:
    whole = meet_target(model, Target(max_weights_bytes=200_000), out=tmp_path / "out", **OPTIONS)
    size = whole.chosen.weights_bytes
    assert size is not None and 0.95 * 200_000 <= size <= 200_000
    record = json.loads((tmp_path / "out/target.json").read_text())
    assert record["chosen"] == whole.chosen.name and len(record["trials"]) == len(whole.trials)
    assert (tmp_path / "out/report.html").is_file()
    stages = json.loads((tmp_path / "out/manifest.json").read_text())["stages"]
    assert {"calibrate", "plan", "onnx", "verify", "quality", "report"} <= set(stages)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(NirvanaError, match="is finished"):
        meet_target(model, Target(max_weights_bytes=200_000), out=tmp_path / "out", resume=True, **OPTIONS)


def test_what_no_sparsity_meets_is_said_with_what_comes_nearest(model: str, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"No sparsity meets --max-weights-bytes 1kB\. Nearest: s0\.\d"):
        meet_target(model, Target(max_weights_bytes=1000), out=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists() and (tmp_path / "out-trials/s0.2/manifest.json").is_file()
    with pytest.raises(NirvanaError, match="there is nothing to cut"):
        meet_target(model, Target(max_weights_bytes=10**9), out=tmp_path / "out", resume=True, **OPTIONS)
    with pytest.raises(NirvanaError, match=r"out-trials exists already.*tried for out\.\n.*--resume"):
        meet_target(model, Target(max_weights_bytes=10**9), out=tmp_path / "out", **OPTIONS)


def test_a_speed_is_met_by_what_was_timed(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(folder: Path, points: list[Found], *_: Any, **__: Any) -> tuple[list[Found], None]:
        return [
            replace(one, tpot_ms=10 * (1 - one.sparsity), speedup=1 / (1 - one.sparsity)) for one in points
        ], None

    monkeypatch.setattr(meeting, "timed_points", timed)
    met = meet_target(model, Target(min_speedup=1.22), out=tmp_path / "out", **OPTIONS)
    assert [one.sparsity for one in met.trials] == [0.0, 0.2] and met.chosen.sparsity == 0.2
    assert met.deployment.plan.sparsity == 0.2


def test_a_resumed_budget_in_time_goes_by_the_times_that_it_found(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are never the same twice, and another sparsity would be another folder."""
    speeds = iter([1.0, 1.1, 1.3])

    def timed(folder: Path, points: list[Found], *_: Any, **__: Any) -> tuple[list[Found], None]:
        noise = next(speeds)
        return [
            replace(
                one,
                tpot_ms=10 * (1 - one.sparsity),
                speedup=noise / (1 - one.sparsity),
                speedup_interval=(1.0, 2.0),
            )
            for one in points
        ], None

    def killed(*_: Any) -> None:
        raise NirvanaError("killed")

    target, out = Target(min_speedup=1.22), tmp_path / "out"
    monkeypatch.setattr(meeting, "timed_points", timed)
    with monkeypatch.context() as patch, pytest.raises(NirvanaError, match="killed"):
        patch.setattr(meeting, "_finish", killed)
        meet_target(model, target, out=out, **OPTIONS)
    met = meet_target(model, target, out=out, resume=True, **OPTIONS)
    assert met.chosen.sparsity == met.deployment.plan.sparsity == 0.2
    assert met.chosen.speedup == 1.25 and met.chosen.speedup_interval == (1.0, 2.0)
    assert next(speeds) == 1.1  # timed once
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("forecasts", [False, True])
def test_the_working_folder_is_no_place(
    forecasts: bool, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ask: Any = forecast_target if forecasts else meet_target
    with pytest.raises(NirvanaError, match="it is the working folder"):
        ask(model, Target(max_kl=0.1), out=".", **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_a_required_quality_is_asked_of_what_is_chosen(model: str, tmp_path: Path) -> None:
    """Each cut that is tried misses it, too; they are tried all the same."""
    with pytest.raises(QualityError, match=r"KL of pruned is .*, required at most 1e-09"):
        meet_target(
            model, Target(max_weights_bytes=200_000), out=tmp_path / "out", require_kl=1e-9, **OPTIONS
        )
    record = json.loads((tmp_path / "out/target.json").read_text())
    assert len(record["trials"]) >= 2 and (tmp_path / "out/report.html").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        (Target(max_kl=0.1), {"sparsity": 0.2}, "say two things"),
        (Target(max_kl=0.0), {}, "leaves nothing to cut"),
        (Target(max_kl=0.1), {"quantize": ["w4", "w8"]}, "names 2 schemes"),
        (Target(target_tpot_ms=5.0), {"dtype": "bf16"}, "needs times. bf16 cannot be timed"),
    ],
)
def test_what_does_not_go_with_a_budget(
    model: str, tmp_path: Path, target: Target, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(NirvanaError, match=said):
        meet_target(model, target, out=tmp_path / "out", **OPTIONS, **options)
    assert not list(tmp_path.iterdir())


def test_the_command_takes_a_budget_and_no_recipe_beside_it() -> None:
    result = CliRunner().invoke(commands, ["prune-export", "--recipe", "pyproject.toml", "--max-kl", "0.1"])
    assert result.exit_code == 2 and "A budget finds the sparsity" in result.output
    result = CliRunner().invoke(commands, ["prune-export", "--max-kl", "0.1"])
    assert result.exit_code == 2 and "Missing argument 'MODEL'" in result.output


def test_what_a_budget_may_take_is_said_before_and_nothing_written(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = forecast_target(model, Target(max_kl=0.1), out=out, **OPTIONS)
    assert not list(tmp_path.iterdir())
    least, most = told.seconds
    counted = sum(one.seconds for one in told.further.left)
    assert least < most and most >= 2 * (told.most_further * counted)
    whole = meet_target(model, Target(max_weights_bytes=200_000), out=out, **OPTIONS)
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    assert {one.name for one in told.job.stages} == set(stages) and whole.trials
    assert "calibrate" not in {one.name for one in told.further.left}
    assert [one.name for one in told.job.left] == ["answers", "report"]


def test_the_command_says_it(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["prune-export", model, "--max-kl", "0.1", "--seq-len", "16", "--dry-run"]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 0, result.output
    assert "each further cut, 7 at most" in result.output and "Nothing was written." in result.output
    as_json = CliRunner().invoke(commands, [*arguments, "--json"])
    assert json.loads(as_json.output)["most_further"] == 7 and not list(tmp_path.iterdir())
