"""``quantize_onnx``: a float ONNX folder to a quantized one, with the proof and the decision beside it."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.quantize.coverage import Coverage, coverage_of, slow_host_note
from nirvana_deploy.quantize.graph.layer_runner import Runner
from nirvana_deploy.quantize.graph.linears import RECORD_FILE, OnnxGraph, open_folder, write_folder
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
from nirvana_deploy.quantize.int8.spec import Int8Spec, record_of
from nirvana_deploy.quantize.lint import lint
from nirvana_deploy.quantize.weights.low_bit import BITS, LowBit, low_bit, rewrite_low_bit
from nirvana_deploy.runtime.divergence import Yardstick

SCHEMES = ("int8", *BITS)
ENOUGH_TOKENS = 4096
"""Of calibration for int8: on SmolLM2, 512 tokens gave a KL of 0.12 where 4,096 gave 0.03."""


@dataclass(frozen=True)
class QuantizedFolder:
    """A quantized ONNX folder."""

    path: Path
    scheme: str
    weights_bytes: int
    """Size of its external data."""
    float_bytes: int
    """The same of the folder that it was made from."""
    coverage: Coverage
    record: dict[str, Any]
    """Content of its quantization.json."""


def quantize_onnx(
    folder: Path,
    out: Path,
    *,
    scheme: str,
    calibration: NDArray[np.int64] | None = None,
    heldout: NDArray[np.int64] | None = None,
    smooth: float | Literal["auto", "none"] | None = None,
    ranges: str = "minmax",
    keep_fp: int = 0,
    sensitivity: bool = False,
    head: bool = False,
    block_size: int = 32,
    rounding: str | None = None,
    writing: str = "ort",
    progress: Progress = SILENT,
) -> QuantizedFolder:
    """Quantize the float ONNX ``folder`` into ``out``, which appears whole and replaces what was there.

    ``scheme`` is ``int8`` (W8A8), or ``w8`` or ``w4``, which round the weights alone: ``w4`` in blocks of
    ``block_size`` inputs, ``rounding`` "plain", "search" or "gptq" (calibrated, what is done when nothing is
    said and there is calibration), ``writing`` "ort" or "tensorrt". ``head`` quantizes lm_head as well, and
    where ``w8`` or ``w4`` is written for "ort" the embedding, the same matrix where they are tied.

    For int8, ``calibration`` [N, T] are token ids to take ranges from; ``heldout``
    [M, T'] those that choices are made by (the calibration windows where there are none): ``smooth`` "auto",
    which int8 does when nothing is said, takes the alpha of least KL; a number is the alpha; "none" leaves
    the activations as they are. ``keep_fp`` leaves that many linears in float, the worst by
    ``sensitivity``.

    Raises NirvanaError for a folder that is quantized already or has no linears, an unknown scheme or range
    method, and calibration that is missing or useless; VerificationError, ``out`` kept, when ONNX Runtime
    runs fewer linears in integer kernels than promised (float32 graphs; it has none for half precision).
    """
    look_up(scheme, {name: name for name in SCHEMES}, what="scheme")
    if scheme in BITS:
        spec = low_bit(
            scheme,
            block_size=block_size,
            rounding=rounding,
            writing=writing,
            head=head,
            calibrated=calibration is not None,
        )
        return _low_bit_folder(folder, out, scheme, spec, calibration=calibration, progress=progress)
    look_up(ranges, METHODS, what="range method")
    alpha = smoothing_alpha(smooth)
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
    if keep_fp < 0:
        raise NirvanaError(f"The number of linears to keep in float must be at least 0, got {keep_fp}.")
    if (note := slow_host_note()) is not None:
        progress.note(note)
    graphs = open_folder(folder)
    float_bytes = sum(graph.weights_bytes for graph in graphs)
    seen = calibrated(folder, graphs, calibration, head=head, progress=progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    judged_on = calibration if heldout is None else heldout
    tried: tuple[Candidate, ...] = ()
    if alpha == "auto":
        yardstick = Yardstick(Runner(folder).logits, judged_on)
        alpha, tried = choose_alpha(seen, yardstick, scratch=out.parent, progress=progress)
        progress.note(_verdict(tried))
    decision = decide(seen, alpha=alpha, ranges=ranges, progress=progress)
    entries: dict[str, Any] = {
        "calibration": _windows_record(calibration),
        "alpha_by_kl": [asdict(candidate) for candidate in tried],
    }
    if sensitivity or keep_fp:
        parts = sensitivity_of(
            folder, decision, judged_on, at_least=keep_fp, scratch=out.parent, progress=progress
        )
        entries["sensitivity"] = parts.to_json()
        decision = keep_worst(decision, parts, keep_fp)
    return _int8_folder(folder, out, decision, entries, float_bytes=float_bytes, progress=progress)


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


def apply_spec(folder: Path, spec: Int8Spec, out: Path, *, progress: Progress = SILENT) -> QuantizedFolder:
    """Apply an int8 decision (``read_spec``) to another float export of the same checkpoint.

    Scales take the dtype of the graph, float16 in a float16 export, as TensorRT asks. Raises NirvanaError
    when the folder does not fit, VerificationError as :func:`quantize_onnx` does.
    """
    float_bytes = sum(graph.weights_bytes for graph in open_folder(folder))
    return _int8_folder(folder, out, spec, {"applied": True}, float_bytes=float_bytes, progress=progress)


def _int8_folder(
    folder: Path,
    out: Path,
    spec: Int8Spec,
    entries: dict[str, Any],
    *,
    float_bytes: int,
    progress: Progress,
) -> QuantizedFolder:
    graphs = open_folder(folder)
    embeddings = apply_to(graphs, spec)
    record = record_of(scheme="int8", **entries, int8=spec.to_json(), embeddings=embeddings)
    return _written(
        folder, out, graphs, record, list(spec.linears), float_bytes=float_bytes, progress=progress
    )


def _low_bit_folder(
    folder: Path,
    out: Path,
    scheme: str,
    spec: LowBit,
    *,
    calibration: NDArray[np.int64] | None,
    progress: Progress,
) -> QuantizedFolder:
    graphs = open_folder(folder)
    float_bytes = sum(graph.weights_bytes for graph in graphs)
    windows = None
    if calibration is not None and spec.rounding == "gptq":
        windows = _windows_record(calibration)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out.parent) as scratch:
        done = rewrite_low_bit(
            graphs, spec, calibration=calibration, scratch=Path(scratch), progress=progress
        )
        record = record_of(
            scheme=scheme,
            calibration=windows,
            weights=spec.to_json(),
            linears=done.linears,
            embeddings=done.embeddings,
        )
        return _written(folder, out, graphs, record, done.linears, float_bytes=float_bytes, progress=progress)


def _written(
    folder: Path,
    out: Path,
    graphs: Sequence[OnnxGraph],
    record: dict[str, Any],
    promised: Sequence[str],
    *,
    float_bytes: int,
    progress: Progress,
) -> QuantizedFolder:
    """Write the rewritten ``graphs``, and count the ``promised`` linears in what ONNX Runtime makes of it."""
    weights_bytes = write_folder(folder, out, graphs, records={RECORD_FILE: record}, progress=progress)
    coverage = coverage_of(out, promised)
    record |= {
        "weights_bytes": weights_bytes,
        "float_bytes": float_bytes,
        "coverage": coverage.to_json(),
        "tensorrt_findings": [asdict(finding) for finding in lint(out)],
    }
    write_json(out / RECORD_FILE, record)
    if half_precision(graphs):
        progress.note(
            f"{len(promised)} linears are stored as {record['scheme']} in a half-precision graph, for "
            "TensorRT. ONNX Runtime on a CPU computes it in float: its integer kernels read float32."
        )
    else:
        progress.note(coverage.line)
        coverage.require_whole(out)
    return QuantizedFolder(
        path=out,
        scheme=record["scheme"],
        weights_bytes=weights_bytes,
        float_bytes=float_bytes,
        coverage=coverage,
        record=record,
    )


def half_precision(graphs: Sequence[OnnxGraph]) -> bool:
    """Whether linears of ``graphs`` compute in float16 or bfloat16."""
    return any(linear.dtype != ir.DataType.FLOAT for graph in graphs for linear in graph.linears)


def _windows_record(windows: NDArray[np.int64]) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(windows, dtype="<i8").tobytes()).hexdigest()
    return {"windows": int(windows.shape[0]), "tokens": int(windows.shape[1]), "sha256": digest}


def _verdict(tried: Sequence[Candidate]) -> str:
    best = min(tried, key=lambda candidate: candidate.kl)
    listed = ", ".join(f"{candidate.alpha:g}: {candidate.kl:.4f}" for candidate in tried)
    return f"Smoothing alpha {best.alpha:g} by KL in nats ({listed})"
