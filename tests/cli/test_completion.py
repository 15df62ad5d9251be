"""What a shell completes, and what was perhaps meant."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders.tiny import write_tiny
from click.shell_completion import CompletionItem, ShellComplete
from click.testing import CliRunner

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.recipe import source_names
from nirvana_deploy.cli.main import commands
from nirvana_deploy.model.sources import ALIASES, resolve_model
from nirvana_deploy.prune.recipe import SALIENCY_NAMES
from nirvana_deploy.prune.saliency.gradient import SALIENCIES

Completed = Callable[..., list[str]]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, an output folder with a checkpoint, a GGUF file, and a folder of something else."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "my-llama", "llama-tied")
    write_tiny(tmp_path / "my-llama-s0.4/checkpoint", "llama-tied")
    write_json(tmp_path / "my-llama-s0.4/manifest.json", {})
    (tmp_path / "my-other").mkdir()
    (tmp_path / "my.gguf").write_bytes(b"GGUF")
    return tmp_path


def items(*words: str) -> list[CompletionItem]:
    return ShellComplete(commands, {}, "nirvana-deploy", "_X").get_completions(list(words[:-1]), words[-1])


def completed(*words: str) -> list[str]:
    return [item.value for item in items(*words)]


def test_a_model_is_an_alias_a_folder_or_a_file(desk: Path) -> None:
    assert completed("prune-export", "smol") == [name for name in ALIASES if name.startswith("smol")]
    assert completed("prune", "my") == ["my-llama", "my.gguf"]
    assert completed("export", "my-llama-s0.4/") == ["my-llama-s0.4/checkpoint"]
    assert [item.type for item in items("export", "nothing/like")] == ["file"]


def test_an_output_folder_has_a_manifest(desk: Path) -> None:
    for command in ("recover", "report", "verify", "evaluate", "quantize"):
        assert completed(command, "my") == ["my-llama-s0.4"]
    assert completed("generate", "my") == ["my-llama", "my-llama-s0.4"]
    assert completed("inspect", "my-llama-s0.4/m") == ["my-llama-s0.4/manifest.json"]
    assert [item.type for item in items("report", "no")] == ["file"]  # or the record of a benchmark


def test_options_complete_their_names_one_after_another(desk: Path) -> None:
    assert completed("prune-export", "m", "--calib", "self,py") == ["self,pydoc"]
    assert completed("prune-export", "m", "--saliency", "t") == ["taylor"]
    assert completed("prune-export", "m", "--quantize", "int8,w") == ["int8,w8", "int8,w4"]
    assert completed("recover", "o", "--recover-text", "wiki") == ["wikitext"]
    assert "--dry-run" in completed("search", "m", "--dr")
    assert completed("prune-e") == ["prune-export"]


def test_the_names_that_are_completed_are_those_that_there_are() -> None:
    assert set(SALIENCY_NAMES) == set(SALIENCIES)
    assert {"mix", "auto", "self", "pydoc", "code", "wikitext"} <= set(source_names())


def test_a_shell_asks_the_program_itself(desk: Path) -> None:
    asked = {
        "_NIRVANA_DEPLOY_COMPLETE": "bash_complete",
        "COMP_WORDS": "nirvana-deploy report my",
        "COMP_CWORD": "2",
    }
    script = "import sys; sys.argv[0] = 'nirvana-deploy'; from nirvana_deploy.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("plain,my-llama-s0.4\n", "")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("smolm2", "'smollm2'"),
        ("SmolLM2", "'smollm2'"),
        ("my-lama", "'./my-llama'"),
        ("./my-lama", "'./my-llama'"),
        ("my-llama-s0.4/chekpoint", "'my-llama-s0.4/checkpoint'"),
        ("mine.gguf", "'./my.gguf'"),
    ],
)
def test_a_model_that_is_not_there_was_perhaps_another(desk: Path, typed: str, meant: str) -> None:
    with pytest.raises(NirvanaError, match=f"Did you mean .*{meant}"):
        resolve_model(typed)


def test_an_output_folder_is_no_model_and_its_checkpoint_is(desk: Path) -> None:
    with pytest.raises(NirvanaError) as refused:
        resolve_model("my-llama-s0.4")
    assert refused.value.hint == f"Did you mean {desk / 'my-llama-s0.4' / 'checkpoint'}?"


@pytest.mark.parametrize("base", ["meta-llama/Llama-3.2-1B", None])
def test_an_adapter_says_of_which_model_it_is_and_how_to_merge_it(desk: Path, base: str | None) -> None:
    write_json(desk / "my-other/adapter_config.json", {"base_model_name_or_path": base} if base else {})
    with pytest.raises(NirvanaError, match="holds an adapter") as refused:
        resolve_model("my-other")
    said = refused.value
    assert (base or "does not say of which model") in said.message and "None" not in said.message
    assert "merge_and_unload()" in str(said.hint) and f"then pass {desk / 'my-other'}-merged" in str(
        said.hint
    )


def test_a_folder_inside_an_output_folder_points_to_it(desk: Path) -> None:
    result = CliRunner().invoke(commands, ["recover", "my-llama-s0.4/checkpoint", "--minutes", "1"])
    assert isinstance(result.exception, NirvanaError) and "my-llama-s0.4" in str(result.exception.hint)


def test_an_output_folder_that_is_not_there_was_perhaps_another(desk: Path) -> None:
    result = CliRunner().invoke(commands, ["verify", "my-llama-0.4"])
    assert result.exit_code == 2 and "Did you mean my-llama-s0.4?" in result.output
