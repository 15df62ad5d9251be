"""Quantization schemes, one row each: all that commands, stages, engines and verification ask of them.

Light to import. A new scheme is one row here and one module whose function rewrites a graph
(:class:`nirvana_deploy.quantize.rewriting.Rewrite`).
"""

from __future__ import annotations

from dataclasses import dataclass

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.registry import look_up


@dataclass(frozen=True)
class Scheme:
    """One way to quantize the linears of a graph."""

    name: str
    summary: str
    """For help texts: "weights and activations"."""
    rewrites: str
    """``module:function`` of the :class:`~nirvana_deploy.quantize.rewriting.Rewrite`."""
    weight_bits: int
    stored_as: tuple[str, ...]
    """ONNX types of weights behind a DequantizeLinear; the first is the one written."""
    activation_bits: int | None = None
    """Bits of activations behind a QuantizeLinear; None where they stay float."""
    options: frozenset[str] = frozenset()
    """Fields of the recipe ``Quantization`` that it reads."""
    needs_calibration: bool = False
    """Whether calibration windows are required; where ``rounding`` applies they are optional."""
    integer_kernels: frozenset[str] = frozenset()
    """Operators of ONNX Runtime that compute its linears in integers: what coverage counts."""
    only_engines: str | None = None
    """Why ONNX Runtime cannot run it; None where it can."""
    engine_targets: tuple[str, ...] | None = None
    """GPU architectures that have kernels for it; None for all."""
    engine_applies_decision: bool = False
    """Whether an engine applies the decision recorded in ``onnx-<scheme>`` and cannot do without."""


_WEIGHTS_ALONE = frozenset({"head", "rounding", "writing"})
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="int8",
            summary="weights and activations",
            rewrites="nirvana_deploy.quantize.int8.scheme:rewrite_int8",
            weight_bits=8,
            stored_as=("INT8",),
            activation_bits=8,
            options=frozenset({"smooth", "ranges", "keep_fp", "sensitivity", "head"}),
            needs_calibration=True,
            integer_kernels=frozenset(
                {
                    "DynamicQuantizeMatMul",
                    "MatMulInteger",
                    "MatMulIntegerToFloat",
                    "QGemm",
                    "QLinearMatMul",
                }
            ),
            engine_applies_decision=True,
        ),
        Scheme(
            name="w8",
            summary="weights alone",
            rewrites="nirvana_deploy.quantize.weights.low_bit:rewrite_low_bit",
            weight_bits=8,
            stored_as=("INT8", "UINT8"),
            options=_WEIGHTS_ALONE,
            integer_kernels=frozenset({"MatMulNBits"}),
        ),
        Scheme(
            name="w4",
            summary="weights alone",
            rewrites="nirvana_deploy.quantize.weights.low_bit:rewrite_low_bit",
            weight_bits=4,
            stored_as=("INT4", "UINT4"),
            options=_WEIGHTS_ALONE | {"block_size"},
            integer_kernels=frozenset({"MatMulNBits"}),
        ),
        Scheme(
            name="fp8",
            summary="weights alone, in engines for sm89 and newer",
            rewrites="nirvana_deploy.quantize.weights.fp8:rewrite_fp8",
            weight_bits=8,
            stored_as=("FLOAT8E4M3FN",),
            only_engines="ONNX Runtime has no kernels for float8 weights on a CPU",
            engine_targets=("sm89", "sm120", "sm121"),
        ),
    )
}
"""Name -> scheme, in the order in which variants are listed."""


def scheme_named(name: str) -> Scheme:
    """The scheme called ``name``; raises NirvanaError with the names there are."""
    return look_up(name, SCHEMES, what="scheme")


def onnx_scheme(name: str) -> Scheme:
    """The scheme called ``name``; raises NirvanaError for one that ONNX Runtime does not run, too."""
    scheme = SCHEMES.get(name)
    if scheme is not None and scheme.only_engines is not None:
        raise NirvanaError(
            f"{name} is a precision of engines alone: {scheme.only_engines}.",
            hint=f"nirvana-deploy build-engine DIR --quantize {name}",
        )
    return look_up(name, {name: SCHEMES[name] for name in onnx_schemes()}, what="scheme")


def weight_schemes() -> tuple[str, ...]:
    """Names of the schemes that round weights to integers and leave activations as they are."""
    return tuple(name for name, scheme in SCHEMES.items() if "rounding" in scheme.options)


def onnx_schemes() -> tuple[str, ...]:
    """Names of the schemes that ONNX Runtime runs, each with a folder ``onnx-<scheme>``."""
    return tuple(name for name, scheme in SCHEMES.items() if scheme.only_engines is None)
