"""The stage in a run: what is made anew, what a resumed run may leave out, what the report shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.extras import needs
from builders.jobs import SHORT
from builders.tiny import write_tiny
from click.testing import CliRunner, Result

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT
from nirvana_deploy.base.units import format_number
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.cli.main import commands
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.pipeline.presets import RECOVERIES
from nirvana_deploy.pipeline.prune_export import prune_export
from nirvana_deploy.pipeline.recipe_file import read_recipe
from nirvana_deploy.recover.data import training_text
from nirvana_deploy.recover.recipe import Recovery
from nirvana_deploy.recover.recovery import TextWanted

TRAINED = {"recover": "500", "recover_batch": 2, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished folder, and the options that made it."""
    folder = tmp_path_factory.mktemp("recovered")
    (folder / "text.txt").write_text("".join(f"Day {n}: {n * 7919 % 1000} apples.\n" for n in range(600)))
    options = {
        **SHORT,
        **TRAINED,
        "sparsity": 0.3,
        "calib": str(folder / "text.txt"),
        "recover_text": str(folder / "text.txt"),
        "num_sequences": 8,
        "seq_len": 24,
        "run_benchmark": False,
    }
    prune_export(str(write_tiny(folder / "llama", "llama-tied")), out=folder / "out", **options)
    return folder / "out", options


def record_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())["stages"]
    return found


