"""The JSON sidecar of an engine: everything readable without a GPU.

Names, dtypes and dimensions, profiles, precision, targets, versions and the cost of the build. It is written
after the engine, so an engine without its JSON was never finished, and one whose bytes differ is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json

ENGINE_SCHEMA = 1
ENGINE_SUFFIX = ".engine"
ENCODER, DECODER = "encoder", "decoder"
"""Parts of an encoder-decoder, and the ends of their engines' names."""
ENCODER_STATES = "encoder_hidden_states"
"""What its decoder reads of its encoder."""


@dataclass(frozen=True)
class TensorRecord:
    """One input or output of the engine."""

    name: str
    dtype: str
    """numpy's name: ``int64``, ``int32``, ``float16``, ``bfloat16``, ``float32``, ``bool``."""
    shape: tuple[int | None, ...]
    """None where the profiles give the range."""
    alias: str | None = None
    """Of an output: the input with the same address (in-place cache update)."""


@dataclass(frozen=True)
class ProfileRecord:
    """One optimization profile; its position in :attr:`EngineRecord.profiles` is its index."""

    name: str
    """``prefill`` or ``decode``; ``encoder`` for an encoder."""
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    """Input name -> (minimum, optimum, maximum) shape, of every input."""


@dataclass(frozen=True)
class BuildCost:
    """What building cost, in the process that built."""

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    parse_seconds: float
    system_seconds: float = 0.0
    """Of the CPU time: what the system took, for memory and files; records before this was kept have 0."""


@dataclass(frozen=True)
class LogDigest:
    """The builder's log: the whole of it is in ``file``, beside the engine."""

    file: str
    sha256: str
    lines: int
    warnings: tuple[str, ...]
    """Each distinct warning once, with what it means where that is known."""


@dataclass(frozen=True)
class EngineRecord:
    """The JSON beside an engine."""

    name: str
    part: str
    """``decoder`` (causal, with KV cache), or a part of an encoder-decoder: ``encoder``, ..."""
    runtime: str
    """``tensorrt-rtx`` or ``tensorrt``."""
    runtime_version: str
    """Of the builder; an engine loads in the same version (RTX: the same minor version) alone."""
    targets: tuple[str, ...]
    """GPU architectures, ``sm80``, ...; for ``tensorrt`` the one of the building machine."""
    dtype: str
    """Of activations and cache: ``fp16``, ``bf16`` or ``fp32``."""
    quantization: str | None
    """``int8``, ``w8``, ``w4``, or None."""
    kv: str
    """``concat`` (the cache grows), ``in-place`` (fixed length, outputs alias inputs), ``none``."""
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    profiles: tuple[ProfileRecord, ...]
    layers: Mapping[str, int]
    """Layers of the parsed network by type."""
    weights_bytes: int
    """Bytes of the network's constants."""
    engine_file: str
    engine_bytes: int
    engine_sha256: str
    onnx_sha256: Mapping[str, str]
    """Of the files that were parsed: ``model.onnx`` and its external data."""
    weight_streaming: bool
    stripped: bool
    """Without weights: refit it from the ONNX folder before use."""
    workspace_bytes: int | None
    build: BuildCost
    log: LogDigest
    versions: Mapping[str, str]
    trtexec: str
    """The equivalent command line of the vendor's tool."""
    notes: tuple[str, ...]
    """What the build wants its user to know."""

    def __repr__(self) -> str:
        return (
            f"EngineRecord({self.name!r}, {self.part}, {self.runtime} {self.runtime_version} for "
            f"{', '.join(self.targets)}, {self.dtype}, {self.engine_bytes:,} bytes)"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema": ENGINE_SCHEMA, **dataclasses.asdict(self)}


def record_path(engine: Path) -> Path:
    """The JSON of an engine file."""
    return engine.with_suffix(".json")


def is_part_of_seq2seq(record: EngineRecord) -> bool:
    """Whether an engine is one of the two of an encoder-decoder."""
    return record.part == ENCODER or any(tensor.name == ENCODER_STATES for tensor in record.inputs)


def encoder_beside(decoder: Path) -> Path:
    """The encoder's engine of an encoder-decoder: ``x-encoder.engine`` beside ``x-decoder.engine``."""
    return decoder.with_name(f"{decoder.stem.removesuffix(f'-{DECODER}')}-{ENCODER}{ENGINE_SUFFIX}")


def engine_files(engine: Path) -> tuple[Path, ...]:
    """All engines of the model that ``engine`` opens: a decoder's own, or both of an encoder-decoder."""
    if is_part_of_seq2seq(read_engine_record(engine, check_bytes=False)):
        return engine, encoder_beside(engine)
    return (engine,)


def read_engine_record(engine: Path | str, *, check_bytes: bool = True) -> EngineRecord:
    """Read the record of an engine file, and prove that the file is the one it describes.

    ``check_bytes`` False compares the size alone, not the sha256 (a large engine takes seconds to read).
    Raises NirvanaError when either file is missing, or they do not belong together.
    """
    engine = Path(engine)
    again = "Build it again: nirvana-deploy build-engine DIR --force"
    if not engine.is_file():
        raise NirvanaError(f"{engine} does not exist.", hint=again)
    path = record_path(engine)
    if not path.is_file():
        raise NirvanaError(
            f"{engine} has no {path.name} beside it: its build was never finished, or it was copied alone.",
            hint=again,
        )
    record = read_json(path, EngineRecord, schema=ENGINE_SCHEMA, hint=again)
    found_bytes = engine.stat().st_size
    if found_bytes != record.engine_bytes:
        what = "truncated" if found_bytes < record.engine_bytes else "longer than it was"
        raise NirvanaError(
            f"{engine} is {what}: {found_bytes:,} bytes, and {path.name} says {record.engine_bytes:,}.",
            hint=again,
        )
    if check_bytes and sha256_of(engine) != record.engine_sha256:
        raise NirvanaError(
            f"{engine} is not the engine that {path.name} describes: its sha256 differs.", hint=again
        )
    return record
