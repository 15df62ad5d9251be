"""The models of an output folder: ``dense`` the baseline, ``pruned`` the smaller one, ``dense-<scheme>`` and
``pruned-<scheme>`` the two quantized. Which of them exist is read from the stages of the run.
"""

from __future__ import annotations

from collections.abc import Collection
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

    dense: bool = False
    """Whether its layers are those of the dense model."""

    @property
    def parent(self) -> str | None:
        """The float variant that a quantized one was made from."""
        return (DENSE if self.dense else PRUNED) if self.scheme else None


_FLOAT = (
    ModelVariant(DENSE, stage.DENSE_ONNX, DENSE_ONNX, dense=True),
    ModelVariant(PRUNED, stage.ONNX, ONNX),
)


def quantized_variant(scheme: str, *, of: str = PRUNED) -> ModelVariant:
    """The float variant ``of`` quantized by ``scheme``."""
    if of == DENSE:
        folder = f"{DENSE_ONNX}-{scheme}"
        return ModelVariant(f"{DENSE}-{scheme}", stage.dense_quantized(scheme), folder, scheme, dense=True)
    made_by = stage.quantized(scheme)
    return ModelVariant(f"{PRUNED}-{scheme}", made_by, made_by, scheme)


def variant_named(name: str) -> ModelVariant:
    """The variant called ``name``; raises KeyError for a name that is not one of a variant."""
    of, _, scheme = name.partition("-")
    if scheme and of in (DENSE, PRUNED):
        return quantized_variant(scheme, of=of)
    return {variant.name: variant for variant in _FLOAT}[name]


def variants_of(run: Run) -> tuple[ModelVariant, ...]:
    """The variants that ``run`` has made: the float ones, the baseline first, then by falling bits."""
    return variants_in(run.manifest["stages"])


def variants_in(stages: Collection[str]) -> tuple[ModelVariant, ...]:
    """The variants that ``stages`` made, in the order of :func:`variants_of`."""
    prefix = stage.quantized("")
    names = [name.removeprefix("dense-") for name in stages]
    schemes = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    known = [
        *_FLOAT,
        *(
            quantized_variant(scheme, of=of)
            for scheme in sorted(schemes, key=_bits_first)
            for of in (DENSE, PRUNED)
        ),
    ]
    return tuple(variant for variant in known if variant.stage in stages)


def _bits_first(scheme: str) -> tuple[int, str]:
    return -int("".join(filter(str.isdigit, scheme)) or 0), scheme
