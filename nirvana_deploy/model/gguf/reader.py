"""A GGUF file opened by gguf's reader: bounded by the file's end, and refused in a sentence where damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.reading import require_file

_MAGIC = b"GGUF"


@dataclass(frozen=True)
class GgufDescription:
    """What tells the model of one GGUF file from another."""

    architecture: str | None
    """Of llama.cpp: "llama", "deci", ..."""
    hidden_size: int | None
    """D."""
    layers: int | None
    """L."""
    tokens: tuple[str, ...]
    """The vocabulary, by id; empty where the file has none."""


def described(gguf: Path) -> GgufDescription:
    """Read what kind of model a GGUF file holds, of any architecture; its tensors are not read.

    Raises NirvanaError for a file that is not GGUF or damaged, MissingExtraError without the package gguf.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError("Reading a GGUF file", package="gguf", extra="gguf")
    with opened(gguf) as reader:
        architecture = text_field(reader, "general.architecture")
        hidden_size, layers = (
            reader.get_field(f"{architecture}.{key}") for key in ("embedding_length", "block_count")
        )
        tokens = reader.get_field("tokenizer.ggml.tokens")
        return GgufDescription(
            architecture=architecture,
            hidden_size=None if hidden_size is None else int(hidden_size.contents()),
            layers=None if layers is None else int(layers.contents()),
            tokens=() if tokens is None else tuple(map(str, tokens.contents())),
        )


@contextmanager
def opened(gguf: Path) -> Iterator[Any]:
    """gguf's reader of a file; raises NirvanaError for one that is not GGUF, truncated or corrupted."""
    require_magic(gguf)
    try:
        with np.errstate(over="raise"):
            reader = _bounded_reader(gguf)
        yield reader
    except (ValueError, LookupError, ArithmeticError) as error:
        raise NirvanaError(
            f"{gguf} is truncated or corrupted: its header announces more than its "
            f"{gguf.stat().st_size:,} bytes hold, or something that GGUF does not allow ({error}).",
            hint="Download the file again and compare its size and sha256 with the source.",
        ) from error


def require_magic(gguf: Path) -> None:
    """Raise NirvanaError unless ``gguf`` is a file that begins as GGUF does."""
    require_file(gguf)
    with gguf.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise NirvanaError(f"{gguf} is not a GGUF file: it begins with {magic!r}, not {_MAGIC!r}.")


def text_field(reader: Any, key: str) -> str | None:
    """The text under a key of the header, if any."""
    field = reader.get_field(key)
    return None if field is None else str(field.contents())


def _bounded_reader(gguf: Path) -> Any:
    """gguf's reader, which raises ValueError at the end of the file.

    Its own goes on with empty values: a list said to have 2**40 entries takes hours, and all memory.
    """
    from gguf import GGUFReader

    class BoundedReader(GGUFReader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **more: Any) -> Any:
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"something in it ends at byte {end:,}")
            return super()._get(offset, dtype, count, *order, **more)

    return BoundedReader(gguf)
