"""What a unit of a cut costs where the model will run, as a stage."""

from __future__ import annotations

from nirvana_deploy.base.recipe import names_of
from nirvana_deploy.export.recipe import Export
from nirvana_deploy.measure.bounds import mean_context_tokens
from nirvana_deploy.measure.recipe import Measurement, Workload
from nirvana_deploy.measure.units.unit_cost import bytes_cost, measured_cost
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import stage
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage
from nirvana_deploy.prune.curves.budget import UnitCost


def unit_cost(
    run: Run, dense: Checkpoint, measure: str, *, export: Export, scheme: str | None, workload: Workload
) -> Stage:
    """What a KV group and a neuron cost for a decoded token, in "bytes" or "ms"; its result is a UnitCost."""

    def work() -> UnitCost:
        if measure == "bytes":
            context = mean_context_tokens(
                prompt_tokens=workload.prompt_tokens, new_tokens=workload.new_tokens
            )
            return bytes_cost(dense.shape, scheme=scheme, dtype=export.dtype, context_tokens=context)
        return measured_cost(
            dense,
            scheme=scheme,
            dtype=export.dtype,
            flavor=export.flavor,
            workload=workload,
            progress=run.progress,
        )

    reads = ("cost", "quantize", *names_of(Export), *names_of(Measurement))
    return Stage(stage.UNIT_COST, needs=(), makes=(), work=work, reads=reads)
