"""Measure the curves of a model: one forward and one backward pass, a block in memory at a time.

On the way back each o and down meets the gradient at its output, which gives the metric of its border, and
its inputs, whose Gram matrix gives the elimination (``refit/elimination.py``). Labels are drawn from the
model. After that one forward pass measures the scale (``measured.py``). Cost: ``operations.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.curves.budget import LEAST_SHARE
from nirvana_deploy.prune.curves.curve import Curve, Curves, curve_of
from nirvana_deploy.prune.curves.facts import facts_of
from nirvana_deploy.prune.curves.measured import Trial, measure, scaled_by
from nirvana_deploy.prune.curves.metric import Metric
from nirvana_deploy.prune.refit.elimination import (
    RIDGE,
    Optimum,
    eliminate,
    eliminate_groups,
    group_inputs,
    optimum_of,
)
from nirvana_deploy.prune.refit.least_squares import NormalEquations, add_gram, raised
from nirvana_deploy.prune.refit.readers import Reader, Wanted, readers_of, watched
from nirvana_deploy.prune.refit.selection import BLOCKS
from nirvana_deploy.prune.saliency.gradient import sampled_likelihood_gradient
from nirvana_deploy.prune.streaming.model import StreamedModel, micro_batches
from nirvana_deploy.prune.streaming.processes import Share, is_first, share_of, tell

CURVE_TOKENS = 8192
"""At most so many calibration tokens are read for curves."""
ENOUGH_TOKENS = 5
"""For each input of a linear: with fewer the ridges are larger. More would cost as much as the refit."""
MEASURED_TOKENS = 512
"""So many of them, with no part in the refit, measure the scale."""
_MEASURED_NEURONS = 0.4
"""Share of an FFN's neurons that is removed when the scale is measured."""
_MEASURED_GROUPS = (1 / 3, 2 / 3)
"""The same of an attention's KV groups: twice, since two trials of it agree less (benchmarks/NOTES.md)."""
_MEASURED_RIDGE = 0.3
CURVES = "curves"
"""The work that processes share."""


