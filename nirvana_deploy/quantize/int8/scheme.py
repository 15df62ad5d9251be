"""``int8``: calibrate, choose, decide and rewrite; or apply a decision that was made before."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import Progress
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.quantize.graph.layer_runner import Runner
from nirvana_deploy.quantize.graph.linears import OnnxGraph, open_folder
from nirvana_deploy.quantize.int8.decide import (
    Candidate,
    apply_to,
    calibrated,
    choose_alpha,
    decide,
    smoothing_alpha,
)
from nirvana_deploy.quantize.int8.observe import require_prefill
from nirvana_deploy.quantize.int8.ranges import METHODS
from nirvana_deploy.quantize.int8.sensitivity import Sensitivity, sensitivity_of
from nirvana_deploy.quantize.int8.spec import Int8Spec
from nirvana_deploy.quantize.rewriting import QuantizeInputs, Rewritten, windows_record
from nirvana_deploy.runtime.divergence import Yardstick

ENOUGH_TOKENS = 4096
"""Calibration tokens below which a note warns."""
_DOT_PRODUCT_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


def rewrite_int8(
    graphs: Sequence[OnnxGraph], inputs: QuantizeInputs, *, scratch: Path, progress: Progress
) -> Rewritten:
    """Rewrite the float ``graphs`` as W8A8 by static ranges (a ``Rewrite``)."""
    entries: dict[str, Any] = {"applied": True}
    if inputs.decided is not None:
        spec = Int8Spec.from_json(inputs.decided["int8"])
    else:
        spec, entries = _decided(graphs[0].path.parent, inputs, scratch=scratch, progress=progress)
    embeddings = apply_to(graphs, spec)
    entries["int8"] = spec.to_json()
    if embeddings or inputs.decided is None:
        entries["embeddings"] = embeddings
    return Rewritten(list(spec.linears), entries)


def keep_worst(spec: Int8Spec, sensitivity: Sensitivity, count: int) -> Int8Spec:
    """``spec`` with the ``count`` linears of largest KL left in float."""
    worst = dict(itertools.islice(sensitivity.linears.items(), count))
    return replace(
        spec,
        linears={name: linear for name, linear in spec.linears.items() if name not in worst},
        kept_float={
            **spec.kept_float,
            **{name: f"among the {count} worst, KL {kl:.2g} alone" for name, kl in worst.items()},
        },
    )


def slow_host_note(cpu_flags: Collection[str] | None) -> str | None:
    """What to expect of int8 on a CPU without integer dot products; None where it has some, or is unknown."""
    if cpu_flags is None or _DOT_PRODUCT_FLAGS.intersection(cpu_flags):
        return None
    return (
        "This CPU has no integer dot product (VNNI, AMX or Arm's). Without it ONNX Runtime's int8 kernels "
        "are slow and saturate 16-bit sums: expect no more speed than float, and other numbers than on a "
        "CPU that has one. Measure where you deploy (nirvana-deploy benchmark, evaluate)."
    )


def _decided(
    folder: Path, inputs: QuantizeInputs, *, scratch: Path, progress: Progress
) -> tuple[Int8Spec, dict[str, Any]]:
    """The decision by calibration on the float ``folder``, and how it was made."""
    recipe, calibration = inputs.recipe, inputs.calibration
    look_up(recipe.ranges, METHODS, what="range method")
    alpha = smoothing_alpha(recipe.smooth)
    if calibration is None:
        raise NirvanaError(
            "int8 takes the ranges of its activations from calibration windows, and none were given.",
            hint="--calib FILE, or quantize inside an output folder, which has its own.",
        )
    require_prefill(calibration)
    if calibration.size < ENOUGH_TOKENS:
        progress.note(
            f"Calibration has {calibration.size:,} tokens. Static ranges clip what they did not see: with "
            f"fewer than {ENOUGH_TOKENS:,} int8 may lose several times more."
        )
    if (note := slow_host_note(_cpu_flags())) is not None:
        progress.note(note)
    seen = calibrated(folder, open_folder(folder), calibration, head=recipe.head, progress=progress)
    judged_on = calibration if inputs.heldout is None else inputs.heldout
    tried: tuple[Candidate, ...] = ()
    if alpha == "auto":
        yardstick = Yardstick(Runner(folder).logits, judged_on)
        alpha, tried = choose_alpha(seen, yardstick, scratch=scratch, progress=progress)
        progress.note(_verdict(tried))
    spec = decide(seen, alpha=alpha, ranges=recipe.ranges, progress=progress)
    entries: dict[str, Any] = {
        "calibration": windows_record(calibration),
        "alpha_by_kl": [asdict(candidate) for candidate in tried],
    }
    if recipe.sensitivity or recipe.keep_fp:
        parts = sensitivity_of(
            folder, spec, judged_on, at_least=recipe.keep_fp, scratch=scratch, progress=progress
        )
        entries["sensitivity"] = parts.to_json()
        spec = keep_worst(spec, parts, recipe.keep_fp)
    return spec, entries


def _verdict(tried: Sequence[Candidate]) -> str:
    best = min(tried, key=lambda candidate: candidate.kl)
    listed = ", ".join(f"{candidate.alpha:g}: {candidate.kl:.4f}" for candidate in tried)
    return f"Smoothing alpha {best.alpha:g} by KL in nats ({listed})"


def _cpu_flags() -> set[str] | None:
    """Of the first processor, on Linux; None where they cannot be read."""
    if platform.system() != "Linux":
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return None
