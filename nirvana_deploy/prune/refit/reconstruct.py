"""Refit the kept columns of o and down so that the hidden states match the dense model's.

Calibration windows run through the dense model and, block by block, through the pruned one as it comes into
being; each o and down is fitted (``least_squares.py``) to carry the states of the second to those of the
first behind it, so it also makes up for all cuts before. Every position counts relative to the size of its
state. After He et al., Channel Pruning (arXiv 1707.06168), ZipLM (2302.04089) and OSSCAR (2403.12983); the
ridge toward the cut weights and the weights of positions are ours. Measurements: benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from nirvana_deploy.base.artifact import whole_folder
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import disk_errors
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.reading import stack_lengths
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.plan import PrunePlan, check_plan_fits
from nirvana_deploy.prune.refit.dense_states import Aims, DenseStates, aims_noted
from nirvana_deploy.prune.refit.fitting import Choose, Fit, fitted
from nirvana_deploy.prune.refit.least_squares import raised
from nirvana_deploy.prune.refit.readers import (
    Reader,
    Wanted,
    readers_of,
    set_columns,
    stored_as,
    up_to,
)
from nirvana_deploy.prune.saliency.units import kept_positions
from nirvana_deploy.prune.streaming.model import Runs, States, StreamedModel
from nirvana_deploy.prune.streaming.processes import Share, share_of, tell
from nirvana_deploy.prune.streaming.score import DEFAULT_MICRO_BATCH

DEFAULT_RIDGE = 1.0
"""Share of each input's own energy."""
REFIT = "refit"
"""The work that processes share."""
_REMEMBERED_BYTES = 1 << 28
"""Inputs of a reader up to this size are kept; larger ones are computed again."""
_Achieved = dict[str, tuple[float, bool]]
"""(explained share, whether the plain cut stayed) by weight name: the weights themselves are on disk."""


@dataclass(frozen=True)
class Reconstruction:
    """What refitting achieved."""

    ridge: float | None
    """None: for each linear the best of several on held-out windows."""
    tokens: int
    explained_share: dict[str, float]
    """Tensor name -> share of the missing output that is restored, on the calibration text."""
    plain: tuple[str, ...] = ()
    """Linears that keep the plain cut, since no refit was better on held-out windows."""


def reconstruct_layers(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    tokens: NDArray[np.int64],
    out: Path,
    *,
    ridge: float | None = DEFAULT_RIDGE,
    micro_batch: int = DEFAULT_MICRO_BATCH,
    device: torch.device | None = None,
    seen: DenseStates | None = None,
    progress: Progress = SILENT,
) -> Reconstruction:
    """Refit what ``plan`` leaves of every o and down on windows [N, T]; write them to the folder ``out``.

    ``out`` gets one safetensors file per block, [D, k] tensors in their stored dtype under their names in
    the checkpoint; ``slice_checkpoint`` takes them in place of the plain cut. It appears whole or not at all.
    Arithmetic is float32 (the equations: float64); later blocks see the weights as stored. ``ridge`` None
    takes for each linear the best of several on a sixteenth of the windows. ``micro_batch`` is in sequences,
    ``device`` defaults to a GPU if torch sees one. ``seen`` is what another pass of the dense model left.
    Neither that nor the number of processes changes a byte. Raises NirvanaError for a plan that does not fit,
    for too few tokens (:func:`require_tokens`), and for activations that are not finite.
    """
    check_plan_fits(plan, checkpoint.shape)
    positions = kept_positions(checkpoint.shape, plan.kept_groups, plan.kept_neurons)
    kept = {name: found.positions for name, found in positions.items()}
    return refit_readers(
        checkpoint,
        tokens,
        out,
        chosen=kept,
        ridge=ridge,
        micro_batch=micro_batch,
        device=device,
        seen=seen,
        progress=progress,
    )


