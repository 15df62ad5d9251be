"""Documents as one stream of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.progress import Progress

_PIECE_CHARACTERS = 1 << 18


def token_stream(documents: Sequence[str], tokenizer: Any, progress: Progress) -> NDArray[np.int64]:
    """Tokenise documents into one int64 stream, EOS between them; long ones piece by piece."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    with progress.task("Tokenising", len(documents)) as advance:
        for index, document in enumerate(documents):
            if index:
                stream += separator
            for piece in _pieces(document):
                stream += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            advance(1)
    return np.array(stream, dtype=np.int64)


def _pieces(document: str) -> Iterator[str]:
    """Split ``document`` into pieces of bounded size, at line ends if possible."""
    start = 0
    for end in (match.end() for match in re.finditer(r"\n", document)):
        if end - start >= _PIECE_CHARACTERS:
            yield document[start:end]
            start = end
    if start < len(document):
        yield document[start:]
