"""What a builder can be told beside the network, and what each of the two runtimes has of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError

RTX = "tensorrt-rtx"
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
DEFAULT_RTX_TARGETS = ("sm80", "sm86", "sm89", "sm120", "sm121")
"""Everything but Turing, which has no fp8 and no bf16; several targets cost an engine nothing."""
THIS_MACHINE = "native"
"""The target of ``tensorrt``: the GPU of the machine that builds."""


@dataclass(frozen=True)
class BuilderOptions:
    """Options of a build; raises NirvanaError for one that the runtime does not have."""

    runtime: str
    targets: tuple[str, ...] | None = None
    workspace_bytes: int | None = None
    weight_streaming: bool = False
    strip_weights: bool = False
    hardware_compatible: bool = False
    version_compatible: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise NirvanaError(f"A workspace must have at least 1 byte, got {self.workspace_bytes}.")
        if self.runtime == RTX:
            self._check_rtx()
        elif self.targets is not None:
            raise NirvanaError(
                f"{self.runtime} builds for the GPU of this machine and takes no targets, "
                f"got {', '.join(self.targets)}.",
                hint="For newer GPUs too: --hardware-compatible; for chosen targets: --engine tensorrt-rtx",
            )

    def _check_rtx(self) -> None:
        unknown = [target for target in self.targets or () if target not in RTX_TARGETS]
        if unknown or self.targets == ():
            raise NirvanaError(
                f"Unknown target {', '.join(unknown) or '(none)'}; RTX engines can be built for "
                f"{', '.join(RTX_TARGETS)}.",
                hint="--target sm86,sm89",
            )
        for option, given in (
            ("hardware compatibility", self.hardware_compatible),
            ("version compatibility", self.version_compatible),
            ("a timing cache", self.timing_cache is not None),
        ):
            if given:
                raise NirvanaError(
                    f"tensorrt-rtx has no use for {option}: "
                    "it compiles for the GPU when the engine first runs.",
                    hint="Name the GPUs instead: --target sm86,sm89,sm120",
                )

    def resolved_targets(self) -> tuple[str, ...]:
        """The GPUs that the engine is for."""
        if self.runtime != RTX:
            return (THIS_MACHINE,)
        return self.targets or DEFAULT_RTX_TARGETS


def configure(trt: Any, builder: Any, options: BuilderOptions) -> Any:
    """An ``IBuilderConfig`` that says what ``options`` say."""
    config = builder.create_builder_config()
    if options.runtime == RTX:
        targets = options.resolved_targets()
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index):
                raise NirvanaError(f"This tensorrt-rtx does not build for {target}.")
        # since RTX 1.2: nothing allocates in a pass, so CUDA graphs can capture it; streaming must allocate
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") and not options.weight_streaming:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.timing_cache is not None:
        known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, False):
            raise NirvanaError(
                f"{options.timing_cache} is no timing cache of this TensorRT on this GPU.",
                hint="Name another file, or delete it: a new one is written after the build.",
            )
    return config