def test_none_of_what_candidates_are_judged_on_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quality is quoted on windows of ``selection_len`` then, which lie elsewhere than usual ones."""
    text, found = tmp_path / "text.txt", {}
    text.write_text("".join(f"{n * 7919 % 9973:>7} of {n:>5}\n" for n in range(600)))  # a token is a byte

    def drawn(
        _cut: Checkpoint, dense: Checkpoint, _recipe: Recovery, wanted: TextWanted, *_: Any, **__: Any
    ) -> None:
        how = {"wanted": 4000, "least": 4, "progress": SILENT}
        found["text"] = training_text(str(text), dense, **how, **vars(wanted))
        raise NirvanaError("enough")

    monkeypatch.setattr("nirvana_deploy.recover.stage.recover_checkpoint", drawn)
    options = {
        **SHORT,
        **TRAINED,
        "sparsity": 0.3,
        "saliency": "wanda-sp,flap",
        "calib": str(text),
        "recover_text": str(text),
        "num_sequences": 8,
        "seq_len": 16,
        "heldout_len": 72,
        "selection_len": 40,
        "selection_sequences": 16,
    }
    model = str(write_tiny(tmp_path / "llama", "llama-tied"))
    with pytest.raises(NirvanaError, match="enough"):
        prune_export(model, out=tmp_path / "out", until="checkpoint", **options)
    heldout = read_windows(tmp_path / "out/calibration.safetensors")["heldout"]
    assert heldout.shape == (16, 40)
    judged = {window[i : i + 16].tobytes() for window in heldout for i in range(25)}
    assert not judged & {window.tobytes() for window in (*found["text"].train.tokens, *found["text"].watch)}


def ran(*words: str) -> Result:
    return CliRunner().invoke(commands, [*words])


def test_the_card_tells_how_the_cut_was_trained(recovered: tuple[Path, dict[str, Any]]) -> None:
    out, _ = recovered
    done, card = record_of(out)["recover"]["result"], (out / "checkpoint/README.md").read_text()
    assert "distill, toward the dense model" in card
    assert f"{done['tokens']:,} tokens of a text of the author's own, " in card  # no name of a file
    assert f" minutes, seed {done['seed']}, learning rate 0.002" in card
    assert f"{format_number(done['curve'][0]['kl'])} nats before" in card


def test_the_record_tells_data_course_and_what_was_before(recovered: tuple[Path, dict[str, Any]]) -> None:
    out, _ = recovered
    done = record_of(out)["recover"]["result"]
    assert done["text"] == "file text.txt" and done["steps"] == 10
    assert done["tokens"] == done["steps_done"] * 2 * 24 and done["curve"][0]["step"] == 0
    assert done["cut_kl"] > 0 and len(done["answers_of_cut"]) == 5
    assert not (out / ".nirvana-deploy.recovery").exists()
    page = (out / "report.md").read_text()
    assert "| pruned, before recovery | pruned |" in page
    assert "Recovery: KL to dense on text set aside" in (out / "report.html").read_text()


def test_a_resumed_run_does_nothing_again(recovered: tuple[Path, dict[str, Any]]) -> None:
    """Where the course is told is no other recovery."""
    needs("tensorboard")
    out, options = recovered
    before = record_of(out)
    prune_export(str(out.parent / "llama"), out=out, resume=True, **options, recover_log="tensorboard")
    after = record_of(out)
    assert all(after[name] == before[name] for name in before if name != "report")


def test_a_resumed_run_says_that_it_was_recovered(recovered: tuple[Path, dict[str, Any]]) -> None:
    out, options = recovered
    without = {name: value for name, value in options.items() if name != "recover"}
    with pytest.raises(NirvanaError, match=r"recovered for 500, and --recover is missing.\n.*--recover 500"):
        prune_export(str(out.parent / "llama"), out=out, resume=True, **without)


def test_the_command_trains_again_and_makes_anew_what_was_made_from_it(
    recovered: tuple[Path, dict[str, Any]],
) -> None:
    out, _ = recovered
    before = record_of(out)
    told = ran("recover", str(out), "--tokens", "250")
    assert told.exit_code == 0, told.output
    assert "Held-out KL, nats" in told.stdout and "Kept: step" in told.stdout
    after = record_of(out)
    for stage in ("recover", "checkpoint", "onnx", "verify", "quality"):
        assert after[stage]["files"] != before[stage]["files"] or not before[stage]["files"]
    assert after["dense-onnx"]["files"] == before["dense-onnx"]["files"]
    asked = after["recover"]["result"]["options"]
    assert asked["recover"] == "250" and Recovery(**asked).recover_text.endswith("text.txt")
    assert ran("verify", str(out)).exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--minutes", "0.0001"), "--minutes: 0.006 s end within the first step"),
        (("--tokens", "500", "--learning-rate", "1e30"), "The loss is nan at step"),
    ],
)
def test_a_recovery_that_is_refused_leaves_the_one_before(
    recovered: tuple[Path, dict[str, Any]], words: tuple[str, ...], said: str
) -> None:
    """With what was made from it, byte by byte."""
    out, _ = recovered
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    told = ran("recover", str(out), *words)
    assert told.exit_code != 0 and said in str(told.exception)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_dense_model_that_is_gone_is_named(
    recovered: tuple[Path, dict[str, Any]], dry: tuple[str, ...]
) -> None:
    out, _ = recovered
    model = out.parent / "llama"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    model.rename(out.parent / "elsewhere")
    try:
        told = ran("recover", str(out), "--tokens", "250", *dry)
    finally:
        (out.parent / "elsewhere").rename(model)
    assert isinstance(told.exception, NirvanaError)
    said = str(told.exception)
    assert f"that {out} was cut from, and is trained toward, is gone. {model} does not exist" in said
    assert f"\nPut it back at {model}, and repeat the command." in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Say how long: --minutes M or --tokens N, one of them."),
        (("--minutes", "1", "--tokens", "5"), "one of them"),
        (("--tokens", "20"), "--tokens: 20 tokens are less than one step, which reads 48"),
        (("--tokens", "500", "--recover-text", "nowhere.txt"), "nowhere.txt"),
        (("--tokens", "500", "--learning-rate", "0"), "--learning-rate must be above 0"),
    ],
)
def test_bad_input_is_a_sentence(
    recovered: tuple[Path, dict[str, Any]], words: tuple[str, ...], said: str
) -> None:
    out, _ = recovered
    before = record_of(out)
    told = ran("recover", str(out), *words)
    assert told.exit_code != 0 and said in str(told.exception) + told.output
    assert record_of(out)["checkpoint"] == before["checkpoint"]


def test_a_cut_is_recovered_as_the_paper_does(tmp_path: Path, recovered: tuple[Path, dict[str, Any]]) -> None:
    needs("peft")
    out, _ = recovered
    shutil.copytree(out, tmp_path / "out")
    done = ran(
        "recover", str(tmp_path / "out"), "--tokens", "800", "--preset", "paper", "--recover-batch", "2"
    )
    assert done.exit_code == 0, done.output
    options = record_of(tmp_path / "out")["recover"]["result"]["options"]
    assert options == options | RECOVERIES["paper"] | {"recover": "800", "recover_batch": 2}
    assert "lora, by the next token" in (tmp_path / "out/checkpoint/README.md").read_text()
    before, after = (read_recipe(folder / "recipe.toml").pruning for folder in (out, tmp_path / "out"))
    assert before == after  # the cut is what it was
