"""Refit the kept columns of o and down so that the hidden states match the dense model's.

Calibration windows run through the dense model and, block by block, through the pruned one as it comes into
being; each o and down is fitted (``least_squares.py``) to carry the states of the second to those of the
first behind it, so it also makes up for all cuts before. Every position counts relative to the size of its
state. After He et al., Channel Pruning (arXiv 1707.06168), ZipLM (2302.04089) and OSSCAR (2403.12983); the
ridge toward the cut weights and the weights of positions are ours. Measurements: benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from nirvana_deploy.base.artifact import disk_errors, whole_folder
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.reading import stack_lengths
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.least_squares import NormalEquations, Refit
from nirvana_deploy.prune.plan import PrunePlan, check_plan_fits
from nirvana_deploy.prune.saliency.units import Kept, kept_positions
from nirvana_deploy.prune.streaming.model import Runs, States, StreamedModel
from nirvana_deploy.prune.streaming.score import DEFAULT_MICRO_BATCH

DEFAULT_RIDGE = 1.0
"""Share of each input's own energy."""
_TINY = 1e-12


@dataclass(frozen=True)
class Reconstruction:
    """What refitting achieved."""

    ridge: float
    tokens: int
    explained_share: dict[str, float]
    """Tensor name -> share of the missing output that is restored, on the calibration text."""


class _Seen(Exception):  # noqa: N818 (nothing went wrong)
    """The inputs are known; the rest of the block need not run."""


def reconstruct_layers(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    tokens: NDArray[np.int64],
    out: Path,
    *,
    ridge: float = DEFAULT_RIDGE,
    micro_batch: int = DEFAULT_MICRO_BATCH,
    device: torch.device | None = None,
    progress: Progress = SILENT,
) -> Reconstruction:
    """Refit what ``plan`` leaves of every o and down on windows [N, T]; write them to the folder ``out``.

    ``out`` gets one safetensors file per block, [D, k] tensors in their stored dtype under their names in
    the checkpoint; ``slice_checkpoint`` takes them in place of the plain cut. It appears whole or not at all.
    Arithmetic is float32 (the equations: float64); later blocks see the weights as stored. ``micro_batch`` is
    in sequences, ``device`` defaults to a GPU if torch sees one. Raises NirvanaError for a plan that does not
    fit, for fewer tokens than the widest linear has inputs, and for activations that are not finite.
    """
    shape = checkpoint.shape
    check_plan_fits(plan, shape)
    require_tokens(shape, *tokens.shape)
    if not ridge > 0:
        raise NirvanaError(f"ridge must be a positive number, got {ridge}.")
    kept = kept_positions(shape, plan.kept_groups, plan.kept_neurons)
    explained: dict[str, float] = {}
    label = f"Reconstructing on {tokens.shape[0]} x {tokens.shape[1]} tokens"
    with whole_folder(out) as folder, progress.task(label, len(shape.layers)) as advance:

        def visit(
            positions: Sequence[int], block: nn.Module, dense: Runs, made: Runs
        ) -> tuple[States, States]:
            readers = list(_readers(shape, positions, block, kept))
            wanted, left = _dense_states(readers, dense)
            written = {}
            for reader, states in zip(readers, wanted, strict=True):
                refit = _refitted(reader, made, states, ridge)
                stored = refit.weight.to(checkpoint.weights.dtype(reader.name))
                _zero_but(reader, stored.float())
                written[reader.name] = stored.contiguous()
                explained[reader.name] = refit.explained_share
            with disk_errors(out):
                save_file(written, folder / f"layer-{min(positions):05}.safetensors")
            advance(len(positions))
            return left, [run().cpu() for run in made]

        model = StreamedModel(checkpoint, device=device)
        model.transform_blocks(torch.from_numpy(tokens), visit, micro_batch=micro_batch)
    return Reconstruction(ridge=ridge, tokens=int(tokens.size), explained_share=explained)


