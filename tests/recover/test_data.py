"""Training windows: as many as there is text for, apart from those held out, some of them set aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.tiny import write_tiny

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT
from nirvana_deploy.calibrate.windows import calibration_data, room_for
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.recover import data
from nirvana_deploy.recover.before import require_recovery
from nirvana_deploy.recover.data import TrainingText, training_text
from nirvana_deploy.recover.recipe import Recovery

SEQ_LEN = 20


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny(tmp_path_factory.mktemp("model") / "llama", "llama-tied"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 tokens of a byte each: 160 windows to draw, and 40 held out."""
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text("".join(f"{n * 7919 % 9973:>7} of {n:>5}\n" for n in range(235))[:3999])
    return file


def drawn(source: str, dense: Checkpoint, **options: Any) -> TrainingText:
    wanted = {"wanted": 32, "least": 4, "seed": 1, **options}
    return training_text(source, dense, seq_len=SEQ_LEN, segment_tokens=SEQ_LEN, progress=SILENT, **wanted)


def test_windows_to_train_on_and_to_watch_are_apart(dense: Checkpoint, text: Path) -> None:
    found = drawn(str(text), dense)
    assert found.train.tokens.shape == (32, SEQ_LEN) and found.watch.shape == (2, SEQ_LEN)
    every = np.concatenate([found.train.tokens, found.watch])
    assert len(np.unique(every, axis=0)) == len(every)


def test_none_is_held_out_for_quality(dense: Checkpoint, text: Path) -> None:
    found = drawn(str(text), dense, wanted=4000)
    held = calibration_data(
        str(text),
        dense.tokenizer,
        num_sequences=1,
        seq_len=SEQ_LEN,
        seed=0,
        heldout_sequences=16,
        heldout_len=SEQ_LEN,
    ).heldout.tokens
    every = np.concatenate([found.train.tokens, found.watch])
    assert len(every) == 160
    assert not {window.tobytes() for window in every} & {window.tobytes() for window in held}


def test_a_mixture_has_text_for_all_its_parts(dense: Checkpoint, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{n * 104729 % 9973:>9} pears\n" for n in range(63)))  # 40 windows
    found = drawn(f"{text}:0.5,{other}:0.5", dense, wanted=4000)
    assert len(found.train.tokens) + len(found.watch) == 80


def test_a_text_that_surely_suffices_is_not_tokenised(
    dense: Checkpoint, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def room(enough: int) -> int:
        how = {"seq_len": SEQ_LEN, "heldout_len": SEQ_LEN, "enough": enough}
        return len(room_for(str(text), dense.tokenizer, **how).calibration_starts)

    assert room(1000) == 160
    monkeypatch.setattr("nirvana_deploy.calibrate.windows.token_stream", None)
    assert room(10) >= 10


def test_too_little_text_is_refused(dense: Checkpoint, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words, and no more than that.\n" * 3)
    said = (
        r"short\.txt has 108 tokens with .*, room for 4 windows of 20; .* need 6, which is 140 tokens\.\n"
        r".*--recover-batch 1"
    )
    with pytest.raises(NirvanaError, match=said):
        drawn(str(short), dense)
    recipe = Recovery(recover="10k", recover_text=str(short))
    with pytest.raises(NirvanaError, match=said):  # ahead of the cut
        require_recovery(recipe, dense, seq_len=SEQ_LEN)


def test_another_kind_than_those_trained_on_watches_too(
    dense: Checkpoint, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "OTHER_KINDS", ("pydoc", "code"))
    found = drawn(str(text), dense)
    assert found.other is not None
    assert (found.other.source, found.other.tokens.shape) == ("pydoc", (2, SEQ_LEN))
    assert [len(kind) for kind in found.watching] == [2, 2] and len(found.windows) == 36
    assert (found.windows[-2:] == found.other.tokens).all()
    monkeypatch.setattr(data, "OTHER_KINDS", (str(text),))
    assert drawn(str(text), dense).other is None  # all there are is trained on


def test_training_windows_do_not_reach_into_what_is_held_out(dense: Checkpoint) -> None:
    recipe = Recovery(recover="10k", recover_text="pydoc", recover_seq_len=32)
    require_recovery(recipe, dense, seq_len=24, longest=32)
    with pytest.raises(NirvanaError, match=r"recover_seq_len must be at most 24, got 32.*\n.*--seq-len"):
        require_recovery(recipe, dense, seq_len=24)


@pytest.mark.parametrize("source", ["pydoc:0.5,code:0.7", "mix:0.5,pydoc", "nobody-has-this-set"])
def test_a_wrong_text_is_called_by_the_option_that_it_came_by(dense: Checkpoint, source: str) -> None:
    recipe = Recovery(recover="10k", recover_text=source)
    for refuse in (lambda: require_recovery(recipe, dense, seq_len=SEQ_LEN), lambda: drawn(source, dense)):
        with pytest.raises(NirvanaError) as refused:
            refuse()
        said = f"{refused.value.message} {refused.value.hint}"
        assert "--calib" not in said and source.partition(":")[0] in said
