"""What an engine is, in lines for people, from its record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nirvana_deploy.base.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from nirvana_deploy.runtime.tensorrt.record import EngineRecord, ProfileRecord, TensorRecord

_SHOWN_LAYERS = (
    "ATTENTION_INPUT",
    "KV_CACHE_UPDATE",
    "ROTARY_EMBEDDING",
    "MATRIX_MULTIPLY",
    "DEQUANTIZE",
    "QUANTIZE",
)


def engine_lines(path: Path, record: EngineRecord) -> Iterator[str]:
    """The record, most important first."""
    stored = f", weights {record.quantization}" if record.quantization else ""
    extras = [
        word
        for word, on in (("weight streaming", record.weight_streaming), ("stripped", record.stripped))
        if on
    ]
    yield (
        f"{path}: {record.runtime} {record.runtime_version} for {', '.join(record.targets)}; {record.part}, "
        f"{record.dtype}{stored}, cache {record.kv}{''.join(f', {extra}' for extra in extras)}"
    )
    yield (
        f"  {format_bytes(record.engine_bytes)}, {format_bytes(record.weights_bytes)} of it weights; built "
        f"in {format_seconds(record.build.seconds)} ({format_seconds(record.build.cpu_seconds)} of CPU), at "
        f"most {format_bytes(record.build.peak_rss_bytes)} of host memory"
    )
    layers = ", ".join(f"{record.layers[kind]} {kind}" for kind in _SHOWN_LAYERS if kind in record.layers)
    yield f"  layers: {layers}, {sum(record.layers.values())} in all"
    for side, tensors in (("inputs", record.inputs), ("outputs", record.outputs)):
        yield f"  {side}: {'; '.join(_tensor(one) for one in tensors[:4])}{_more(len(tensors) - 4)}"
    for index, profile in enumerate(record.profiles):
        yield f"  profile {index}, {profile.name}: {_ranges(profile)}"
    yield from (f"  note: {note}" for note in record.notes)
    yield from (f"  the builder warns: {warning}" for warning in record.log.warnings)
    digests = (f"{name} {digest[:12]}" for name, digest in record.onnx_sha256.items())
    yield f"  ONNX sha256: {', '.join(digests)}"
    yield f"  the same by the vendor's tool: {_shortened(record.trtexec, 200)}"


def _shortened(text: str, at_most: int) -> str:
    """A command line of a deep model names every cache input six times: the JSON has all of it."""
    if len(text) <= at_most:
        return text
    return f"{text[:at_most]}... ({len(text):,} characters; whole in the engine's JSON)"


def _tensor(one: TensorRecord) -> str:
    alias = f" in the memory of {one.alias}" if one.alias else ""
    return f"{one.name} {one.dtype} [{', '.join('*' if d is None else str(d) for d in one.shape)}]{alias}"


def _more(count: int) -> str:
    return f"; {count} more" if count > 0 else ""


def _ranges(profile: ProfileRecord) -> str:
    """Smallest to largest shape of the first inputs, the tuned one between."""

    def one(ends: tuple[tuple[int, ...], ...]) -> str:
        return " .. ".join("x".join(map(str, end)) for end in ends)

    return "; ".join(f"{name} {one(ends)}" for name, ends in list(profile.shapes.items())[:3])
