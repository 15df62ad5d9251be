"""The stages after the float export: quantized ONNX folders, each with the proof of what runs in integers.

They add to a folder that ``stages.py`` made, in its one run or at any later time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from nirvana_deploy.base.errors import NirvanaError, VerificationError
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.output.layout import CALIBRATION_FILE, ONNX
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.variants import PRUNED, SCHEMES, variant_named
from nirvana_deploy.quantize.int8.spec import read_record
from nirvana_deploy.quantize.quantize import quantize_onnx
from nirvana_deploy.quantize.weights.low_bit import BITS


def quantize(
    run: Run,
    scheme: str,
    *,
    smooth: float | Literal["auto", "none"] | None = None,
    ranges: str = "minmax",
    keep_fp: int = 0,
    sensitivity: bool = False,
    head: bool = False,
    block_size: int = 32,
    rounding: str | None = None,
    writing: str = "ort",
    draw: Callable[[Path, Mapping[str, Any]], None] | None = None,
    redo: bool = False,
) -> dict[str, Any]:
    """Quantize the float ONNX folder of the run into ``onnx-<scheme>``, on the windows it was pruned with.

    Options as in :func:`quantize_onnx`. ``draw`` adds a figure of the record to
    the folder. Fewer linears in integer kernels than promised is a result
    (``passed`` False), as a failed verification is: what was written stays for inspection.
    """
    look_up(scheme, {name: name for name in SCHEMES}, what="scheme")
    variant = variant_named(f"{PRUNED}-{scheme}")

    def work() -> dict[str, Any]:
        problem = None
        try:
            quantize_onnx(
                run.out / ONNX,
                run.out / variant.folder,
                scheme=scheme,
                calibration=_calibration(run, optional=scheme in BITS),
                smooth=smooth,
                ranges=ranges,
                keep_fp=keep_fp,
                sensitivity=sensitivity,
                head=head,
                block_size=block_size,
                rounding=rounding,
                writing=writing,
                progress=run.progress,
            )
        except VerificationError as error:
            problem = error.message
        record = read_record(run.out / variant.folder)
        if draw is not None:
            draw(run.out / variant.folder, record)
        layers = (record.get("sensitivity") or {}).get("layers")
        return {
            "scheme": scheme,
            "coverage": record["coverage"],
            "passed": problem is None,
            "problem": problem,
            "weights_bytes": sum(file.stat().st_size for file in (run.out / variant.folder).glob("*.data")),
            **({"layer_kl": layers} if layers else {}),
        }

    return run.stage(variant.stage, [variant.folder], work, redo=redo)


def require_quantized(result: dict[str, Any], folder: Path) -> None:
    """Raise VerificationError (exit code 3) unless the stage passed."""
    if not result["passed"]:
        raise VerificationError(
            result["problem"], hint=f"{folder} is kept. nirvana-deploy doctor lists the versions in use."
        )


def _calibration(run: Run, *, optional: bool) -> Any:
    """The windows [N, T] that the plan was made with; None or NirvanaError where the folder has none."""
    path = run.out / CALIBRATION_FILE
    if not path.is_file():
        if optional:
            return None
        raise NirvanaError(
            f"{run.out} has no {CALIBRATION_FILE}: it was cut by a plan, without calibration windows.",
            hint=f"Quantize the ONNX folder itself: nirvana-deploy quantize {run.out / ONNX} --calib FILE",
        )
    return read_windows(path)["calibration"]
