"""Bytes of a user's file to text: unpacked, decoded, or named as what they are, never taken for text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError

_PACKED: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", ".gz", gzip.decompress),
    (b"BZh", ".bz2", bz2.decompress),
    (b"\xfd7zXZ\x00", ".xz", lzma.decompress),
)
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "Unpack it: zstd -d {name}"),
    (b"PK\x03\x04", "a zip archive (or an office document)", "Unpack it: unzip {name}"),
    (b"%PDF", "a PDF document", "Take the text out: pdftotext {name} {stem}.txt"),
    (b"ARROW1", "an Arrow file", "Save it as parquet or .jsonl."),
    (b"GGUF", "a model", "Give a text."),
    (b"SQLite format 3", "a database", "Save the texts as .jsonl."),
)
_MARKS: tuple[tuple[bytes, str], ...] = (  # the longer ones first: UTF-32 begins as UTF-16 does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LOOKED_AT_BYTES = 1 << 12
PARQUET = b"PAR1"


def unpacked(path: Path, data: bytes) -> tuple[Path, bytes]:
    """Name and content of what a file holds, decompressed; raises NirvanaError for what holds no text."""
    for magic, suffix, decompress in _PACKED:
        if data.startswith(magic):
            try:
                inside = decompress(data)
            except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
                raise NirvanaError(f"{path} cannot be unpacked: {error}.") from error
            name = path.with_suffix("") if path.suffix.lower() == suffix else path
            return unpacked(name, inside)
    for magic, kind, hint in _FOREIGN:
        if data.startswith(magic):
            raise NirvanaError(
                f"{path} is {kind}, not a text.", hint=hint.format(name=path.name, stem=path.stem)
            )
    return path, data


def decoded(path: Path, data: bytes) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32; raises NirvanaError for other bytes, with the offset."""
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _unmarked(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise NirvanaError(
            f"{path} is not {encoding.upper().removesuffix('-SIG')}: byte {data[error.start]:#04x} "
            f"at offset {error.start}.",
            hint=f"Convert it: iconv -f LATIN1 -t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}",
        ) from error
    if (zero := text.find("\0")) >= 0:
        raise NirvanaError(
            f"{path} is not a text: character {zero} of it is a zero, as in programs and data."
        )
    return text


def _unmarked(data: bytes) -> str:
    """UTF-16 without a mark has a zero in every other byte of Latin letters."""
    begin = data[:_LOOKED_AT_BYTES]
    even, odd = begin[0::2].count(0), begin[1::2].count(0)
    if min(even, odd) == 0 and max(even, odd) > len(begin) // 4:
        return "utf-16-le" if odd else "utf-16-be"
    return "utf-8"
