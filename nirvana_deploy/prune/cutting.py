"""From what was measured to what stays, by the recipe: the one path of single cuts and of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.calibrate.stage import calibration_record
from nirvana_deploy.calibrate.windows import TokenWindows
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.curves.budget import (
    LEAST_SHARE,
    Allocated,
    Budget,
    UnitCost,
    allocate_in_steps,
    least_neurons,
)
from nirvana_deploy.prune.curves.curve import Curves
from nirvana_deploy.prune.curves.measure_curves import measure_curves
from nirvana_deploy.prune.plan import Origin, PrunePlan, make_plan, plan_of
from nirvana_deploy.prune.recipe import REFIT, Pruning
from nirvana_deploy.prune.refit.dense_states import DenseStates
from nirvana_deploy.prune.refit.reconstruct import Reconstruction, reconstruct_layers
from nirvana_deploy.prune.refit.selection import select_and_refit
from nirvana_deploy.prune.saliency.units import UnitScores

BLOCK = 32
"""Inputs that share a scale, in w4 by default and in llama.cpp's quantized types."""
_CALIBRATION_KEYS = ("source", "num_sequences", "seq_len", "text_sha256", "seed", "draw")


def reads_curves(recipe: Pruning, saliency: str) -> bool:
    """Whether curves decide how much goes from where."""
    return recipe.allocation == "curves" or saliency == REFIT


def width_step(recipe: Pruning, shape: ModelShape) -> int:
    """What kept FFN widths are multiples of.

    A whole block costs nearly nothing where each layer has its own width (benchmarks/NOTES.md); one width for
    all layers would meet budgets coarsely, and two global rankings are the paper's.
    """
    if recipe.round_to != "auto":
        return recipe.round_to
    narrowest = min((layer.ffn_width for layer in shape.layers if layer.ffn_width), default=0)
    return BLOCK if recipe.allocation == "curves" and narrowest >= LEAST_SHARE * BLOCK else 8


def budget_of(recipe: Pruning, shape: ModelShape, cost: UnitCost | None = None) -> Budget:
    """What the recipe asks of curves, where a unit costs ``cost``."""
    return Budget(
        sparsity=recipe.sparsity,
        cost=cost,
        uniform=recipe.allocation == "uniform",
        round_to=width_step(recipe, shape),
        min_groups=recipe.min_groups,
        min_neurons=recipe.min_neurons,
    )