def refit_readers(
    checkpoint: Checkpoint,
    tokens: NDArray[np.int64],
    out: Path,
    *,
    chosen: dict[str, torch.Tensor] | Choose,
    ridge: float | None = DEFAULT_RIDGE,
    micro_batch: int = DEFAULT_MICRO_BATCH,
    device: torch.device | None = None,
    seen: DenseStates | None = None,
    progress: Progress = SILENT,
) -> Reconstruction:
    """As :func:`reconstruct_layers`: the inputs that stay are ``chosen`` by weight name, or it says which."""
    shape = checkpoint.shape
    kept, choose = (chosen, None) if isinstance(chosen, dict) else (None, chosen)
    require_tokens(shape, *tokens.shape)
    if ridge is not None and not ridge > 0:
        raise NirvanaError(f"ridge must be a positive number, got {ridge}.")
    windows = torch.from_numpy(tokens)
    tell(
        {
            "work": REFIT,
            "checkpoint": str(checkpoint.path),
            "kept": None if kept is None else list(kept),
            "ridge": ridge,
            "micro_batch": micro_batch,
        },
        windows,
        *(kept or {}).values(),
    )
    model = StreamedModel(checkpoint, device=device)
    label = f"Reconstructing on {tokens.shape[0]} x {tokens.shape[1]} tokens"
    with whole_folder(out) as folder, progress.task(label, len(shape.layers)) as advance:

        def write(positions: Sequence[int], written: dict[str, torch.Tensor]) -> None:
            with disk_errors(out):
                save_file(written, folder / f"layer-{min(positions):05}.safetensors")
            advance(len(positions))

        refitting = _Refitting(
            checkpoint, kept, choose, ridge, read_tokens(shape, *tokens.shape), write, seen
        )
        achieved = refitting.run(model, windows, micro_batch)
    return Reconstruction(
        ridge=ridge,
        tokens=int(tokens.size),
        explained_share={name: share for name, (share, _) in achieved.items()},
        plain=tuple(name for name, (_, plain) in achieved.items() if plain),
    )


def take_part(work: dict[str, Any], windows: torch.Tensor, *kept: torch.Tensor) -> None:
    """Refit for the first process, on some of the windows [N, T]."""
    checkpoint = Checkpoint.open(Path(work["checkpoint"]))
    given = None if work["kept"] is None else dict(zip(work["kept"], kept, strict=True))
    refitting = _Refitting(
        checkpoint,
        given,
        None,
        work["ridge"],
        read_tokens(checkpoint.shape, *windows.shape),
        lambda positions, written: None,
    )
    refitting.run(StreamedModel(checkpoint), windows, work["micro_batch"])


@dataclass(frozen=True)
class _Refitting:
    """Refits block by block, in every process alike; the first one decides."""

    checkpoint: Checkpoint
    kept: dict[str, torch.Tensor] | None
    choose: Choose | None
    ridge: float | None
    positions: int
    """Of all processes, in the shorter stack."""
    write: Callable[[Sequence[int], dict[str, torch.Tensor]], None]
    """What to do with the weights of a block, by name."""
    seen: DenseStates | None = None

    def run(self, model: StreamedModel, windows: torch.Tensor, micro_batch: int) -> _Achieved:
        """Take this process's part of windows [N, T] through all blocks."""
        own, share = share_of(windows, micro_batch)
        seen = self.seen
        if seen is not None and not seen.of(self.checkpoint, own, micro_batch):
            seen = None
        achieved: _Achieved = {}
        if not len(own):
            return achieved

        def visit(
            positions: Sequence[int], block: nn.Module, dense: Runs, made: Runs
        ) -> tuple[States, States]:
            readers = readers_of(self.checkpoint.shape, positions, block)
            wanted, left = _aims_of(readers, dense) if seen is None else seen.taken(positions)
            dense.clear()  # what is done with is let go, since it is of all windows
            written: dict[str, torch.Tensor] = {}
            states: States = []
            for number, reader in enumerate(readers):
                if all(later.ffn is not None for later in readers[number:]):
                    made.clear()
                replay = _Replay(reader, made, states)
                fit = self._fit(reader, replay, wanted.pop(0), share)
                stored = stored_as(self.checkpoint.weights, reader.name, fit.weight)
                set_columns(reader.linear, fit.kept, stored.float())
                states = replay.states_behind()
                written[reader.name], achieved[reader.name] = stored, (fit.explained_share, fit.plain)
            self.write(positions, written)
            return left, states

        model.transform_blocks(own, visit, micro_batch=micro_batch)
        return achieved

    def _fit(self, reader: Reader, replay: _Replay, wanted: Sequence[Wanted], share: Share) -> Fit:
        kept = None if self.kept is None else self.kept[reader.name]
        ridge = self.ridge
        if ridge is not None:
            ridge = raised(ridge, reader.linear.weight.shape[1], self.positions)
        return fitted(reader, replay.pairs(), wanted, kept=kept, choose=self.choose, ridge=ridge, share=share)


