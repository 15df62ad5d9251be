"""What lies beyond a model's vocabulary or context is refused in a sentence, in every runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.odd import edit
from builders.tiny import VOCABULARY, write_tiny
from builders.tiny_t5 import write_t5

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.windows import calibration_data
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import OrtSeq2Seq
from nirvana_deploy.runtime.runner import NoRoomError, greedy_tokens
from nirvana_deploy.runtime.text import stream_text
from nirvana_deploy.runtime.torch import open_checkpoint
from nirvana_deploy.verify.against_torch import verify_onnx

CONTEXT = 48


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "model"
    return edit(write_tiny(folder, "llama-tied", head_dim=16), max_position_embeddings=CONTEXT)


def runner_of(kind: str, model: Path, out: Path) -> Any:
    if kind == "torch":
        return open_checkpoint(model)
    options = {"cache_tokens": 64} if kind == "static-cache" else {}
    onnx_from_checkpoint(Checkpoint.open(model), out, flavor=kind, **options)
    return OrtDecoder(out, threads=1)


@pytest.mark.parametrize("kind", ["torch", "portable", "gqa", "static-cache"])
def test_every_flavor_names_the_context(kind: str, short: Path, tmp_path: Path) -> None:
    with runner_of(kind, short, tmp_path / "onnx") as runner:
        ids = np.arange(3, 3 + CONTEXT)[None]
        with pytest.raises(NirvanaError, match=rf"context is {CONTEXT} tokens, and {CONTEXT + 4} are asked"):
            runner.prefill(np.concatenate([ids, ids[:, :4]], axis=1))
        assert len(greedy_tokens(runner, ids[:, :-4], max_new_tokens=5)) == 5
        with pytest.raises(NirvanaError, match=rf"context is {CONTEXT} tokens, and {CONTEXT + 1} are asked"):
            greedy_tokens(runner, ids[:, :-4], max_new_tokens=6)


def test_an_answer_ends_where_the_context_does(short: Path, tmp_path: Path) -> None:
    """One letter is one token here; without room for the prompt there is no answer."""
    with runner_of("portable", short, tmp_path / "onnx") as runner:
        tokenizer, told = Checkpoint.open(short).tokenizer, list[str]()
        answer = stream_text(runner, tokenizer, "a" * (CONTEXT - 4), max_new_tokens=64, on_text=told.append)
        assert (answer.prompt_tokens, answer.new_tokens, answer.no_room) == (CONTEXT - 4, 5, True)
        assert "".join(told) == answer.text and not answer.stopped
        assert not stream_text(runner, tokenizer, "a" * (CONTEXT - 4), max_new_tokens=5).no_room
        with pytest.raises(NoRoomError, match=rf"{CONTEXT + 1} are asked for"):
            stream_text(runner, tokenizer, "a" * (CONTEXT + 1), max_new_tokens=1)


@pytest.mark.parametrize("kind", ["torch", "portable", "gqa"])
def test_a_token_beyond_the_vocabulary_is_named(kind: str, short: Path, tmp_path: Path) -> None:
    with runner_of(kind, short, tmp_path / "onnx") as runner:
        with pytest.raises(NirvanaError, match=rf"Token id {VOCABULARY} is beyond .* {VOCABULARY} rows"):
            runner.prefill(np.array([[5, VOCABULARY]]))
        with pytest.raises(NirvanaError, match="Token id -1 is beyond"):
            runner.prefill(np.array([[-1, 5]]))
        padded = np.array([[VOCABULARY, 5, 6], [7, 8, 9]])
        mask = np.array([[0, 1, 1], [1, 1, 1]])
        logits, _ = runner.prefill(padded, mask)
        alone, _ = runner.prefill(padded[:1, 1:])
        np.testing.assert_allclose(logits[0, 1:], alone[0], atol=1e-5)


def test_an_encoder_decoder_names_it_too(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_t5(tmp_path / "model", "t5"))
    onnx_from_checkpoint(checkpoint, tmp_path / "onnx")
    with OrtSeq2Seq(tmp_path / "onnx", threads=1) as runner, pytest.raises(NirvanaError, match="is beyond"):
        runner.prefill(np.array([[5, checkpoint.shape.vocab_size]]))


def test_calibration_text_with_tokens_the_model_lacks_is_refused(short: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(short)
    more = VOCABULARY - len(checkpoint.tokenizer)
    checkpoint.tokenizer.add_tokens([*(f"more {number}" for number in range(more)), "keyword"])
    (tmp_path / "t.txt").write_text(" ".join(f"keyword {number}" for number in range(900)))
    with pytest.raises(NirvanaError, match=rf"Token id {VOCABULARY} is beyond"):
        calibration_data(
            str(tmp_path / "t.txt"),
            checkpoint.tokenizer,
            num_sequences=4,
            seq_len=16,
            seed=0,
            heldout_sequences=2,
            heldout_len=16,
            checkpoint=checkpoint,
        )


def test_a_short_context_is_verified_within_it(short: Path, tmp_path: Path) -> None:
    onnx_from_checkpoint(Checkpoint.open(short), tmp_path / "onnx")
    report = verify_onnx(short, tmp_path / "onnx", new_tokens=2, threads=1)
    assert report.passed and report.checks
