"""``nirvana-deploy generate OUT``: which model of an output folder answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.jobs import TINY_JOB
from builders.tiny import write_tiny
from click.testing import CliRunner, Result

from nirvana_deploy import generate_text, prune_export
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.pipeline.alone import chosen
from nirvana_deploy.runtime.recipe import Place

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("out")
    checkpoint = write_tiny(base / "tiny", "llama-tied")
    prune_export(str(checkpoint), out=base / "job", quantize=("w8",), run_benchmark=False, **TINY_JOB)
    return base / "job"


def answered(path: Path, *options: str) -> Result:
    words = ["generate", str(path), "--prompt", "one two", "--max-new-tokens", "6", *options]
    return CliRunner().invoke(commands, words, catch_exceptions=False)


def test_the_recommended_model_answers(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Path] = []
    from nirvana_deploy.pipeline.alone import text

    opened = text.open_runner

    def watched(path: Path, **options: Any) -> Any:
        ran.append(path)
        return opened(path, **options)

    monkeypatch.setattr(text, "open_runner", watched)
    said = answered(out).stderr
    assert "Running pruned, as its report recommends none; --variant names another: dense, pruned," in said
    judged = chosen.verdict
    monkeypatch.setattr(chosen, "verdict", lambda records: replace(judged(records), recommended="dense-w8"))
    as_json = answered(out, "--json")
    assert "Running dense-w8, as its report recommends; --variant" in as_json.stderr
    assert json.loads(as_json.stdout)["new_tokens"] > 0
    answered(out, "--variant", "pruned-w8")
    answered(out, "--runtime", "onnxruntime-cpu")  # may be another than was timed
    answered(out, "--runtime", "torch")
    names = ["onnx", "dense/onnx-w8", "onnx-w8", "onnx", "checkpoint"]
    assert ran == [out / name for name in names]


@pytest.mark.parametrize(
    ("inside", "variant", "runtime", "said"),
    [
        ("", "pruned-w9", None, "Unknown variant 'pruned-w9'. Did you mean 'pruned-w8'"),
        ("onnx", "dense", None, "onnx is one model, not an output folder"),
        ("", "dense", "torch", "The runtime torch runs no ONNX folders, which dense is"),
    ],
)
def test_a_variant_that_cannot_answer_is_refused(
    out: Path, inside: str, variant: str, runtime: str | None, said: str
) -> None:
    with pytest.raises(NirvanaError, match=said):
        generate_text(out / inside, "one", variant=variant, place=Place(runtime=runtime))
