"""The decision of an int8 quantization, as data: what was chosen, apart from the graph that it is applied to.

It is written to ``quantization.json`` and read again, so that the same decision can be applied to another
export of the same checkpoint (float16 for TensorRT, say) without calibrating twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict, cast

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.quantize.graph.linears import RECORD_FILE

SCHEMA = 1
_ZERO_EXPONENT = ord("m")


@dataclass(frozen=True)
class Int8Linear:
    """How the activations of one linear are quantized; its weight needs no decision."""

    bound: float
    """Values are quantized within [-bound, bound]."""
    outliers: tuple[int, ...] = ()
    """Input channels that are computed in float instead, beside the integer kernel."""


@dataclass(frozen=True)
class Int8Spec:
    """Everything that int8 needs to know beyond the float graph."""

    linears: Mapping[str, Int8Linear]
    """By module name; linears that are not here stay float."""
    smoothing: Mapping[str, NDArray[np.float32]]
    """Factors by fold name, powers of two."""
    alpha: float | None
    """Of the smoothing; None when there is none."""
    ranges: str
    """Range method."""
    kept_float: Mapping[str, str] = field(default_factory=dict)
    """Linears that stay float, and why."""

    def to_json(self) -> dict[str, Any]:
        """For quantization.json; factors 2^e are written as one letter a channel, "m" for e = 0."""
        return {
            "alpha": self.alpha,
            "ranges": self.ranges,
            "linears": {
                name: {"bound": linear.bound, "outliers": list(linear.outliers)}
                for name, linear in self.linears.items()
            },
            "kept_float": dict(self.kept_float),
            "smoothing": {name: as_letters(factors) for name, factors in self.smoothing.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Int8Spec:
        """What :meth:`to_json` wrote."""
        return cls(
            linears={
                name: Int8Linear(bound=linear["bound"], outliers=tuple(linear["outliers"]))
                for name, linear in data["linears"].items()
            },
            smoothing={name: from_letters(letters) for name, letters in data["smoothing"].items()},
            alpha=data["alpha"],
            ranges=data["ranges"],
            kept_float=data["kept_float"],
        )


class _LinearRecord(TypedDict):
    bound: Annotated[float, Meta(ge=0)]
    outliers: list[Annotated[int, Meta(ge=0)]]


class _SpecRecord(TypedDict):
    alpha: float | None
    ranges: str
    linears: dict[str, _LinearRecord]
    kept_float: dict[str, str]
    smoothing: dict[str, Annotated[str, Meta(pattern="^[!-~]*$")]]


class _Weights(TypedDict, total=False):
    rounding: Required[str]
    block_size: Required[int | None]


class _Sensitivity(TypedDict):
    layers: dict[str, float]
    linears: dict[str, float]


class _Coverage(TypedDict):
    promised: int
    found: int
    operators: dict[str, int]
    missing: list[str]


class QuantizationRecord(TypedDict, total=False):
    """The content of quantization.json."""

    schema: int
    scheme: Required[str]
    int8: _SpecRecord
    weights: _Weights
    linears: list[str]
    sensitivity: _Sensitivity | None
    coverage: _Coverage
    weights_bytes: int
    float_bytes: int


def read_spec(folder: Path) -> Int8Spec:
    """The int8 decision recorded in a quantized folder; raises NirvanaError when there is none."""
    record = read_record(folder)
    if "int8" not in record:
        raise NirvanaError(f"{folder} is quantized as {record['scheme']!r}; only int8 can be applied again.")
    return Int8Spec.from_json(record["int8"])


def read_record(folder: Path) -> dict[str, Any]:
    """``quantization.json`` of a quantized folder; raises NirvanaError when missing or of a newer schema."""
    path = folder / RECORD_FILE
    if not path.is_file():
        raise NirvanaError(
            f"{folder} holds no {RECORD_FILE}: it was not quantized by this tool.",
            hint="nirvana-deploy quantize DIR --scheme int8",
        )
    again = "Quantize again with this version."
    return cast(dict[str, Any], read_json(path, QuantizationRecord, schema=SCHEMA, hint=again))


def recorded_linears(record: Mapping[str, Any]) -> list[str]:
    """Names of the linears that a ``quantization.json`` says are quantized."""
    return list(record["linears"] if "linears" in record else record["int8"]["linears"])


def record_of(*, scheme: str, **entries: Any) -> dict[str, Any]:
    """The content of a ``quantization.json``; dataclasses among ``entries`` become objects."""
    return {
        "schema": SCHEMA,
        "scheme": scheme,
        **{
            name: asdict(entry) if hasattr(entry, "__dataclass_fields__") else entry
            for name, entry in entries.items()
        },
    }


def as_letters(factors: NDArray[np.float32]) -> str:
    """Factors [channels], powers of two, as one letter each; "m" is 1."""
    exponents = np.log2(factors).astype(np.int64)
    return "".join(chr(_ZERO_EXPONENT + int(exponent)) for exponent in exponents)


def from_letters(letters: str) -> NDArray[np.float32]:
    """The factors [channels] that :func:`as_letters` wrote."""
    return np.exp2(np.array([ord(letter) - _ZERO_EXPONENT for letter in letters], dtype=np.float32))
