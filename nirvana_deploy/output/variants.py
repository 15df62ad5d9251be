"""The models that an output folder holds: their names, where they lie, and what they were made from.

``dense`` is the baseline, ``pruned`` the smaller model, ``pruned-int8`` and its like the smaller model
quantized. Which of them are there is read from the manifest, so whatever measures them need not be told.
"""

from __future__ import annotations

from dataclasses import dataclass

from nirvana_deploy.output.layout import DENSE_ONNX, ONNX
from nirvana_deploy.output.run import Run

DENSE, PRUNED = "dense", "pruned"
SCHEMES = ("int8", "w8", "w4")
"""Ways to quantize; each has a folder and a stage called ``onnx-<scheme>``."""


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


KNOWN = (
    ModelVariant(DENSE, "dense-onnx", DENSE_ONNX),
    ModelVariant(PRUNED, "onnx", ONNX),
    *(
        ModelVariant(f"{PRUNED}-{scheme}", quantize_stage, quantize_stage, scheme)
        for scheme in SCHEMES
        for quantize_stage in (f"onnx-{scheme}",)
    ),
)


def variant_named(name: str) -> ModelVariant:
    """The variant called ``name``; raises KeyError for a name that is not one of a variant."""
    return {variant.name: variant for variant in KNOWN}[name]


def variants_of(run: Run) -> tuple[ModelVariant, ...]:
    """The variants that ``run`` has made, the baseline first."""
    return tuple(variant for variant in KNOWN if variant.stage in run.manifest["stages"])