def measure_curves(
    checkpoint: Checkpoint,
    tokens: NDArray[np.int64],
    *,
    seed: int = 0,
    least_neurons: int | None = None,
    spill: bool | None = None,
    spill_folder: Path | None = None,
    device: torch.device | None = None,
    progress: Progress = SILENT,
) -> Curves:
    """The curves of a checkpoint, measured on the first of the windows [N, T].

    An FFN's curve ends where ``least_neurons`` stay [a 24th]; an attention's at one KV group. ``seed`` draws
    the labels. Spilling is that of scoring, and so are processes. Raises NirvanaError for a single window,
    and for activations or gradients that are not finite, naming the linear.
    """
    require_windows(len(tokens))
    used = tokens[: max(2, CURVE_TOKENS // tokens.shape[1])]
    measured = min(max(1, MEASURED_TOKENS // tokens.shape[1]), len(used) // 2)
    windows = torch.from_numpy(used)
    model = StreamedModel(checkpoint, device=device)
    # the rear windows are a micro-batch of their own: the sizes are multiples of theirs
    fitted = (len(used) - measured) // measured * measured
    order = torch.cat([windows[:fitted], windows[len(used) - measured :]])
    _, share = share_of(order, measured)
    tell({"work": CURVES, "checkpoint": str(checkpoint.path), "measured": measured, "seed": seed}, order)
    positions = model.read(order[:fitted])[-1].numel()
    sink = _Sink(model.shape, least_neurons, share, positions)
    _run(model, order, measured, seed, sink, spill=spill, spill_folder=spill_folder, progress=progress)
    measure(model, sink.trials, order[fitted:], progress=progress)
    groups = scaled_by(model.shape, sink.curves(attention=True), sink.trials, attention=True)
    neurons = scaled_by(model.shape, sink.curves(attention=False), sink.trials, attention=False)
    return Curves(groups=tuple(groups), neurons=tuple(neurons), facts=facts_of(checkpoint, tokens))


def take_part(work: dict[str, Any], windows: torch.Tensor) -> None:
    """Measure for the first process, on some of the windows [N, T]."""
    own, share = share_of(windows, work["measured"])
    if not len(own):
        return
    model = StreamedModel(Checkpoint.open(Path(work["checkpoint"])))
    sink = _Sink(model.shape, None, share, len(windows))
    _run(model, windows, work["measured"], work["seed"], sink, progress=SILENT)


def _run(
    model: StreamedModel,
    windows: torch.Tensor,
    measured: int,
    seed: int,
    sink: _Sink,
    *,
    progress: Progress,
    spill: bool | None = None,
    spill_folder: Path | None = None,
) -> None:
    """Take this process's part of windows [N, T], the last ``measured`` of which are, there and back."""
    positions = (len(windows), model.read(windows)[-1].shape[1])
    draws = torch.rand(positions, generator=torch.Generator().manual_seed(seed))
    model.visit_backward(
        share_of(windows, measured)[0],
        sampled_likelihood_gradient(iter(micro_batches(share_of(draws, measured)[0], measured))),
        sink.visit,
        micro_batch=measured,
        sequences=1,
        label="Curves from",
        spill=spill,
        spill_folder=spill_folder,
        progress=progress,
    )


def tried_groups(groups: int) -> list[int]:
    """How many of an attention's KV groups are removed when its scale is measured."""
    tried = {min(max(1, round(share * groups)), groups - 1) for share in _MEASURED_GROUPS}
    return sorted(tried - {0})


def scarce(widest: int, tokens: int) -> str | None:
    """What to say where a linear of ``widest`` inputs is fitted to few tokens of ``tokens``; else None."""
    used = min(tokens, CURVE_TOKENS) - MEASURED_TOKENS
    if used >= ENOUGH_TOKENS * widest or tokens <= CURVE_TOKENS:  # of scarce text the refit says more
        return None
    return (
        f"Curves are measured on {CURVE_TOKENS:,} tokens, {used / widest:.1f} for each of the {widest:,} "
        f"inputs of the widest linear; below {ENOUGH_TOKENS} their ridge is larger."
    )


def require_windows(windows: int) -> None:
    """Raise NirvanaError for a single calibration window."""
    if windows < 2:
        raise NirvanaError(
            "Curves need at least 2 calibration windows: one is measured on.", hint="Pass --num-sequences 64."
        )


@dataclass
class _Border:
    """Sums of one reader."""

    metric: Metric
    equations: NormalEquations
    inputs: torch.Tensor | None = None
    """On the measured windows, [N, T, k]."""

    def observe(self, reader: Reader, record: _Record) -> None:
        """Add what a micro-batch met."""
        entered, inputs, output = record.entered, record.inputs, record.output
        assert entered is not None and inputs is not None and output is not None
        assert record.gradient is not None
        states = reader.behind(entered, output)
        weight = Wanted(states, None if reader.post_norm is None else output).importance()
        self.metric.observe(record.gradient, weight)
        add_gram(self.equations.gram, (inputs * weight).flatten(0, -2))

    @property
    def sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What was observed, for :meth:`add`."""
        return *self.metric.sums, self.equations.gram

    def add(self, products: torch.Tensor, positions: torch.Tensor, gram: torch.Tensor) -> None:
        """Add the ``sums`` of other positions."""
        self.metric.add(products, positions)
        self.equations.gram += gram


class _Sink:
    """Turns what passes through each block into curves and trials."""

    def __init__(self, shape: ModelShape, least_neurons: int | None, share: Share, positions: int) -> None:
        self._shape, self._share = shape, share
        self._positions = positions
        """What the first process fits on."""
        self._least_neurons = least_neurons
        self._costs: dict[tuple[int, bool], tuple[list[int], list[float]]] = {}
        self.trials: list[Trial] = []

    def visit(self, positions: Sequence[int], block: nn.Module, turns: Sequence[Callable[[], None]]) -> None:
        """Take every micro-batch there and back; the last one of all is the measured windows."""
        block.requires_grad_(False)
        readers = readers_of(self._shape, positions, block)
        borders = [self._border(reader) for reader in readers]
        for number, turn in self._share.turns(turns):
            with ExitStack() as hooks:
                seen = [hooks.enter_context(_recorded(reader)) for reader in readers]
                if turn is not None:
                    turn()
            for reader, border, record in zip(readers, borders, seen, strict=True):
                self._gather(number, reader, border, None if turn is None else record)
        if is_first():
            for reader, border in zip(readers, borders, strict=True):
                self._finish(reader, border)

    def _gather(self, number: int, reader: Reader, border: _Border, record: _Record | None) -> None:
        """Add what every process met in this turn to the first one's ``border``."""
        last = self._share.batches - 1
        own: Sequence[torch.Tensor] | None = None
        if record is not None and number == last:
            assert record.inputs is not None
            own = (record.inputs,)
        elif record is not None:
            adding = border if is_first() else self._border(reader)
            adding.observe(reader, record)
            own = adding.sums
        for sender, found in self._share.gathered(number, own):
            if sender == last:
                (border.inputs,) = found
            elif sender != number:
                border.add(*found)

    def _border(self, reader: Reader) -> _Border:
        return _Border(Metric(self._shape.hidden_size), NormalEquations(reader.linear.weight.detach()))

    def curves(self, *, attention: bool) -> list[Curve]:
        """What was predicted, per position of the logits."""
        found = []
        for position in range(len(self._shape.layers)):
            removed, cost = self._costs.get((position, attention), ([0], [0.0]))
            found.append(curve_of(removed, [one / (2 * self._positions) for one in cost]))
        return found

    def _finish(self, reader: Reader, border: _Border) -> None:
        if reader.groups is None:
            self._neurons(reader, border)
        else:
            self._groups(reader, border, reader.groups)

    def _groups(self, reader: Reader, border: _Border, groups: int) -> None:
        kept, cost = eliminate_groups(self._optimum(reader, border), groups)
        self._costs[reader.position, True] = list(range(groups)), cost
        inputs = border.equations.weight.shape[1]
        for removed in tried_groups(groups):
            self._try(reader, border, group_inputs(kept[removed], groups, inputs), removed)

    def _neurons(self, reader: Reader, border: _Border) -> None:
        width = border.equations.weight.shape[1]
        least = max(1, width // LEAST_SHARE) if self._least_neurons is None else self._least_neurons
        least = min(least, width)
        # nobody else holds the optimum, whose gigabytes are free before the trial takes as many
        gone = eliminate(self._optimum(reader, border), keep=least, block=max(1, width // BLOCKS))
        self._costs[reader.position, False] = gone.removed, gone.cost
        removed = min(round(_MEASURED_NEURONS * width), len(gone.order))
        kept = torch.ones(width, dtype=torch.bool)
        kept[gone.order[:removed]] = False
        self._try(reader, border, kept.nonzero()[:, 0], removed)

    def _try(self, reader: Reader, border: _Border, kept: torch.Tensor, removed: int) -> None:
        """Refit what stays on the curve's windows; note what that changes on the measured ones."""
        assert border.inputs is not None
        dense = border.equations.weight
        refit = border.equations.only(kept).solve(self._raised(_MEASURED_RIDGE, border))
        assert refit is not None  # the elimination found them finite
        difference = -dense.clone()
        difference[:, kept] += refit.weight.to(dense.device)
        change = border.inputs @ difference.T
        self.trials.append(Trial(reader.position, reader.groups is not None, removed, change))

    def _optimum(self, reader: Reader, border: _Border) -> Optimum:
        metric = border.metric.root()
        optimum = None
        if metric is not None:
            ridge = self._raised(RIDGE, border)
            optimum = optimum_of(border.equations.gram, border.equations.weight, metric=metric, ridge=ridge)
        if optimum is None:
            raise NirvanaError(
                f"{reader.name}: its inputs or the gradients behind it are NaN or infinite on the "
                "calibration text; no curve can be measured."
            )
        return optimum

    def _raised(self, ridge: float, border: _Border) -> float:
        return raised(ridge, border.equations.weight.shape[1], self._positions, enough=ENOUGH_TOKENS)


@dataclass
class _Record:
    """What one reader met on the way there and back; [n, T, ...]."""

    entered: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    output: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


class _recorded:  # noqa: N801 (a context manager)
    """While a block runs, note what one of its readers meets."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._hooks = ExitStack()

    def __enter__(self) -> _Record:
        record, reader = _Record(), self._reader

        def keep(name: str, value: torch.Tensor) -> None:
            setattr(record, name, value.detach())

        def at_output(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            record.output = output.detach()
            output.register_hook(partial(keep, "gradient"))  # type: ignore[no-untyped-call]

        self._hooks.enter_context(watched(reader.entry, partial(keep, "entered")))
        self._hooks.enter_context(watched(reader.linear, partial(keep, "inputs")))
        handle = reader.linear.register_forward_hook(at_output)
        self._hooks.callback(handle.remove)
        return record

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()
