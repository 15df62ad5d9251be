"""The models of an output folder: ``dense`` the baseline, ``pruned`` the smaller one, ``pruned-<scheme>`` the
smaller one quantized. Which of them exist is read from the stages of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import DENSE_ONNX, ONNX
from nirvana_deploy.output.run import Run

DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class ModelVariant:
    """One ONNX model of an output folder."""

    name: str
    stage: str
    """The stage that makes it."""
    folder: str
    """Relative to the output folder."""
    scheme: str | None = None
    """How it is quantized; None for a float model."""

    @property
    def parent(self) -> str | None:
        """The float variant that a quantized one was made from."""
        return PRUNED if self.scheme else None


_FLOAT = (ModelVariant(DENSE, stage.DENSE_ONNX, DENSE_ONNX), ModelVariant(PRUNED, stage.ONNX, ONNX))


def quantized_variant(scheme: str) -> ModelVariant:
    """The pruned model quantized by ``scheme``."""
    made_by = stage.quantized(scheme)
    return ModelVariant(f"{PRUNED}-{scheme}", made_by, made_by, scheme)


def variant_named(name: str) -> ModelVariant:
    """The variant called ``name``; raises KeyError for a name that is not one of a variant."""
    if name.startswith(f"{PRUNED}-"):
        return quantized_variant(name.removeprefix(f"{PRUNED}-"))
    return {variant.name: variant for variant in _FLOAT}[name]


def variants_of(run: Run) -> tuple[ModelVariant, ...]:
    """The variants that ``run`` has made, the baseline first, then by falling bits."""
    quantized = stage.quantized("")
    schemes = [name.removeprefix(quantized) for name in run.manifest["stages"] if name.startswith(quantized)]
    made = [variant for variant in _FLOAT if run.has(variant.stage)]
    return (*made, *(quantized_variant(scheme) for scheme in sorted(schemes, key=_bits_first)))


def _bits_first(scheme: str) -> tuple[int, str]:
    return -int("".join(filter(str.isdigit, scheme)) or 0), scheme
