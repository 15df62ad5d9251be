"""Quantized ONNX folders of a run, each with the proof of what runs in integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError, VerificationError
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import CALIBRATION_FILE, ONNX, RECOVERY
from nirvana_deploy.output.results import Quantized
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage
from nirvana_deploy.output.variants import PRUNED, quantized_variant, variant_named
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.graph.linears import RECORD_FILE
from nirvana_deploy.quantize.int8.decide import without_head
from nirvana_deploy.quantize.int8.spec import Int8Spec, read_record
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.schemes import onnx_scheme

Draw = Callable[[Path, Mapping[str, Any]], None]
"""(quantized folder, its quantization.json) -> nothing: adds a figure to the folder."""


def quantize(run: Run, recipe: Quantization, *, draw: Draw, of: str = PRUNED) -> Stage:
    """Quantize the float variant ``of`` of the run, on the windows it was pruned with.

    Fewer linears in integer kernels than promised is a result (``passed`` False), as a failed verification
    is: what was written stays for inspection.
    """
    scheme = onnx_scheme(recipe.scheme)
    source, made = variant_named(of), quantized_variant(scheme.name, of=of)
    folder = run.out / made.folder

    def work() -> Quantized:
        problem = None
        try:
            quantize_onnx(
                run.out / source.folder,
                folder,
                recipe,
                calibration=_calibration(run, optional=not scheme.needs_calibration),
                decided=None if made.dense else decided_in_training(run, recipe),
                progress=run.progress,
            )
        except VerificationError as error:
            problem = error.message
        record = read_record(folder)
        draw(folder, record)
        return Quantized(
            scheme=recipe.scheme,
            coverage=record["coverage"],
            passed=problem is None,
            problem=problem,
            weights_bytes=sum(file.stat().st_size for file in folder.glob("*.data")),
            layer_kl=(record.get("sensitivity") or {}).get("layers"),
        )

    trained = () if made.dense else (stage.RECOVER,)
    needs = (stage.SELECT, stage.CALIBRATE, *trained, source.stage)
    return Stage(
        made.stage,
        needs=needs,
        makes=(made.folder,),
        work=work,
        reads=("quantize_head",),
        of=made.name,
    )


def require_quantized(run: Run, scheme: str, *, of: str = PRUNED) -> None:
    """Raise VerificationError (exit code 3) unless the stage passed."""
    made = quantized_variant(scheme, of=of)
    result = run.result(made.stage, Quantized)
    if not result.passed:
        folder = run.out / made.folder
        raise VerificationError(
            result.problem or f"{scheme} failed.",
            hint=f"{folder} is kept. nirvana-deploy doctor lists the versions in use.",
        )


def decided_in_training(run: Run, recipe: Quantization) -> dict[str, Any] | None:
    """What the model was trained for, unless the recipe asks for something else than its defaults."""
    if not run.has(stage.RECOVER) or not (run.out / RECOVERY / RECORD_FILE).is_file():
        return None
    record = read_record(run.out / RECOVERY)
    if record["scheme"] != recipe.scheme:
        return None
    if recipe != Quantization(scheme=recipe.scheme, head=recipe.head):
        run.progress.note(
            f"{recipe.scheme} is decided anew, with other options than the model was trained for"
        )
        return None
    run.progress.note(f"{recipe.scheme} is applied as the model was trained for it")
    spec = Int8Spec.from_json(record["int8"])
    return {"int8": (spec if recipe.head else without_head(spec)).to_json()}


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
