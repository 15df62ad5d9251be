"""onnxruntime-genai: greedy tokens of an ONNX folder, and answers of a model that has a draft.

A draft proposes k tokens, its target checks them in one pass: a round costs k passes of the draft and one of
the target over k + 1 tokens, and gives the accepted ones and one more. Output is the target's own [Leviathan
et al., arXiv 2211.17192].
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import files_under, link, write_json
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError, pip_install
from nirvana_deploy.base.ownership.temporary import scratch_folder
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.output.layout import GENAI_FILE, is_speculative

_PACKAGE, _MODULE = "onnxruntime-genai", "onnxruntime_genai"
NEEDED = (0, 18)
"""The first version with drafts."""
MOST_DRAFT_TOKENS = 16


class GenaiModel:
    """A folder loaded in onnxruntime-genai, which continues prompts greedily and reads texts."""

    def __init__(self, folder: Path) -> None:
        """Raise NirvanaError when onnxruntime-genai refuses ``folder``."""
        import onnxruntime_genai  # an optional extra: imported when it is asked for

        self._genai: Any = onnxruntime_genai
        self._folder, self._model = folder, _loaded(folder)

    def generate(self, prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
        """New ids behind a prompt [1, T], up to a stop token of the config, which is left out."""
        parameters = self._genai.GeneratorParams(self._model)
        length = prompt.shape[1] + new_tokens
        parameters.set_search_options(max_length=length, do_sample=False, repetition_penalty=1.0)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(prompt[0].astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[prompt.shape[1] :]]

    def encoder(self) -> Callable[[str], list[int]]:
        """Turns text into ids, with the special tokens of the folder's tokenizer.

        Raises NirvanaError when onnxruntime-genai refuses that.
        """
        try:
            tokenizer = self._genai.Tokenizer(self._model)
            tokenizer.update_options(add_special_tokens="true")  # left out unless asked for
        except RuntimeError as error:
            raise NirvanaError(
                f"onnxruntime-genai cannot read the tokenizer in {self._folder}: {error}.",
                hint="Its files are copied anew by: nirvana-deploy export CHECKPOINT "
                f"--out {self._folder} --force",
            ) from error
        return lambda text: [int(token) for token in tokenizer.encode(text)]


def _loaded(folder: Path) -> Any:
    import onnxruntime_genai

    try:
        return onnxruntime_genai.Model(str(folder))
    except RuntimeError as error:
        unknown = "It takes no key that it does not know. " if "nknown value" in str(error) else ""
        raise NirvanaError(
            f"onnxruntime-genai cannot load {folder}: {error}.",
            hint=f"{unknown}genai_config.json is written anew by: "
            f"nirvana-deploy export CHECKPOINT --out {folder} --force",
        ) from error


@dataclass(frozen=True)
class Answer:
    """One greedy answer."""

    ids: tuple[int, ...]
    decode_ms: float
    """All of it but the reading of the prompt."""
    stats: Mapping[str, float]
    """What onnxruntime-genai counted; of a model without a draft, zeros."""

    @property
    def token_ms(self) -> float:
        """Per token of the answer."""
        return self.decode_ms / max(1, len(self.ids))


def require_speculative() -> None:
    """Raise NirvanaError unless an onnxruntime-genai that takes drafts is installed."""
    if find_spec(_MODULE) is None:
        raise MissingExtraError("A model with a draft", package=_PACKAGE, extra="genai")
    found = version(_PACKAGE)
    wanted = ".".join(map(str, NEEDED))
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < NEEDED:
        raise NirvanaError(
            f"onnxruntime-genai {found} takes no draft model: {wanted} is the first version that does.",
            hint=f"{pip_install()} '{_PACKAGE}>={wanted}'",
        )


class GenaiAnswers:
    """A folder loaded in onnxruntime-genai, with or without a draft."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        """Raise NirvanaError when onnxruntime-genai refuses ``folder``; ``threads`` None leaves it to it."""
        import onnxruntime_genai  # an optional extra

        self._genai: Any = onnxruntime_genai
        try:
            config = onnxruntime_genai.Config(str(folder))
            if threads is not None:
                config.overlay(json.dumps(_threads(threads, draft=is_speculative(folder))))
            self._model = onnxruntime_genai.Model(config)
        except RuntimeError as error:
            raise NirvanaError(f"onnxruntime-genai cannot load {folder}: {error}.") from error

    def answer(self, prompt: Sequence[int], *, new_tokens: int, draft_tokens: int | None = None) -> Answer:
        """Continue ``prompt`` greedily by at most ``new_tokens``, ``draft_tokens`` [the folder's] a round."""
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=len(prompt) + new_tokens, do_sample=False, repetition_penalty=1.0
        )
        if draft_tokens is not None:
            parameters.set_speculative_options(max_draft_tokens=draft_tokens)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        started = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        decode_ms = 1e3 * (time.perf_counter() - started)
        ids = tuple(int(token) for token in generator.get_sequence(0)[len(prompt) :])
        return Answer(ids, decode_ms, generator.get_speculative_stats())


def _threads(threads: int, *, draft: bool) -> dict[str, Any]:
    options = {"session_options": {"intra_op_num_threads": threads}}
    return {"model": {"decoder": options, **({"draft": options} if draft else {})}}


@contextmanager
def target_alone(folder: Path) -> Iterator[Path]:
    """The target of a folder with a draft, as a folder that onnxruntime-genai runs without."""
    config = read_json(folder / GENAI_FILE)
    config["model"].pop("draft", None)
    config.pop("speculative", None)
    with scratch_folder(folder.parent) as scratch:
        for file in files_under(folder):
            if file.parent == folder and file.name != GENAI_FILE:
                link(file, scratch / file.name)
        write_json(scratch / GENAI_FILE, config)
        yield scratch


def draft_tokens_of(folder: Path) -> int:
    """Tokens that the draft of a folder proposes per round."""
    config = read_json(folder / GENAI_FILE)
    return int(config.get("speculative", {}).get("max_draft_tokens", 4))