def require_tokens(shape: ModelShape, num_sequences: int, seq_len: int) -> None:
    """Raise NirvanaError for fewer calibration tokens than the dense model's widest linear has inputs."""
    widest = max(max(layer.query_heads * shape.head_dim, layer.ffn_width) for layer in shape.layers)
    lengths = stack_lengths(shape.family, seq_len)
    read_tokens = min(lengths)
    if num_sequences * read_tokens < widest:
        stacks = " in each stack" if len(lengths) > 1 else ""
        raise NirvanaError(
            f"Reconstruction fits linears of up to {widest:,} inputs and needs at least as many calibration "
            f"tokens; {num_sequences} windows of {seq_len} are {num_sequences * read_tokens:,}{stacks}.",
            hint=f"Pass --num-sequences {-(-widest // max(read_tokens, 1))} or more, or --no-reconstruct.",
        )


@dataclass(frozen=True)
class _Reader:
    """A linear that reads units and adds to the hidden states."""

    name: str
    """Of its weight in the checkpoint."""
    linear: nn.Linear
    norm: nn.Module
    """Reads the hidden states that the linear adds to."""
    kept: torch.Tensor
    """Inputs that stay; int64 [k]."""


def _readers(
    shape: ModelShape, positions: Sequence[int], block: nn.Module, kept: Mapping[str, Kept]
) -> Iterator[_Reader]:
    """Readers of one block in the order in which they run: all attentions stand before the FFN."""
    places = [shape.place(position) for position in positions]
    modules = [(prefix, site.o, site.input_norm) for site, prefix in places]
    modules += [(prefix, site.ffn_down, site.ffn_norm) for site, prefix in places if site.ffn_norm]
    for prefix, module, norm in modules:
        linear, name = block.get_submodule(module), f"{prefix}.{module}.weight"
        assert isinstance(linear, nn.Linear)
        yield _Reader(name, linear, block.get_submodule(norm), kept[name].positions)


def _dense_states(readers: Sequence[_Reader], runs: Runs) -> tuple[list[States], States]:
    """(the hidden states after each reader, those that leave the block), before any change."""
    entering: list[States] = [[] for _ in readers]

    def keep(states: States, entered: torch.Tensor) -> None:
        states.append(entered.cpu())

    with ExitStack() as hooks:
        for reader, states in zip(readers, entering, strict=True):
            hooks.enter_context(_watched(reader.norm, partial(keep, states)))
        left = [run().cpu() for run in runs]
    return [*entering[1:], left], left


def _refitted(reader: _Reader, runs: Runs, wanted: Sequence[torch.Tensor], ridge: float) -> Refit:
    """Run the block up to a reader, batch by batch, and fit what stays of it to the ``wanted`` states.

    Every position counts relative to the size of its state, as the next norm sees it.
    """
    weight, bias = reader.linear.weight.detach(), reader.linear.bias
    kept = reader.kept.to(weight.device)
    equations = NormalEquations(weight.index_select(1, kept))
    for run, states in zip(runs, wanted, strict=True):
        entered, inputs = _up_to(reader, run)
        states = states.to(weight.device)
        missing = states - entered if bias is None else states - entered - bias
        share = states.square().mean(-1, keepdim=True).clamp_min(_TINY).rsqrt()
        equations.observe(inputs.index_select(-1, kept) * share, missing * share)
    refit = equations.solve(ridge)
    if refit is None:
        raise NirvanaError(
            f"{reader.name}: its inputs are NaN or infinite on the calibration text; nothing fits them."
        )
    return refit


def _up_to(reader: _Reader, run: Callable[[], object]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the block as far as a reader: (the hidden states [n, T, D] it adds to, its inputs [n, T, C])."""
    seen: list[torch.Tensor] = []

    def last(inputs: torch.Tensor) -> None:
        seen.append(inputs)
        raise _Seen

    with _watched(reader.norm, seen.append), _watched(reader.linear, last), suppress(_Seen):
        run()
    entered, inputs = seen
    return entered, inputs


@contextmanager
def _watched(module: nn.Module, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """While the block runs, call ``see`` with the inputs of ``module``."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        see(inputs[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _zero_but(reader: _Reader, weight: torch.Tensor) -> None:
    """Give the linear the columns ``weight`` [D, k] and zeros where it was cut."""
    whole = torch.zeros_like(reader.linear.weight)
    reader.linear.weight = nn.Parameter(
        whole.index_copy_(1, reader.kept.to(whole.device), weight.to(whole.device))
    )
