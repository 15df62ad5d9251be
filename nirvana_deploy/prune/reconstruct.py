"""Refit o and down after the cut, layer by layer: each linear on the inputs that it will have.

The calibration windows run through the pruned model as it comes into being. Of each layer, the inputs of o
are seen first, o is refitted (``least_squares.py``) and takes its place; then down, whose inputs already
come from the refitted o; then the layer is run for the next one. What is fitted is what the dense linear
would make of *these* inputs. The alternative, to fit the dense model's hidden states and so make up for the
errors of all layers before, overfits: see the numbers below.

Memory is bounded by one layer, the hidden states of one border and k x k sums of one linear, whatever the
depth. Arithmetic is float32 (the equations: float64) whatever the stored dtype; W' is rounded to that dtype
once, and what later layers see is the rounded weight. A dense layer is run, of which the cut columns of o
and down are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from nirvana_deploy.artifact import disk_errors, whole_folder
from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.model.checkpoint import config_json
from nirvana_deploy.model.shape import ModelShape, shape_from_config
from nirvana_deploy.model.weights import SafetensorsWeights, check_weights
from nirvana_deploy.progress import SILENT, Progress
from nirvana_deploy.prune.least_squares import CutLinear, Refit
from nirvana_deploy.prune.loaded import home
from nirvana_deploy.prune.plan import PrunePlan, check_plan_fits
from nirvana_deploy.prune.score import DEFAULT_MICRO_BATCH, streamed_model
from nirvana_deploy.prune.units import kept_positions

DEFAULT_RIDGE = 0.1
"""Relative to each input's own energy."""


@dataclass(frozen=True)
class Reconstruction:
    """What refitting made of a plan."""

    ridge: float
    tokens: int
    explained_share: dict[str, float]
    """Tensor name -> how much of the output that its cut columns gave is back, on the calibration text."""


Runs = Sequence[Callable[[], torch.Tensor]]


class _Seen(Exception):  # noqa: N818 (nothing went wrong)
    """The inputs are known; the rest of the layer need not run."""


def reconstruct_layers(
    checkpoint: Path,
    plan: PrunePlan,
    tokens: NDArray[np.int64],
    out: Path,
    *,
    ridge: float = DEFAULT_RIDGE,
    micro_batch: int = DEFAULT_MICRO_BATCH,
    progress: Progress = SILENT,
) -> Reconstruction:
    """Refit every o and down that ``plan`` cuts, on windows [N, T], and write them to the folder ``out``.

    ``out`` gets one safetensors file per layer, [D, k] tensors in their stored dtype under their names in
    the checkpoint: what ``slice_checkpoint`` takes in place of the plain cut. It appears whole or not at all.
    ``micro_batch`` is in sequences. Raises NirvanaError for a plan that does not fit, for fewer tokens than
    the widest linear keeps inputs, and for activations that are not finite.
    """
    shape = shape_from_config(config_json(checkpoint))
    weights = SafetensorsWeights(checkpoint)
    check_weights(weights, shape)
    check_plan_fits(plan, shape)
    require_tokens(shape, *tokens.shape)
    if not ridge > 0:
        raise NirvanaError(f"ridge must be a positive number, got {ridge}.")
    kept = kept_positions(shape, plan.kept_groups, plan.kept_neurons)
    model = streamed_model(checkpoint, weights, shape)
    explained: dict[str, float] = {}
    label = f"Reconstructing on {tokens.shape[0]} x {tokens.shape[1]} tokens"
    with whole_folder(out) as folder, progress.task(label, len(shape.layers)) as advance:

        def visit(positions: Sequence[int], layer: nn.Module, runs: Runs) -> None:
            written = {}
            for name, module in _readers(shape, positions, layer):
                stay = kept[name].positions
                if len(stay) < module.in_features:
                    refit = _refitted(name, module, stay, runs, ridge)
                    stored = refit.weight.to(weights.dtype(name))
                    _zero_but(module, stay, stored.float())
                    written[name], explained[name] = home(stored).contiguous(), refit.explained_share
            with disk_errors(out):
                save_file(written, folder / f"layer-{min(positions):05}.safetensors")
            advance(len(positions))

        model.transform_layers(torch.from_numpy(tokens), visit, micro_batch=micro_batch)
    return Reconstruction(ridge=ridge, tokens=int(tokens.size), explained_share=explained)


def require_tokens(shape: ModelShape, num_sequences: int, seq_len: int) -> None:
    """Raise NirvanaError for fewer calibration tokens than the dense model's widest linear has inputs."""
    widest = max(max(layer.query_heads * shape.head_dim, layer.ffn_width) for layer in shape.layers)
    # an encoder reads the first half of each window, the decoder the second
    read_tokens = seq_len // 2 if shape.family.encoder_decoder else seq_len
    if num_sequences * read_tokens < widest:
        stacks = " in each stack" if shape.family.encoder_decoder else ""
        raise NirvanaError(
            f"Reconstruction fits linears of up to {widest:,} inputs and needs at least as many calibration "
            f"tokens; {num_sequences} windows of {seq_len} are {num_sequences * read_tokens:,}{stacks}.",
            hint=f"Pass --num-sequences {-(-widest // max(read_tokens, 1))} or more, or --no-reconstruct.",
        )


def _readers(
    shape: ModelShape, positions: Sequence[int], layer: nn.Module
) -> Iterator[tuple[str, nn.Linear]]:
    """The linears that read units of one layer, by the name of their weight, in the order in which they run:
    all attentions stand before the FFN.
    """
    places = [shape.place(position) for position in positions]
    modules = [(prefix, site.o) for site, prefix in places]
    modules += [(prefix, site.ffn_down) for site, prefix in places if site.ffn_rows]
    for prefix, module in modules:
        linear = layer.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        yield f"{prefix}.{module}.weight", linear


def _refitted(name: str, linear: nn.Linear, kept: torch.Tensor, runs: Runs, ridge: float) -> Refit:
    """Run the layer up to ``linear``, batch by batch, and fit what stays of it to what it sees."""
    cut = CutLinear(linear.weight.detach(), kept)

    def see(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        cut.observe(inputs[0])
        raise _Seen

    handle = linear.register_forward_pre_hook(see)
    try:
        for run in runs:
            with suppress(_Seen):
                run()
    finally:
        handle.remove()
    if not cut.finite:
        raise NirvanaError(
            f"{name}: its inputs are NaN or infinite on the calibration text; nothing fits them."
        )
    return cut.refit(ridge)


def _zero_but(linear: nn.Linear, kept: torch.Tensor, weight: torch.Tensor) -> None:
    """Give ``linear`` the columns ``weight`` [D, k] at ``kept`` and zeros elsewhere, as the cut has it."""
    whole = torch.zeros_like(linear.weight)
    linear.weight = nn.Parameter(whole.index_copy_(1, kept.to(whole.device), weight))
