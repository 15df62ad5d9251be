"""Convert a GGUF file once into a folder of safetensors, kept in the user's cache.

The folder is named by the sha256 of the GGUF file and holds ``converted.json`` with the sha256 of every
file in it, so an entry that is damaged or half written is noticed and built again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nirvana_deploy.base.artifact import sha256_of, whole_folder, write_json
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.resources import require_free_bytes
from nirvana_deploy.model.families import FAMILIES
from nirvana_deploy.model.gguf.cuts import drop_strangers, read_as_llama_cpp
from nirvana_deploy.model.gguf.facts import ROPE_DIVISORS, config_changes, require_known_keys
from nirvana_deploy.model.gguf.reader import opened, require_magic, text_field

_RECORD = "converted.json"
_CONVERSIONS = "gguf-3"
"""Of which kind: those of earlier ones lack what transformers' reader leaves out of weights or tokenizer."""


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
    require_magic(gguf)  # before a file is read that may be endless
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
    return (cache or cache_folder()) / _CONVERSIONS / gguf_sha256


def _is_file(path: Path, *, size_bytes: int, sha256: str) -> bool:
    """Whether ``path`` has this size and content; the size is compared first because it costs nothing."""
    return path.is_file() and path.stat().st_size == size_bytes and sha256_of(path) == sha256


def read_header(gguf: Path) -> GgufHeader:
    """Read a GGUF file's header and check that every tensor it announces is inside the file.

    Raises NirvanaError for a file that is not GGUF, is truncated or corrupted, or whose architecture this
    project does not handle; MissingExtraError without the package gguf.
    """
    require_gguf_extra()
    with opened(gguf) as reader:
        architecture = text_field(reader, "general.architecture")
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        licence = text_field(reader, "general.license")
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


def _convert(gguf: Path, out: Path, progress: Progress) -> None:
    """Write ``gguf`` as an fp32 Hugging Face folder to ``out``."""
    import torch
    from gguf import GGUFReader
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _gguf_bar(progress):
        try:
            config = _complete_config(gguf)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            read_as_llama_cpp(tokenizer, GGUFReader(gguf))
            model, found = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (ValueError, LookupError, TypeError, RuntimeError, StrictDataclassError) as error:
            raise NirvanaError(f"transformers cannot read {gguf}: {error}.") from error
        _require_all_tensors(gguf, model, found["missing_keys"])
        # The weights are plain fp32 now; both would make save_pretrained describe them as quantized.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        if stops := _stop_ids(gguf):
            model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        drop_strangers(out / "tokenizer.json", model.config.vocab_size)


def _complete_config(gguf: Path) -> Any:
    """The config object that transformers reads, with what the file says beyond that."""
    from gguf import GGUFReader
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    reader = GGUFReader(gguf)
    architecture = str(text_field(reader, "general.architecture"))
    values = {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(f"{architecture}.")
    }
    read = {key for key, name in GGUF_CONFIG_MAPPING.get(architecture, {}).items() if name}
    require_known_keys(values, architecture, also=read)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    divisors = np.array(tensors[ROPE_DIVISORS].data) if ROPE_DIVISORS in tensors else None
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for key, value in config_changes(values, divisors, tensors, settings=config.to_dict()).items():
        setattr(config, key, value)
    return config


def _require_all_tensors(gguf: Path, model: Any, missing: Collection[str]) -> None:
    """Raise NirvanaError unless every tensor of the file is in ``model`` and nothing else is.

    A bias that the file leaves out beside others is zero, as it is to llama.cpp.
    """
    import torch
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    reader = GGUFReader(gguf)
    processor = TENSOR_PROCESSORS.get(text_field(reader, "general.architecture"), TensorProcessor)
    read = {ROPE_DIVISORS, *get_gguf_hf_weights_map(model, processor(config=model.config.to_dict()))}
    unread = [tensor.name for tensor in reader.tensors if tensor.name not in read]
    lacking = [name for name in missing if not name.endswith(".bias")]
    for names, what in ((unread, "that this tool has no place for"), (lacking, "missing that it needs")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise NirvanaError(
                f"Unsupported: {gguf.name} has tensors {what}: {', '.join(sorted(names)[:3])}{more}.",
                hint="Pass the Hugging Face folder of the model instead.",
            )
    with torch.no_grad():
        for name in missing:
            model.get_parameter(name).zero_()


def _stop_ids(gguf: Path) -> list[int]:
    """The tokens that end an answer: of the text, of a turn, of a message."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields = (reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(field.contents()) for field in fields if field is not None))


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