def _aims_of(readers: Sequence[Reader], dense: Runs) -> Aims:
    with aims_noted(readers) as aims:
        return aims([run().cpu() for run in dense])


def widest_input(shape: ModelShape) -> int:
    """Inputs of the widest o or down."""
    return max(max(layer.query_heads * shape.head_dim, layer.ffn_width) for layer in shape.layers)


def read_tokens(shape: ModelShape, num_sequences: int, seq_len: int) -> int:
    """Tokens of windows in the stack that reads fewest of them."""
    return num_sequences * min(stack_lengths(shape.family, seq_len))


def require_tokens(shape: ModelShape, num_sequences: int, seq_len: int) -> str | None:
    """Raise NirvanaError for fewer calibration tokens than a quarter of the widest linear's inputs.

    Returns what to say of fewer than all of them, where only a large ridge holds; else None.
    """
    widest = widest_input(shape)
    lengths = stack_lengths(shape.family, seq_len)
    read = read_tokens(shape, num_sequences, seq_len)
    if read >= widest:
        return None
    enough = -(-widest // max(min(lengths), 1))
    stacks = " in each stack" if len(lengths) > 1 else ""
    have = f"{num_sequences} windows of {seq_len} are {read:,} tokens{stacks}"
    if 4 * read >= widest:
        return (
            f"{have}, fewer than the {widest:,} inputs of the widest linear: refits will stay close to the "
            f"old weights, by a larger ridge. --num-sequences {20 * enough} would do better."
        )
    raise NirvanaError(
        f"Reconstruction fits linears of up to {widest:,} inputs and needs calibration tokens for at least a "
        f"quarter of them, better 20 times as many; {have}.",
        hint=f"Pass --num-sequences {enough} or more, or --no-reconstruct.",
    )


class _Replay:
    """A reader's inputs in the model that is being made, batch by batch, and the states behind it.

    An FFN reads the states behind the attention and nothing else, so it starts from them; an attention is run
    as part of the block.
    """

    def __init__(self, reader: Reader, runs: Runs, states: States) -> None:
        self._reader = reader
        self._runs = runs
        self._entered: States = [] if reader.ffn is None else states
        self._batches = len(runs if reader.ffn is None else states)
        self._inputs: States | None = []
        self._inputs_bytes = 0

    def pairs(self) -> Sequence[Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
        """For each batch, in order: computes (states [n, T, D] that the reader adds to, its inputs)."""
        return [partial(self._noted, number) for number in range(self._batches)]

    def states_behind(self) -> States:
        """The states [n, T, D] behind the reader with the weights that it has now."""
        if self._inputs is not None:
            pairs = list(zip(self._entered, self._inputs, strict=True))
            return [self._behind(entered, inputs) for entered, inputs in pairs]
        return [self._behind(*self._pair(number)) for number in range(self._batches)]

    def _behind(self, entered: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        device = self._reader.linear.weight.device
        output: torch.Tensor = self._reader.linear(inputs.to(device))
        return self._reader.behind(entered.to(device), output).cpu()

    def _noted(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        entered, inputs = self._pair(number)
        if self._reader.ffn is None:
            self._entered.append(entered.cpu())
        self._inputs_bytes += inputs.numel() * inputs.element_size()
        if self._inputs_bytes > _REMEMBERED_BYTES:
            self._inputs = None
        if self._inputs is not None:
            self._inputs.append(inputs.cpu())
        return entered, inputs

    def _pair(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        reader = self._reader
        if reader.ffn is None:
            return up_to(reader, self._runs[number])
        states = self._entered[number].to(reader.linear.weight.device)
        return up_to(reader, lambda: reader.ffn_output(states))
