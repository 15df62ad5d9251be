"""The code on model cards runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from builders.extras import needs
from builders.plans import plan_for
from builders.tiny import write_tiny

from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.report.cards.snippets import FOLDER, checkpoint_snippets, onnx_snippets
from nirvana_deploy.report.snippets import Snippet

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a checkpoint whose layers differ, and its ONNX folder."""
    folder = tmp_path_factory.mktemp("cut")
    model = write_tiny(folder / "model", "llama-tied", head_dim=16)
    slice_checkpoint(Checkpoint.open(model), plan_for(model), folder / "checkpoint")
    onnx_from_checkpoint(Checkpoint.open(folder / "checkpoint"), folder / "onnx")
    return folder


def run(snippet: Snippet, folder: Path) -> str:
    assert FOLDER in snippet.code
    code = snippet.code.replace(FOLDER, folder.as_posix())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_of_a_checkpoint(cut: Path) -> None:
    (snippet,) = checkpoint_snippets(cut / "checkpoint", encoder_decoder=False)
    assert "trust_remote_code=True" in snippet.code
    assert run(snippet, cut / "checkpoint").startswith("The capital of France is")


def test_of_a_stock_checkpoint(cut: Path) -> None:
    (snippet,) = checkpoint_snippets(cut / "model", encoder_decoder=False)
    assert "trust_remote_code" not in snippet.code
    assert run(snippet, cut / "model").startswith("The capital of France is")


@pytest.mark.parametrize(("program", "index"), [("onnxruntime_genai", 0), ("openvino", 1)])
def test_of_an_onnx_folder(cut: Path, program: str, index: int) -> None:
    needs(program)
    snippets = onnx_snippets(cut / "onnx", dtype="fp32")
    assert len(snippets) == 2 and program in snippets[index].code
    assert run(snippets[index], cut / "onnx")
