"""Convert a GGUF file once into a folder of safetensors, kept in the user's cache.

The folder is named by the sha256 of the GGUF file and holds ``converted.json`` with the sha256 of every
file in it, so an entry that is damaged or half written is noticed and built again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import sha256_of, whole_folder, write_json
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.resources import require_free_bytes
from nirvana_deploy.model.families import FAMILIES

_RECORD = "converted.json"
_MAGIC = b"GGUF"


OTHER_CACHE = "set NIRVANA_DEPLOY_CACHE to another folder"


def cache_folder() -> Path:
    """Where conversions are kept: NIRVANA_DEPLOY_CACHE, else the user's cache folder (XDG_CACHE_HOME)."""
    if own := os.environ.get("NIRVANA_DEPLOY_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "nirvana-deploy"


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself."""

    architecture: str
    """For example "llama", which Mistral files say too."""
    parameters: int
    """Weights of all tensors."""
    licence: str | None


@dataclass(frozen=True)
class Conversion:
    """A GGUF file as a Hugging Face folder."""

    folder: Path
    """fp32 safetensors, config, tokenizer."""
    licence: str | None
    """As the GGUF file says, None where it does not."""


def converted(
    gguf: Path, *, gguf_sha256: str | None = None, cache: Path | None = None, progress: Progress = SILENT
) -> Conversion:
    """The safetensors folder that equals ``gguf``, converting at most once.

    ``gguf_sha256`` saves hashing a file whose sha256 is known already. Raises NirvanaError for a file that
    is damaged or of an unsupported architecture, MissingExtraError without accelerate and gguf.
    """
    key = gguf_sha256 or sha256_of(gguf)
    if entry := find_converted(key, cache=cache):
        return entry
    target = _entry_folder(key, cache)
    header = read_header(gguf)
    require_free_bytes(target, 4 * header.parameters, what=f"Converting {gguf.name} to safetensors")
    progress.note(f"Converting {gguf.name} to safetensors, once, into {target}")
    with whole_folder(target, elsewhere=OTHER_CACHE) as partial:
        _convert(gguf, partial, progress)
        files = {
            path.name: {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(partial.iterdir())
        }
        record = {"schema": 1, "gguf_sha256": key, "licence": header.licence, "files": files}
        write_json(partial / _RECORD, record)
    return Conversion(folder=target, licence=header.licence)


def find_converted(gguf_sha256: str, *, cache: Path | None = None) -> Conversion | None:
    """The finished, undamaged conversion of the GGUF file with this sha256, or None."""
    entry = _entry_folder(gguf_sha256, cache)
    try:
        record = read_json(entry / _RECORD)
        whole = record["gguf_sha256"] == gguf_sha256 and all(
            _is_file(entry / name, **expected) for name, expected in record["files"].items()
        )
    except (NirvanaError, KeyError, TypeError, AttributeError):
        return None
    return Conversion(folder=entry, licence=record.get("licence")) if whole else None


def _entry_folder(gguf_sha256: str, cache: Path | None) -> Path:
    return (cache or cache_folder()) / "gguf" / gguf_sha256


def _is_file(path: Path, *, size_bytes: int, sha256: str) -> bool:
    """Whether ``path`` has this size and content; the size is compared first because it costs nothing."""
    return path.is_file() and path.stat().st_size == size_bytes and sha256_of(path) == sha256


def read_header(gguf: Path) -> GgufHeader:
    """Read a GGUF file's header and check that every tensor it announces is inside the file.

    Raises NirvanaError for a file that is not GGUF, is truncated or corrupted, or whose architecture this
    project does not handle; MissingExtraError without the package gguf.
    """
    require_gguf_extra()
    with gguf.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise NirvanaError(f"{gguf} is not a GGUF file: it begins with {magic!r}, not {_MAGIC!r}.")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
        architecture = _text_field(reader, "general.architecture")
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        licence = _text_field(reader, "general.license")
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise NirvanaError(
            f"{gguf} is truncated or corrupted: its header announces more than its "
            f"{gguf.stat().st_size:,} bytes hold, or something that GGUF does not allow ({error}).",
            hint="Download the file again and compare its size and sha256 with the source.",
        ) from error
    known = set(FAMILIES) | {family.gguf.name for family in FAMILIES.values() if family.gguf}
    if architecture not in known:
        raise NirvanaError(
            f"Unsupported architecture: {gguf.name} says {architecture!r}. "
            f"Supported: {', '.join(sorted(known))}."
        )
    if not parameters:
        raise NirvanaError(f"{gguf} holds no tensors (a vocabulary-only GGUF file?).")
    return GgufHeader(architecture=architecture, parameters=parameters, licence=licence)


def require_gguf_extra() -> None:
    """Raise MissingExtraError unless the packages that read GGUF are installed."""
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise MissingExtraError("Reading a GGUF file", package=package, extra="gguf")


def _text_field(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else str(field.contents())


def _convert(gguf: Path, out: Path, progress: Progress) -> None:
    """Write ``gguf`` as an fp32 Hugging Face folder to ``out``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _gguf_bar(progress):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
            raise NirvanaError(f"transformers cannot read {gguf}: {error}.") from error
        # The weights are plain fp32 now; both would make save_pretrained describe them as quantized.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


@contextmanager
def _gguf_bar(progress: Progress) -> Iterator[None]:
    """Let transformers count the tensors it dequantizes on ``progress``; its other bars are off inside."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    def counted(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        with progress.task("Converting GGUF", len(tensors)) as advance:
            for tensor in tensors:
                yield tensor
                advance(1)

    bar, bars_on = reader.tqdm, logging.is_progress_bar_enabled()
    reader.tqdm = counted  # it takes no bar from its caller and obeys no switch
    logging.disable_progress_bar()
    try:
        yield
    finally:
        reader.tqdm = bar
        if bars_on:
            logging.enable_progress_bar()
