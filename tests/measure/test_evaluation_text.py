"""Quality is measured on kinds of text, also one that was not calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5

from nirvana_deploy import prune_export
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.measure.evaluation_text import other_text
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.pipeline.folder import evaluate_folder

OPTIONS: dict[str, Any] = {
    "sparsity": 0.3,
    "round_to": 4,
    "num_sequences": 4,
    "seq_len": 16,
    "heldout_sequences": 4,
    "heldout_len": 24,
    "threads": 1,
    "preset": "fast",
    "run_benchmark": False,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama-tied")


def test_the_other_kind_is_one_that_nobody_read(tiny: Path) -> None:
    tokenizer = Checkpoint.open(tiny).tokenizer
    code = other_text(frozenset({"pydoc"}), tokenizer, (16, 256))
    assert code is not None and code.source == "code" and code.tokens.shape == (4, 256)
    few = other_text(frozenset({"file a.txt"}), tokenizer, (2, 24))
    assert few is not None and few.kinds == ("pydoc", "pydoc") and few.tokens.shape == (2, 24)
    assert other_text(frozenset({"pydoc", "code"}), tokenizer, (2, 24)) is None


@pytest.mark.integration
@pytest.mark.parametrize(
    ("calib", "kinds"),
    [
        ("code", {"code": True, "pydoc": False}),
        ("pydoc:0.5,code:0.5", {"pydoc": True, "code": True}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_quality_is_on_two_kinds_at_least(
    family: str, calib: str, kinds: dict[str, bool], tiny: Path, tmp_path: Path
) -> None:
    model = tiny if family == "llama" else write_t5(tmp_path / "t5", "flan-t5")
    out = tmp_path / "out"
    prune_export(str(model), out=out, calib=calib, **OPTIONS)
    record = read_json(out / "quality.json")
    assert record["calibrated"] == kinds
    per_window = 23 if family == "llama" else 12
    for variant in record["variants"].values():
        assert variant["tokens"] == 4 * per_window  # held-out windows alone
        assert sum(part["tokens"] for part in variant["parts"].values()) == (
            variant["tokens"] * (2 if False in kinds.values() else 1)
        )
    assert ("not calibrated on" in (out / "report.md").read_text()) == (False in kinds.values())


@pytest.mark.integration
def test_what_was_trained_on_is_no_other_kind(tiny: Path, tmp_path: Path) -> None:
    """Calibrated on pydoc and trained on code, the cut has read all that there is to choose from."""
    trained = {"recover": "500", "recover_batch": 2, "recover_text": "code"}
    prune_export(str(tiny), out=tmp_path / "out", calib="pydoc", **trained, **OPTIONS)
    record = read_json(tmp_path / "out/quality.json")
    assert record["calibrated"] == {"pydoc": True}


@pytest.mark.integration
def test_a_text_that_is_named_stands_alone(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("A text of its own, long enough for a few windows. " * 20)
    out = tmp_path / "out"
    prune_export(str(tiny), out=out, calib="pydoc", eval_text=text, **OPTIONS)
    record = read_json(out / "quality.json")
    assert record["calibrated"] == {"file own.txt": False}
    again = evaluate_folder(out)
    assert again["variants"] == record["variants"]
