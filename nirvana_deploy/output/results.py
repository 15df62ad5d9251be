"""What stages record in the manifest: written by the stage of the same name, read by the report.

Stages that record what a dataclass of their own room holds (budgets, verifications, tangent kernels) do so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nirvana_deploy.output.record_kinds import Quality


@dataclass(frozen=True)
class Reconstructed:
    """The refit of what a cut leaves of o and down."""

    ridge: float | None
    """None: for each linear the best of several on held-out windows."""
    tokens: int
    explained_share: dict[str, float] = field(default_factory=dict)
    """By linear."""
    plain: tuple[str, ...] = ()
    """Linears that keep the plain cut."""


@dataclass(frozen=True)
class Exported:
    """One ONNX folder."""

    nodes: int
    weights_bytes: int
    opset: int
    dtype: str
    flavor: str


@dataclass(frozen=True)
class Quantized:
    """One quantized ONNX folder."""

    scheme: str
    coverage: dict[str, Any]
    passed: bool
    problem: str | None
    weights_bytes: int
    layer_kl: dict[str, float] | None = None
    """KL in nats when a layer alone is quantized, by layer; None where it was not measured."""


@dataclass(frozen=True)
class EngineResult:
    """One engine file."""

    name: str
    dtype: str
    quantization: str | None
    kv: str
    runtime: str
    targets: tuple[str, ...]
    engine_bytes: int
    weights_bytes: int
    fused_attentions: int
    build_seconds: float
    compared_constants: int = 0


@dataclass(frozen=True)
class EnginesBuilt:
    """What one stage built: two engines of an encoder-decoder, else one."""

    engines: tuple[EngineResult, ...]


@dataclass(frozen=True)
class QualityMeasured:
    """Perplexity and KL of the models of a folder."""

    source: str
    window_tokens: int | None = None
    variants: dict[str, Quality] = field(default_factory=dict)
    """The numbers of each model; under ``parts`` by kind of text, kinds that the others do not count too."""
    calibrated: dict[str, bool] = field(default_factory=dict)
    """By kind of text: whether the model was calibrated or trained on it; on one of them it was not."""


@dataclass(frozen=True)
class AnswersWritten:
    """What the models of a folder write."""

    new_tokens: int
    """The most that each answer may have."""
    prompts: tuple[str, ...]
    variants: dict[str, tuple[str, ...]]
    """One continuation per prompt, by variant; none where ``skipped``."""
    skipped: str | None = None
    """Why nothing was asked, if so."""


@dataclass(frozen=True)
class Timed:
    """Which models were timed, and how they compare; the numbers are in benchmark.json."""

    variants: tuple[str, ...]
    comparisons: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class WorkloadsTimed:
    """Which workloads and sweeps were timed; the numbers are in workloads.json."""

    workloads: tuple[str, ...]
    sweeps: tuple[str, ...]
    """Their axes."""
