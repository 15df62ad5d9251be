"""Quality is measured on kinds of text, also one that was not calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5

import nirvana_deploy.calib_sets as calib_sets
from nirvana_deploy import prune_export
from nirvana_deploy.base.errors import NirvanaError, QualityError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.measure.evaluation_text import EvaluationText, unseen_text
from nirvana_deploy.measure.gate import require_quality
from nirvana_deploy.measure.recipe import Evaluation, Gate
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


def test_the_unseen_text_is_as_many_windows_as_another_kind_has(tiny: Path) -> None:
    tokenizer = Checkpoint.open(tiny).tokenizer
    kinds = ("self", "prose", "self", "self", "code")
    found = unseen_text(EvaluationText(np.zeros((5, 24), np.int64), "mix", kinds), tokenizer)
    assert found.source == "unseen" and found.kinds == ("unseen",) * 3 and found.tokens.shape == (3, 24)
    first, _, last = (text.strip() for text in tokenizer.batch_decode(found.tokens, skip_special_tokens=True))
    documents = calib_sets.unseen()
    assert documents[0].startswith(first) and last in documents[-1]
    longer = EvaluationText(np.zeros((64, 9000), np.int64), "mix", ("self",) * 64)
    assert unseen_text(longer, tokenizer).tokens.shape[1] == 2048


@pytest.mark.integration
@pytest.mark.parametrize(
    ("calib", "windows"), [("code", {"code": 4}), ("mix", {"prose": 2, "pydoc": 1, "code": 1})]
)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_quality_is_on_a_kind_that_was_not_calibrated_on(
    family: str, calib: str, windows: dict[str, int], tiny: Path, tmp_path: Path
) -> None:
    model, per_window = tiny, 23
    if family == "t5":
        model, per_window = write_t5(tmp_path / "t5", "flan-t5"), 12
    elif calib == "mix":
        windows = {"prose": 1, "self": 1, "pydoc": 1, "code": 1}
    out = tmp_path / "out"
    prune_export(str(model), out=out, calib=calib, **OPTIONS)
    record = read_json(out / "quality.json")
    assert record["calibrated"] == {**dict.fromkeys(windows, True), "unseen": False}
    every = {**windows, "unseen": max(windows.values())}
    for variant in record["variants"].values():
        assert variant["tokens"] == 4 * per_window  # held-out windows alone
        assert {kind: part["windows"] for kind, part in variant["parts"].items()} == every
    with pytest.raises(QualityError, match="times dense's on unseen"):
        require_quality(record["variants"], Gate(require_perplexity_ratio=0.01))
    assert "unseen, not calibrated on" in (out / "report.md").read_text()


@pytest.mark.integration
def test_what_was_trained_on_counts_as_read(tiny: Path, tmp_path: Path) -> None:
    """A text of one's own is no second kind where the cut was trained on it."""
    text = tmp_path / "own.txt"
    text.write_text("A text of its own, long enough for a few windows. " * 200)
    trained = {"recover": "500", "recover_batch": 2, "recover_text": str(text), "eval_text": text}
    prune_export(str(tiny), out=tmp_path / "out", calib="pydoc", **trained, **OPTIONS)
    record = read_json(tmp_path / "out/quality.json")
    assert record["calibrated"] == {"file own.txt": True, "unseen": False}


@pytest.mark.integration
def test_texts_that_are_named_stand_alone(tiny: Path, tmp_path: Path) -> None:
    names = ("own.txt", "other.txt")
    for name in names:
        (tmp_path / name).write_text(f"The text {name} of its own, long enough for a few windows. " * 20)
    texts = tuple(tmp_path / name for name in names)
    out = tmp_path / "out"
    prune_export(str(tiny), out=out, calib="pydoc", eval_text=texts, **OPTIONS)
    record = read_json(out / "quality.json")
    assert record["calibrated"] == {"file own.txt": False, "file other.txt": False}
    for variant in record["variants"].values():
        assert [part["windows"] for part in variant["parts"].values()] == [4, 4] and variant["windows"] == 8
    again = evaluate_folder(out)
    assert again["variants"] == record["variants"]
    one = evaluate_folder(out, Evaluation(eval_text=texts[:1]))
    assert one["calibrated"] == {"file own.txt": False}
    twice = Evaluation(eval_text=(texts[0], tmp_path / "." / "own.txt"))
    with pytest.raises(NirvanaError, match=r"names file own\.txt twice"):
        evaluate_folder(out, twice)
