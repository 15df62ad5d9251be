"""Reconstruction: what a cut leaves of o and down takes over, as far as it can, what the cut took away.

The calibration windows run through two models side by side, layer by layer: the dense one, and the pruned one
as it comes into being. Of each layer, o is refitted first (``least_squares.py``), to what carries the hidden
states of the pruned model to those of the dense one behind its attention; then down, whose inputs already
come from the refitted o, to those behind the FFN. So each linear also makes up for what is missing from all
before it, and no parameter is new: every shape, and so every consumer, stays what it is for the plain cut.

Refitting after channels are gone is He et al., Channel Pruning (arXiv 1707.06168), who fit to the dense
model's states too; ZipLM (2302.04089) and OSSCAR (2403.12983) do it in language models, and RCPU (2510.07782)
shows how the plain fit overfits few calibration tokens. The ridge toward the cut weights is ours, and so are
the weights of positions: each counts relative to the size of its state, since the norm that reads the state
sees no more, and since a few massive ones (the first token's) would decide for all.

Measured on SmolLM2-135M, ``nirvana``, sparsity 0.4, 32 x 128 tokens; perplexity on WikiText-2 test and on
held-out ``pydoc``. The first three with all positions alike and a ridge on each input's own energy alone:

* calibrated on WikiText-2 valid, ridge 1, 2, 3: 61 and 56, 62 and 52, 63 and 52 (plain cut: 116 and 68).
  A fit to what the dense layer makes of the pruned model's *own* inputs gains less: 66 and 59, ridge 0.3.
* four times the tokens give what 32 x 128 do (ridge 2: 62 and 53). down alone: 63 and 51; o alone: 79 and 70.
* calibrated on ``pydoc``: 118 and 33 (plain cut: 111 and 66). The gain is largest on text of the
  calibration's kind, and from a narrow corpus there may be none elsewhere.
* with positions relative and a tenth of the mean energy on top: 107 and 32.5. What decides is what 4 bits
  make of it, in KL to the float model, head included: 1.11 before and 0.20 now, calibrated; 2.13 and 0.96,
  rounded alone, where the plain cut has 0.84.

Memory is bounded by one layer, k x k sums of one linear and the hidden states [N, T, D] at a few borders,
whatever the depth. Arithmetic is float32 (the equations: float64) whatever the stored dtype; W' is rounded to
that dtype once, and what later layers see is the rounded weight.
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
from nirvana_deploy.model.checkpoint import config_json
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import SafetensorsWeights, check_weights
from nirvana_deploy.prune.least_squares import NormalEquations, Refit
from nirvana_deploy.prune.plan import PrunePlan, check_plan_fits
from nirvana_deploy.prune.saliency.units import Kept, kept_positions
from nirvana_deploy.prune.streaming.loading import Runs, home
from nirvana_deploy.prune.streaming.model import DEFAULT_MICRO_BATCH, streamed_model

DEFAULT_RIDGE = 1.0
"""Share of each input's own energy; see above."""


@dataclass(frozen=True)
class Reconstruction:
    """What refitting made of a plan."""

    ridge: float
    tokens: int
    explained_share: dict[str, float]
    """Tensor name -> how much of what was missing behind it is back, on the calibration text."""


_TINY = 1e-12


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
    """Refit what ``plan`` leaves of every o and down on windows [N, T]; write them to the folder ``out``.

    ``out`` gets one safetensors file per layer, [D, k] tensors in their stored dtype under their names in
    the checkpoint: what ``slice_checkpoint`` takes in place of the plain cut. It appears whole or not at all.
    ``micro_batch`` is in sequences. Raises NirvanaError for a plan that does not fit, for fewer tokens than
    the widest linear has inputs, and for activations that are not finite.
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

        def visit(
            positions: Sequence[int], layer: nn.Module, dense: Runs, made: Runs
        ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            readers = list(_readers(shape, positions, layer, kept))
            wanted, leaving = _dense_states(readers, dense)
            written = {}
            for reader, states in zip(readers, wanted, strict=True):
                refit = _refitted(reader, made, states, ridge)
                stored = refit.weight.to(weights.dtype(reader.name))
                _zero_but(reader, stored.float())
                written[reader.name], explained[reader.name] = (
                    stored.contiguous(),
                    refit.explained_share,
                )
            with disk_errors(out):
                save_file(written, folder / f"layer-{min(positions):05}.safetensors")
            advance(len(positions))
            return leaving, [home(run()) for run in made]

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


@dataclass(frozen=True)
class _Reader:
    """A linear that reads units, and writes what it makes of them into the hidden states."""

    name: str
    """Of its weight in the checkpoint."""
    linear: nn.Linear
    norm: nn.Module
    """Reads the hidden states that the linear adds to."""
    kept: torch.Tensor
    """Its inputs that stay; int64 [k]."""


def _readers(
    shape: ModelShape, positions: Sequence[int], layer: nn.Module, kept: Mapping[str, Kept]
) -> Iterator[_Reader]:
    """Those of one layer in the order in which they run: all attentions stand before the FFN."""
    places = [shape.place(position) for position in positions]
    modules = [(prefix, site.o, site.input_norm) for site, prefix in places]
    modules += [(prefix, site.ffn_down, site.ffn_norm) for site, prefix in places if site.ffn_norm]
    for prefix, module, norm in modules:
        linear, name = layer.get_submodule(module), f"{prefix}.{module}.weight"
        assert isinstance(linear, nn.Linear)
        yield _Reader(name, linear, layer.get_submodule(norm), kept[name].positions)


def _dense_states(
    readers: Sequence[_Reader], runs: Runs
) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """(the hidden states after each reader, what leaves the layer), per micro-batch, before any change."""
    entering: list[list[torch.Tensor]] = [[] for _ in readers]
    with ExitStack() as hooks:
        for reader, states in zip(readers, entering, strict=True):
            hooks.enter_context(_shown(reader.norm, partial(_append_home, states)))
        leaving = [home(run()) for run in runs]
    return [*entering[1:], leaving], leaving


def _append_home(states: list[torch.Tensor], more: torch.Tensor) -> None:
    states.append(home(more))


def _refitted(reader: _Reader, runs: Runs, wanted: Sequence[torch.Tensor], ridge: float) -> Refit:
    """Run the layer up to a reader, batch by batch, and fit what stays of it to the ``wanted`` states.

    Every position counts relative to the size of its state, which is how the norm behind sees it.
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
    """Run the layer as far as a reader: (the hidden states [n, T, D] it adds to, its inputs [n, T, C])."""
    seen: list[torch.Tensor] = []

    def last(inputs: torch.Tensor) -> None:
        seen.append(inputs)
        raise _Seen

    with _shown(reader.norm, seen.append), _shown(reader.linear, last), suppress(_Seen):
        run()
    entered, inputs = seen
    return entered, inputs


@contextmanager
def _shown(module: nn.Module, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """While the block runs, show what ``module`` is about to read to ``see``."""

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
