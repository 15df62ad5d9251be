"""Tokenizers of strangers: loaded by transformers, whose library may fail in any way on a damaged file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import TokenizerError
from nirvana_deploy.base.reading import require_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What a tokenizer consists of, where it exists."""


def tokenizer_in(folder: Path, **known: Any) -> Any:
    """The tokenizer of transformers in ``folder``; ``known`` is passed on (a config that it cannot read).

    Raises NirvanaError for a file that cannot be read, TokenizerError for one that the library fails on.
    """
    for name in TOKENIZER_FILES:
        if os.path.lexists(folder / name):
            require_file(folder / name)
    from transformers import AutoTokenizer  # two seconds that other users of this module are spared

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **known)
        _without_cache(tokenizer)
        tokenizer("text")
    except Exception as error:
        raise TokenizerError(folder, error) from error
    except BaseException as error:  # a panic of its Rust part, which is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(folder, RuntimeError(str(error))) from error
    return tokenizer


def _without_cache(tokenizer: Any) -> None:
    """Let the Rust part of a tokenizer remember no words.

    tokenizers 0.23.3 keeps them by model and thread until the thread ends, though the model is gone: 3 MB for
    each tokenizer that has read 9,000 words. A text of 200,000 characters takes the same 0.3 s without.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if hasattr(model, "_resize_cache"):
        model._resize_cache(0)
