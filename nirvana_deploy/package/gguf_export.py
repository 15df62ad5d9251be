"""Write a checkpoint as one GGUF file for llama.cpp, with gguf-py, one tensor at a time.

The weight type decides about inputs too: llama.cpp rounds the inputs of a product with q8_0 or q4_0 weights
to 8 bits in blocks of 32 (benchmarks/NOTES.md).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import whole_file
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.base.resources import require_free_bytes
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.config import limited
from nirvana_deploy.model.family import GgufArchitecture
from nirvana_deploy.output.layout import SCHEMA_KEY
from nirvana_deploy.package.gguf_layout import (
    GgufTensor,
    architecture_for,
    gguf_tensors,
    metadata,
    rope_of,
    settings_of,
)
from nirvana_deploy.package.gguf_tokenizer import tokenizer_metadata

GGUF_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""Weight types by the names of llama.cpp's command line -> gguf-py's name."""
_SCHEMA = 1
"""Under SCHEMA_KEY, which llama.cpp does not read."""
_SEAL_KEY = "nirvana_deploy.sha256"
_UNSEALED = b"0" * 64
"""What stands under _SEAL_KEY while the sha256 of the file is taken, which then takes its place: by it a file
of ours is known. llama-quantize copies the key, and then it is no longer true."""
_HEADER_BYTES, _BLOCK_BYTES = 4096, 1 << 20
_IN_BLOCKS = ("q8_0", "q4_0")
_TABLES = ("token_embd.weight", "output.weight")
"""Embedding and head; beside 4-bit linears they take 8 bits, as they lose most by 4 (benchmarks/NOTES.md)."""
_QUANTIZED_ROWS = 4096  # converted at a time: the temporaries of a conversion are several times its size


@dataclass(frozen=True)
class GgufFile:
    """A written GGUF file."""

    path: Path
    architecture: str
    tensors: int
    size_bytes: int
    left_in_f16: int
    """Matrices whose rows are no whole blocks of a quantized type, which stayed in f16."""


def gguf_from_checkpoint(
    checkpoint: Checkpoint, out: Path, *, weight_type: str = "f16", progress: Progress = SILENT
) -> GgufFile:
    """Write a decoder checkpoint, dense or pruned, as the GGUF file ``out``; it appears whole or not at all.

    ``weight_type``, of ``GGUF_TYPES``, concerns matrices; norms and biases are float32.
    llama.cpp's own ``llama-quantize`` makes other types of it. Raises NirvanaError for a model that
    llama.cpp has no architecture for, a tokenizer it would read otherwise, or a disk without room, and
    MissingExtraError without gguf.
    """
    gguf = _gguf()
    look_up(weight_type, GGUF_TYPES, what="GGUF weight type")
    shape, full_config = checkpoint.shape, checkpoint.pretrained_config
    computation = None if shape.family.encoder_decoder else checkpoint.computation
    architecture = architecture_for(shape, computation)
    settings = settings_of(architecture, full_config, checkpoint.computation)
    kind = checkpoint.computation.widest.kind
    parameters = full_config.rope_parameters[kind] if kind else full_config.rope_parameters
    frequencies, scaling = checkpoint.rotary_frequencies(kind)
    rope = rope_of(architecture, parameters, frequencies, scaling)
    tensors = gguf_tensors(architecture, shape, checkpoint.multiplied_weights, rope_factors=rope.factors)
    kinds = [_kind(gguf, tensor, weight_type) for tensor in tensors]
    needed_bytes = sum(_nbytes(gguf, tensor, kind) for tensor, kind in zip(tensors, kinds, strict=True))
    require_free_bytes(out, needed_bytes, what="The GGUF file")
    config = limited(full_config.to_dict(), checkpoint.context_tokens)
    values = metadata(architecture, shape, {**config, "rms_norm_eps": full_config.rms_norm_eps})
    with whole_file(out) as partial:
        writer = gguf.GGUFWriter(partial, architecture.name)
        try:
            writer.add_uint32(SCHEMA_KEY, _SCHEMA)
            writer.add_string(_SEAL_KEY, _UNSEALED.decode())
            _add_metadata(gguf, writer, architecture, values | rope.metadata | settings)
            _add_plain(writer, tokenizer_metadata(checkpoint))
            writer.add_name(out.stem)
            writer.add_file_type(_file_type(gguf, weight_type))
            if weight_type in _IN_BLOCKS:
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _write_tensors(gguf, writer, tensors, kinds, progress)
        finally:
            writer.close()
        _seal(partial)
    return GgufFile(
        path=out,
        architecture=architecture.name,
        tensors=len(tensors),
        size_bytes=out.stat().st_size,
        left_in_f16=kinds.count("f16") if weight_type in _IN_BLOCKS else 0,
    )


