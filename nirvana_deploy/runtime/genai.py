"""Greedy tokens of an ONNX folder in onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError


@contextmanager
def genai_tokens(folder: Path) -> Iterator[Callable[[NDArray[np.int64], int], list[int]]]:
    """Load ``folder`` in onnxruntime-genai and yield a greedy generator: (prompt [1, T], count) -> new ids.

    It ends at a stop token of the config, which onnxruntime-genai leaves out of the result. Raises
    NirvanaError when onnxruntime-genai refuses the folder.
    """
    import onnxruntime_genai  # an optional extra: imported when it is asked for

    model = _loaded(folder)

    def generate(prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = prompt.shape[1] + new_tokens
        parameters.set_search_options(max_length=length, do_sample=False, repetition_penalty=1.0)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt[0].astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[prompt.shape[1] :]]

    yield generate


@contextmanager
def genai_encoder(folder: Path) -> Iterator[Callable[[str], list[int]]]:
    """Load ``folder`` in onnxruntime-genai and yield text -> ids, with the special tokens of its tokenizer.

    Raises NirvanaError when onnxruntime-genai refuses the folder.
    """
    import onnxruntime_genai

    model = _loaded(folder)
    try:
        tokenizer = onnxruntime_genai.Tokenizer(model)
        tokenizer.update_options(add_special_tokens="true")  # left out unless asked for
    except RuntimeError as error:
        raise NirvanaError(
            f"onnxruntime-genai cannot read the tokenizer in {folder}: {error}.",
            hint=f"Its files are copied anew by: nirvana-deploy export CHECKPOINT --out {folder} --force",
        ) from error
    yield lambda text: [int(token) for token in tokenizer.encode(text)]


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
