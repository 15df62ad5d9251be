"""A GGUF file behind the interface of every runner: the logits of llama.cpp are those of the checkpoint."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders.extras import needs
from builders.gguf_files import write_merges
from builders.tiny import VOCABULARY, write_tiny

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError, install_extra
from nirvana_deploy.runtime import llama_cpp
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.runner import NoRoomError, greedy_tokens

PROMPT = np.array([[1, 5, 9, 200, 17, 30]], dtype=np.int64)


class FakeLlama:
    """llama-cpp-python's interface, as far as it is used: the next token is one more than the sum of all."""

    def __init__(self, path: str, **options: Any) -> None:
        if "broken" in path:
            raise ValueError(f"Failed to load model from file: {path}")
        self.options, self.n_tokens, self.n_batch, self.ctx = options, 0, 512, self
        self.metadata = {"general.architecture": "llama", "llama.context_length": "64"}
        self.cache: list[int] = []
        self.closed = False

    def n_vocab(self) -> int:
        return 11

    def n_ctx(self) -> int:
        return int(self.options["n_ctx"])

    def eval(self, tokens: list[int]) -> None:
        self.cache, self.last = self.cache[: self.n_tokens] + tokens, len(tokens) - 1
        self.n_tokens = len(self.cache)

    def close(self) -> None:
        self.closed = True


def _logits(context: FakeLlama, position: int) -> Any:
    assert position == context.last
    found = (ctypes.c_float * 11)()
    found[(sum(context.cache) + 1) % 11] = 1.0
    return ctypes.cast(found, ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GGUF file for the stand-in of llama.cpp, trained with a context of 64 tokens."""
    library = SimpleNamespace(Llama=FakeLlama, llama_get_logits_ith=_logits)
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_prompts_continue_and_a_state_may_be_continued_twice(fake: Path) -> None:
    with open_runner(fake, threads=2) as runner:
        assert (runner.runtime, runner.threads, runner.vocab_size) == ("llama-cpp", 2, 11)
        logits, state = runner.prefill(np.array([[1, 2, 3]]))
        assert logits.shape == (1, 1, 11) and logits.dtype == np.float32 and logits.argmax() == 7
        assert runner.decode(np.array([[7]]), state)[0].argmax() == 3
        again, following = runner.decode(np.array([[2]]), state)
        assert again.argmax() == 9 and runner.decode(np.array([[9]]), following)[0].argmax() == 7
        assert greedy_tokens(runner, np.array([[1, 2, 3]]), max_new_tokens=3) == [7, 3, 6]
        answered, _ = runner.prefill(np.array([[1, 2]]), answer=np.array([[3]]))
        padded, _ = runner.prefill(np.array([[0, 1, 2, 3]]), np.array([[0, 1, 1, 1]]))
        assert answered.argmax() == padded.argmax() == 7
        model = runner._model  # type: ignore[attr-defined]
    assert model.closed
    assert model.options["n_threads"] == model.options["n_threads_batch"] == 2
    assert model.options["n_gpu_layers"] == 0 and not model.options["logits_all"]


def test_what_it_cannot_do_is_refused(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_runner(fake, threads=1) as runner:
        with pytest.raises(NirvanaError, match=r"one sequence at a time here, and 2 .*\.\n--batch-size 1"):
            runner.prefill(np.array([[1], [2]]))
        with pytest.raises(NoRoomError, match="context is 64 tokens, and 65 are asked for"):
            runner.prefill(np.ones((1, 65), dtype=np.int64))
        with pytest.raises(NoRoomError, match="65 are asked for"):
            runner.decode(np.array([[1]]), 64)
    monkeypatch.setattr(llama_cpp, "_CACHE_TOKENS", 48)
    with open_runner(fake, threads=1) as runner:
        assert runner.context_tokens == 48
        for wanted in (49, 65):
            with pytest.raises(
                NoRoomError, match=f"holds 48 tokens, though .* context is 64, and {wanted} are"
            ):
                runner.prefill(np.ones((1, wanted), dtype=np.int64))
        with pytest.raises(NoRoomError, match="holds 48 tokens"):
            runner.decode(np.array([[1]]), 48)
    broken = fake.rename(fake.with_name("broken.gguf"))
    with pytest.raises(NirvanaError, match=r"llama\.cpp cannot load .*broken\.gguf: Failed to load model"):
        open_runner(broken)
    with pytest.raises(NirvanaError, match=r"onnxruntime-cpu runs an ONNX folder, and .* is none"):
        open_runner(broken, runtime="onnxruntime-cpu")


def test_without_the_library_the_message_has_the_pip_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtraError, match="a GGUF file needs the package 'llama-cpp-python'") as e:
        open_runner(tmp_path / "model.gguf")
    assert e.value.hint == install_extra("llama-cpp")


@pytest.mark.integration
def test_logits_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    needs("llama_cpp")
    from nirvana_deploy import package_gguf

    checkpoint = write_tiny(tmp_path / "checkpoint", "llama-tied")
    write_merges(checkpoint)
    file = package_gguf(checkpoint, tmp_path / "model.gguf", weight_type="f32").path
    with open_runner(file, threads=1) as ours, open_runner(checkpoint, threads=1) as torch:
        assert ours.vocab_size == torch.vocab_size == VOCABULARY
        (found, state), (wanted, reference) = ours.prefill(PROMPT), torch.prefill(PROMPT)
        for token in (7, 33):
            # the cache holds float16
            np.testing.assert_allclose(found[0, -1], wanted[0, -1], atol=2e-2 * np.abs(wanted[0, -1]).max())
            found, state = ours.decode(np.array([[token]]), state)
            wanted, reference = torch.decode(np.array([[token]]), reference)
        np.testing.assert_allclose(found[0, -1], wanted[0, -1], atol=2e-2 * np.abs(wanted[0, -1]).max())
