"""Export checkpoints to ONNX folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.sources import ModelFolder
from nirvana_deploy.output.layout import CHECKPOINT, DENSE_ONNX, ONNX
from nirvana_deploy.output.run import Run


def export(run: Run, source: ModelFolder, *, baseline: bool, dtype: str, flavor: str) -> None:
    """Export the smaller model and, by the same code, the dense one."""

    def work(checkpoint: Path, folder: str) -> dict[str, Any]:
        exported = onnx_from_checkpoint(
            Checkpoint.open(checkpoint), run.out / folder, dtype=dtype, flavor=flavor, progress=run.progress
        )
        return {
            "nodes": exported.nodes,
            "weights_bytes": exported.weights_bytes,
            "opset": exported.options.opset,
            "dtype": dtype,
            "flavor": flavor,
        }

    run.stage("onnx", [ONNX], lambda: work(run.out / CHECKPOINT, ONNX))
    if baseline:
        run.stage("dense-onnx", [DENSE_ONNX], lambda: work(source.path, DENSE_ONNX))