def wrote_gguf(path: Path) -> bool:
    """Whether this tool wrote a GGUF file, every byte of it: it holds its own sha256."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    place = _place_of_seal(header)
    if not header.startswith(b"GGUF") or place is None:
        return False
    return header[place : place + len(_UNSEALED)] == _digest(path, place)


def _seal(path: Path) -> None:
    """Put the sha256 of a written file into its header."""
    with path.open("r+b") as file:
        place = _place_of_seal(file.read(_HEADER_BYTES))
        assert place is not None
        file.seek(place)
        file.write(_digest(path, place))


def _place_of_seal(header: bytes) -> int | None:
    """Where the text under _SEAL_KEY begins: behind the key, its type (4 bytes) and the length (8 bytes)."""
    key = header.find(_SEAL_KEY.encode())
    place = key + len(_SEAL_KEY) + 12
    return None if key < 0 or place + len(_UNSEALED) > len(header) else place


def _digest(path: Path, place: int) -> bytes:
    """The sha256 of a file, in hex, as if it were not sealed."""
    with path.open("rb") as file:
        header = bytearray(file.read(_HEADER_BYTES))
        header[place : place + len(_UNSEALED)] = _UNSEALED
        digest = hashlib.sha256(header)
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest().encode()


def _gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise MissingExtraError("Writing GGUF files", package="gguf", extra="gguf") from None
    return gguf


def _kind(gguf: Any, tensor: GgufTensor, weight_type: str) -> str:
    """The type a tensor is stored in: rows that are not whole blocks stay f16, as in llama.cpp."""
    if not tensor.is_matrix:
        return "f32"
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[GGUF_TYPES[weight_type]]]
    if tensor.shape[1] % block:
        return "f16"
    return "q8_0" if weight_type in _IN_BLOCKS and tensor.name in _TABLES else weight_type


def _file_type(gguf: Any, weight_type: str) -> int:
    """What the header says of most tensors."""
    name = GGUF_TYPES[weight_type]
    return int(gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"])


def _add_metadata(gguf: Any, writer: Any, architecture: GgufArchitecture, values: dict[str, Any]) -> None:
    for key, value in values.items():
        name = f"{architecture.name}.{key}"
        if isinstance(value, list):
            writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.INT32)
        else:
            _add(writer, name, value)


def _add_plain(writer: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            _add(writer, key, value)


def _add(writer: Any, key: str, value: bool | int | float | str) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _write_tensors(
    gguf: Any, writer: Any, tensors: Sequence[GgufTensor], kinds: Sequence[str], progress: Progress
) -> None:
    for tensor, kind in zip(tensors, kinds, strict=True):
        dtype, stored = _stored(gguf, tensor.shape, kind)
        raw_type = gguf.GGMLQuantizationType[GGUF_TYPES[kind]]
        writer.add_tensor_info(tensor.name, stored, dtype, _nbytes(gguf, tensor, kind), raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with progress.task("Writing GGUF weights", len(tensors)) as advance:
        for tensor, kind in zip(tensors, kinds, strict=True):
            writer.write_tensor_data(_encoded(gguf, tensor, kind))
            advance(1)
        for file in writer.fout or ():
            file.flush()
            os.fsync(file.fileno())


def _stored(gguf: Any, shape: tuple[int, ...], kind: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """dtype and shape of the array that holds a tensor: bytes for the types numpy does not have."""
    if kind in ("f32", "f16"):
        return np.dtype({"f32": np.float32, "f16": np.float16}[kind]), shape
    raw_type = gguf.GGMLQuantizationType[GGUF_TYPES[kind]]
    return np.dtype(np.uint8), gguf.quants.quant_shape_to_byte_shape(shape, raw_type)


def _nbytes(gguf: Any, tensor: GgufTensor, kind: str) -> int:
    dtype, stored = _stored(gguf, tensor.shape, kind)
    return int(np.prod(stored)) * dtype.itemsize


def _encoded(gguf: Any, tensor: GgufTensor, kind: str) -> NDArray[Any]:
    """The tensor in its stored form, converted some rows at a time."""
    dtype, stored = _stored(gguf, tensor.shape, kind)
    raw_type = gguf.GGMLQuantizationType[GGUF_TYPES[kind]]
    source = tensor.read()
    if tuple(source.shape) != tensor.shape:
        raise NirvanaError(f"Tensor {tensor.name!r}: expected {tensor.shape}, got {tuple(source.shape)}.")
    encoded = np.empty(stored, dtype=dtype)
    for first in range(0, len(source), _QUANTIZED_ROWS):
        rows = slice(first, first + _QUANTIZED_ROWS)
        encoded[rows] = gguf.quants.quantize(source[rows].to(torch.float32).contiguous().numpy(), raw_type)
    return encoded