@dataclass(frozen=True)
class Cutter:
    """A model and how it is to be cut."""

    dense: Checkpoint
    recipe: Pruning
    seed: int
    model_name: str = ""
    cost: UnitCost | None = None
    """Of a unit; None: linear weights."""
    spill_folder: Path | None = None
    progress: Progress = SILENT

    def curves(self, tokens: NDArray[np.int64]) -> Curves:
        """Measure the curves on windows [N, T]."""
        narrowest = min(layer.ffn_width for layer in self.dense.shape.layers if layer.ffn_width)
        least = least_neurons(narrowest, width_step(self.recipe, self.dense.shape), self.recipe.min_neurons)
        return measure_curves(
            self.dense,
            tokens,
            seed=self.seed,
            least_neurons=least,
            spill_folder=self.spill_folder,
            progress=self.progress,
        )

    def allocated(self, curves: Curves, *, step: int = 1, steps: int = 1) -> Allocated:
        """How many units of each layer stay [after one of several steps]."""
        budget = budget_of(self.recipe, self.dense.shape, self.cost)
        return allocate_in_steps(self.dense.shape, curves, budget, steps)[step - 1]

    def at(self, source: Checkpoint, share: float) -> Cutter:
        """The cutter of ``source``, a model of the same shape, to a share of the sparsity."""
        return replace(self, dense=source, recipe=replace(self.recipe, sparsity=self.recipe.sparsity * share))

    def plan(
        self,
        scores: UnitScores,
        *,
        saliency: str,
        gamma: float | None,
        calibration: dict[str, Any] | None,
        curves: Curves | None = None,
    ) -> PrunePlan:
        """The plan of scores: under a budget of ``curves``, or of ``gamma`` without them."""
        recipe, shape = self.recipe, self.dense.shape
        if curves is None:
            plan = make_plan(
                shape,
                scores,
                sparsity=recipe.sparsity,
                gamma=gamma,
                allocation=recipe.allocation,
                round_to=width_step(recipe, shape),
                saliency=saliency,
                seed=self.seed,
                model_name=self.model_name,
                calibration=_kept_keys(calibration),
            )
        else:
            allocated = self.allocated(curves)
            groups = [
                _best(score, kept.groups) for score, kept in zip(scores.groups, allocated.counts, strict=True)
            ]
            neurons = [
                _best(score, kept.neurons)
                for score, kept in zip(scores.neurons, allocated.counts, strict=True)
            ]
            plan = self._planned(groups, neurons, allocated, saliency, calibration)
        return replace(plan, reconstruct={"ridge": recipe.ridge}) if recipe.reconstruct else plan

    def select(
        self, allocated: Allocated, windows: NDArray[np.int64], out: Path, calibration: dict[str, Any] | None
    ) -> tuple[PrunePlan, Reconstruction]:
        """Choose inside the refit, which is written to ``out``."""
        selected = select_and_refit(
            self.dense,
            allocated.counts,
            windows,
            out,
            ridge=_ridge(self.recipe.ridge),
            progress=self.progress,
        )
        plan = self._planned(selected.groups, selected.neurons, allocated, REFIT, calibration)
        return replace(plan, reconstruct={"ridge": self.recipe.ridge}), selected.reconstruction

    def refit(
        self, plan: PrunePlan, windows: NDArray[np.int64], out: Path, seen: DenseStates | None = None
    ) -> Reconstruction:
        """Refit what a plan keeps; written to ``out``. ``seen`` is what scoring left of the dense model."""
        assert plan.reconstruct is not None
        return reconstruct_layers(
            self.dense,
            plan,
            windows,
            out,
            ridge=_ridge(plan.reconstruct["ridge"]),
            seen=seen,
            progress=self.progress,
        )

    def candidate(
        self,
        windows: TokenWindows | None,
        scores: UnitScores | None,
        *,
        saliency: str,
        gamma: float | None,
        curves: Curves | None,
        out: Path,
    ) -> tuple[PrunePlan, Path | None]:
        """A plan, and the folder ``out`` of its refit if the recipe refits."""
        record = None if windows is None else calibration_record(windows)
        if scores is None:
            assert windows is not None and curves is not None
            plan, _ = self.select(self.allocated(curves), windows.tokens, out, record)
            return plan, out
        plan = self.plan(scores, saliency=saliency, gamma=gamma, calibration=record, curves=curves)
        if plan.reconstruct is None or windows is None:
            return plan, None
        self.refit(plan, windows.tokens, out)
        return plan, out

    def _planned(
        self,
        groups: Sequence[tuple[int, ...]],
        neurons: Sequence[tuple[int, ...]],
        allocated: Allocated,
        saliency: str,
        calibration: dict[str, Any] | None,
    ) -> PrunePlan:
        plan = plan_of(
            self.dense.shape,
            groups,
            neurons,
            origin=Origin(self.model_name, self.recipe.sparsity, self.seed, _kept_keys(calibration)),
            saliency=saliency,
            allocation=self.recipe.allocation,
            round_to=width_step(self.recipe, self.dense.shape),
        )
        cost = None if self.cost is None else asdict(self.cost)
        return replace(plan, curves={"predicted_kl": allocated.predicted_kl, "cost": cost})


def _ridge(option: float | str) -> float | None:
    """The ridge of an option; None: by held-out windows."""
    return None if option == "auto" else float(option)


def _best(scores: NDArray[np.float64], count: int) -> tuple[int, ...]:
    """The ``count`` units of highest score, sorted; of equal ones the later."""
    kept = np.argsort(scores, kind="stable")[len(scores) - count :]
    return tuple(int(unit) for unit in np.sort(kept))


def _kept_keys(calibration: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if calibration is None else {key: calibration[key] for key in _CALIBRATION_KEYS}
