"""Export checkpoints to ONNX folders."""

from __future__ import annotations

from collections.abc import Iterator

from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.export.recipe import Export
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import CHECKPOINT, DENSE_ONNX, ONNX
from nirvana_deploy.output.results import Exported
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage
from nirvana_deploy.output.variants import DENSE, PRUNED


def export(run: Run, dense: Checkpoint, recipe: Export) -> Iterator[Stage]:
    """Export the smaller model and, for a baseline, the dense one by the same code."""

    def work(checkpoint: Checkpoint, folder: str) -> Exported:
        exported = onnx_from_checkpoint(
            checkpoint, run.out / folder, dtype=recipe.dtype, flavor=recipe.flavor, progress=run.progress
        )
        return Exported(
            nodes=exported.nodes,
            weights_bytes=exported.weights_bytes,
            opset=exported.options.opset,
            dtype=recipe.dtype,
            flavor=recipe.flavor,
        )

    reads = ("dtype", "flavor")
    yield Stage(
        stage.ONNX,
        (stage.CHECKPOINT,),
        (ONNX,),
        lambda: work(Checkpoint.open(run.out / CHECKPOINT), ONNX),
        reads=reads,
        of=PRUNED,
    )
    if recipe.baseline:
        yield Stage(
            stage.DENSE_ONNX, (), (DENSE_ONNX,), lambda: work(dense, DENSE_ONNX), reads=reads, of=DENSE
        )
