"""A GGUF file in llama.cpp, by llama-cpp-python: one sequence at a time, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.machine import default_threads
from nirvana_deploy.base.reading import require_file
from nirvana_deploy.runtime.runner import NoRoomError, checked_prompts, require_context

_CACHE_TOKENS = 4096
"""The most that the KV cache is made for, all of it at once; less where the model's context is shorter."""


class LlamaCppDecoder:
    """A decoder in llama.cpp. Its cache is changed in place, so the newest state alone is continued."""

    start_token = None

    def __init__(self, path: Path, *, runtime: str, threads: int | None = None) -> None:
        """Load ``path`` for ``threads`` threads [all physical cores].

        Raises NirvanaError for a file that llama.cpp refuses, MissingExtraError without llama-cpp-python.
        """
        self._library = _library()
        require_file(path)
        self.runtime = runtime
        self.threads = threads or default_threads()
        self._model = self._loaded(path)
        self.vocab_size: int = self._model.n_vocab()
        said = self._model.metadata
        self._cache_tokens = int(self._model.n_ctx())
        trained = said.get(f"{said.get('general.architecture')}.context_length", self._cache_tokens)
        self._trained_tokens = int(trained)
        self.context_tokens = min(self._cache_tokens, self._trained_tokens)

    def _loaded(self, path: Path) -> Any:
        try:
            return self._library.Llama(
                str(path),
                n_ctx=_CACHE_TOKENS,
                n_gpu_layers=0,
                n_threads=self.threads,
                n_threads_batch=self.threads,
                logits_all=False,
                verbose=False,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise NirvanaError(
                f"llama.cpp cannot load {path}: {str(error).rstrip('.')}.",
                hint="It may be damaged, or of an architecture that this version does not know: "
                "see what llama-cli -m says of it.",
            ) from error

    def __enter__(self) -> LlamaCppDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.close()

    def prefill(
        self,
        tokens: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        answer: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], int]:
        """Read a prompt [1, T] and an answer [1, A]; returns the last logits [1, 1, V] and the tokens read.

        Raises NirvanaError for several prompts, and as :func:`checked_prompts` does.
        """
        tokens, mask = checked_prompts(
            tokens,
            attention_mask,
            answer,
            vocab_size=self.vocab_size,
        )
        if len(tokens) > 1:
            raise NirvanaError(
                f"llama.cpp reads one sequence at a time here, and {len(tokens)} were given.",
                hint="--batch-size 1",
            )
        self._require_room(int(mask.sum()))
        return self._pass(tokens[0][mask[0] == 1], 0)

    def decode(self, tokens: NDArray[np.int64], state: int) -> tuple[NDArray[np.float32], int]:
        """Read one more token [1, 1]; returns logits [1, 1, V] and the tokens read."""
        self._require_room(state + tokens.shape[1])
        return self._pass(tokens[0], state)

    def _require_room(self, wanted_tokens: int) -> None:
        """Raise NoRoomError for a sequence longer than the cache or, if that is shorter, the context."""
        if self._cache_tokens < min(wanted_tokens, self._trained_tokens):
            raise NoRoomError(
                f"The cache made in llama.cpp here holds {self._cache_tokens:,} tokens, though the model's "
                f"context is {self._trained_tokens:,}, and {wanted_tokens:,} are asked for, prompt and "
                "answer together.",
                hint="Give a shorter prompt, ask for fewer tokens, or run the file in llama.cpp itself: "
                f"llama-cli -c {wanted_tokens}",
            )
        require_context(wanted_tokens, self._trained_tokens)

    def _pass(self, tokens: NDArray[np.int64], state: int) -> tuple[NDArray[np.float32], int]:
        self._model.n_tokens = state  # what lies behind it in the cache is dropped
        self._model.eval(tokens.tolist())
        last = (len(tokens) - 1) % self._model.n_batch  # in the batch that was computed last
        logits = self._library.llama_get_logits_ith(self._model.ctx, last)
        copied = np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).astype(np.float32)
        return copied[None, None], state + len(tokens)


def open_gguf(path: Path, *, runtime: str, threads: int | None) -> LlamaCppDecoder:
    """Load a GGUF file, as :class:`LlamaCppDecoder` does."""
    return LlamaCppDecoder(path, runtime=runtime, threads=threads)


def _library() -> Any:
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise MissingExtraError(
            "Running a GGUF file", package="llama-cpp-python", extra="llama-cpp"
        ) from None
    return llama_cpp
