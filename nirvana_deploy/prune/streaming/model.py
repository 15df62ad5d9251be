"""Score every unit of a model with one streamed backward pass.

Memory is bounded by one layer with its gradients, not by the model: the forward pass keeps the [N, T, D]
states that enter each layer (``borders.py``: in memory, or on disk when they are many); the backward pass
walks the layers from last to first, loads one, recomputes it, propagates the gradient, reduces ``|w * dw|``
to unit scores and frees it. Embedding and head are read in part (``output.py``).
That costs one more forward (4/3 of the work of a plain backward) and is the only path: a model that
fits in memory is the special case.

f is a mean over sequences, so the gradients of micro-batches add up to the gradient of the whole batch:
the micro-batch size changes memory and nothing else. Arithmetic is float32 whatever the stored dtype;
sums over a unit are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Advance, Progress
from nirvana_deploy.model.checkpoint import config_json, meta_model, read_config
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import RememberedWeights, SafetensorsWeights, WeightSource, check_weights
from nirvana_deploy.prune.saliency.feature import FeatureScore, FeatureStatistics, merged, statistics_of
from nirvana_deploy.prune.saliency.gradient import SALIENCIES, OutputGradient, saliency_named
from nirvana_deploy.prune.saliency.units import UnitScores, WindowScores, scored_tensors, unit_sums
from nirvana_deploy.prune.streaming.encoder_decoder import StreamedEncoderDecoder, View
from nirvana_deploy.prune.streaming.head import embedded, head_blocks, head_name, states_gradient
from nirvana_deploy.prune.streaming.layer_states import Borders
from nirvana_deploy.prune.streaming.loading import (
    CPU,
    LayerVisit,
    compute_device,
    home,
    loaded,
    micro_batches,
)

DEFAULT_MICRO_BATCH = 8
Visit = Callable[[int, dict[str, torch.Tensor]], None]
"""(layer index, df/dw of each of its ``scored_tensors`` by name) -> nothing; the tensors may be kept."""
_UnitSums = tuple[NDArray[np.float64], NDArray[np.float64]]
_Row = TypeVar("_Row")


def score_units(
    checkpoint: Path,
    tokens: NDArray[np.int64] | None,
    *,
    saliency: str = "nirvana",
    seed: int = 0,
    micro_batch: int = DEFAULT_MICRO_BATCH,
    spill: bool | None = None,
    spill_folder: Path | None = None,
    progress: Progress = SILENT,
) -> UnitScores:
    """Score the KV groups and FFN neurons of a checkpoint folder.

    ``tokens`` [N, T] are the calibration windows (None for saliencies that need no data), ``seed`` serves
    ``random`` alone, ``micro_batch`` is in sequences. ``spill`` keeps hidden states in a temporary file of
    ``spill_folder`` [the system's]; None does so when they are large (``borders.py``). It does not change
    the scores. Raises NirvanaError for NaN or infinite weights or gradients, naming the tensor or the layer,
    and for a disk too small for the file.
    """
    method = saliency_named(saliency)
    shape = shape_from_config(config_json(checkpoint))
    weights = SafetensorsWeights(checkpoint)
    check_weights(weights, shape)
    if method.needs_data:
        if tokens is None:
            raise NirvanaError(
                f"The saliency {saliency!r} needs calibration text.", hint="Pass --calib SOURCE."
            )
        windows = torch.from_numpy(tokens)
        if method.output_gradient is not None:
            return streamed_model(checkpoint, weights, shape).gradient_scores(
                windows,
                method.output_gradient,
                micro_batch=micro_batch,
                spill=spill,
                spill_folder=spill_folder,
                progress=progress,
            )
        assert method.features is not None
        return StreamedModel(checkpoint, weights, shape, compute_device()).feature_scores(
            windows, method.features, micro_batch=micro_batch, progress=progress
        )
    if method.reads_weights:
        return _magnitudes(weights, shape, progress)
    generator = np.random.default_rng(seed)
    return UnitScores(
        groups=tuple(generator.random(layer.kv_heads) for layer in shape.layers),
        neurons=tuple(generator.random(layer.ffn_width) for layer in shape.layers),
    )


def streamed_model(
    checkpoint: Path, weights: WeightSource, shape: ModelShape
) -> StreamedModel | StreamedEncoderDecoder:
    """The model, of the kind that its family is, on the GPU where there is one."""
    kind = StreamedEncoderDecoder if shape.family.encoder_decoder else StreamedModel
    return kind(checkpoint, weights, shape, compute_device())


def score_windows(
    checkpoint: Path,
    tokens: NDArray[np.int64],
    *,
    saliency: str = "nirvana",
    spill: bool | None = None,
    spill_folder: Path | None = None,
    progress: Progress = SILENT,
) -> WindowScores:
    """Score every window of ``tokens`` [N, T] on its own, with a gradient saliency.

    A set of windows is then scored by a mean (:meth:`WindowScores.of`): ``mean |w * g_n|`` instead of
    ``|w * mean g_n|``, so gradients of opposite sign no longer cancel. ``spill`` and ``spill_folder`` are
    those of :func:`score_units`. Raises NirvanaError for a saliency that takes no gradient.
    """
    output_gradient = saliency_named(saliency).output_gradient
    if output_gradient is None:
        names = ", ".join(name for name, method in SALIENCIES.items() if method.functional)
        raise NirvanaError(f"Windows are scored one by one with {names}; got {saliency!r}.")
    shape = shape_from_config(config_json(checkpoint))
    weights = SafetensorsWeights(checkpoint)
    check_weights(weights, shape)
    streamed = StreamedModel(checkpoint, weights, shape, compute_device())
    return streamed.window_scores(
        torch.from_numpy(tokens),
        output_gradient,
        spill=spill,
        spill_folder=spill_folder,
        progress=progress,
    )


class StreamedModel:
    """A decoder of which one part at a time has weights; the rest lives on torch's meta device."""

    def __init__(
        self, checkpoint: Path, weights: WeightSource, shape: ModelShape, device: torch.device = CPU
    ) -> None:
        if shape.family.encoder_decoder:
            raise NirvanaError(f"This needs a decoder-only model; {shape.family.name} is an encoder-decoder.")
        config = read_config(checkpoint)
        self._model = meta_model(config)
        self._weights = weights
        self._shape = shape
        self._device = device
        decoder = self._model.model
        self._layers: list[nn.Module] = list(decoder.layers)
        self._rotary: nn.Module = type(decoder.rotary_emb)(
            config
        )  # a real one: its frequencies are no weights

    def gradient_scores(
        self,
        tokens: torch.Tensor,
        output_gradient: OutputGradient,
        *,
        micro_batch: int,
        spill: bool | None = None,
        spill_folder: Path | None = None,
        progress: Progress = SILENT,
    ) -> UnitScores:
        """``|w * df/dw|`` summed over every unit, for tokens [N, T]; f is averaged over the N sequences."""
        batches = micro_batches(tokens, micro_batch)
        with self._borders(batches, spill, spill_folder, progress) as borders:
            layers = self._backwards(
                batches, borders, output_gradient, together=True, reduced=self._reduced, progress=progress
            )
        return UnitScores(
            groups=tuple(groups for [(groups, _)] in layers),
            neurons=tuple(neurons for [(_, neurons)] in layers),
        )

    def window_scores(
        self,
        tokens: torch.Tensor,
        output_gradient: OutputGradient,
        *,
        spill: bool | None = None,
        spill_folder: Path | None = None,
        progress: Progress = SILENT,
    ) -> WindowScores:
        """``|w * df_n/dw|`` summed over every unit, for each window n of tokens [N, T] on its own."""
        batches = micro_batches(tokens, 1)
        with self._borders(batches, spill, spill_folder, progress) as borders:
            layers = self._backwards(
                batches, borders, output_gradient, together=False, reduced=self._reduced, progress=progress
            )
        return WindowScores(
            groups=tuple(np.stack([groups for groups, _ in rows]) for rows in layers),
            neurons=tuple(np.stack([neurons for _, neurons in rows]) for rows in layers),
        )

    def visit_window_gradients(
        self,
        tokens: torch.Tensor,
        output_gradient: OutputGradient,
        visit: Visit,
        *,
        spill: bool | None = None,
        spill_folder: Path | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """Call ``visit`` with df_n/dw of one layer for each window n of tokens [N, T] in turn, then with the
        layer before it: from the last layer to the first, N calls each.
        """
        batches = micro_batches(tokens, 1)

        def visited(index: int, layer: nn.Module) -> None:
            visit(index, self._taken_gradients(index, layer))

        with self._borders(batches, spill, spill_folder, progress) as borders:
            self._backwards(
                batches, borders, output_gradient, together=False, reduced=visited, progress=progress
            )

    def _borders(
        self, batches: Sequence[torch.Tensor], spill: bool | None, folder: Path | None, progress: Progress
    ) -> Borders:
        shapes = [(*batch.shape, self._shape.hidden_size) for batch in batches]
        return Borders(shapes, levels=len(self._layers) + 1, spill=spill, folder=folder, progress=progress)

    def _backwards(
        self,
        batches: Sequence[torch.Tensor],
        borders: Borders,
        output_gradient: OutputGradient,
        *,
        together: bool,
        reduced: Callable[[int, nn.Module], _Row],
        progress: Progress,
    ) -> list[list[_Row]]:
        """Per layer what ``reduced`` makes of its gradients, which it must use up: one row for the mean of f
        over all sequences ``together``, else one per batch, each f averaged over that batch.

        On the way back, gradients take the place of the states that are no longer needed.
        """
        scored, depth = [], len(self._layers)
        sequences = sum(len(batch) for batch in batches)
        label = f"Scoring {sequences} x {batches[0].shape[1]} tokens"
        with progress.task(label, (2 * depth + 1) * len(batches)) as advance:
            for number, states in enumerate(self._embedded(batches)):
                borders[0, number] = states
            for index in range(depth):
                with self._loaded_layer(index) as layer, torch.no_grad():
                    for number in range(len(batches)):
                        borders[index + 1, number] = home(self._run(layer, borders[index, number]))
                advance(len(batches))
            final, head = self._final_norm(), head_blocks(self._weights, self._shape, self._device)
            for number, batch in enumerate(batches):
                gradient = states_gradient(
                    self._away(borders[depth, number]),
                    self._away(batch),
                    final=final,
                    head=head,
                    output_gradient=output_gradient,
                )
                borders[depth, number] = home(gradient / (sequences if together else len(batch)))
                advance(1)
            for index in reversed(range(depth)):
                with self._loaded_layer(index) as layer:
                    rows = []
                    for number in range(len(batches)):
                        borders[index, number] = self._backward(
                            layer, borders[index, number], borders[index + 1, number]
                        )
                        if not together:
                            rows.append(reduced(index, layer))
                    scored.append(rows or [reduced(index, layer)])
                borders.forget(index + 1)
                advance(len(batches))
        return scored[::-1]

    def feature_scores(
        self, tokens: torch.Tensor, score: FeatureScore, *, micro_batch: int, progress: Progress = SILENT
    ) -> UnitScores:
        """Score units by the inputs of o and down over tokens [N, T]: one forward, no gradient."""
        family, batches = self._shape.family, micro_batches(tokens, micro_batch)
        groups, neurons = [], []
        label = f"Scoring {tokens.shape[0]} x {tokens.shape[1]} tokens"
        with progress.task(label, len(self._layers)) as advance, torch.no_grad():
            hidden = list(self._embedded(batches))
            for index, dimensions in enumerate(self._shape.layers):
                with self._loaded_layer(index) as layer:
                    seen: dict[str, FeatureStatistics] = {}
                    with recorded_inputs(layer, (family.decoder.o, family.decoder.ffn_down), seen):
                        hidden = [home(self._run(layer, states)) for states in hidden]
                    output = layer.get_parameter(f"{family.decoder.o}.weight")
                    down = layer.get_parameter(f"{family.decoder.ffn_down}.weight")
                    of_heads, of_ffn = seen[family.decoder.o], seen[family.decoder.ffn_down]
                    groups.append(home(score(output, of_heads, dimensions.kv_heads, True)).numpy())
                    neurons.append(home(score(down, of_ffn, dimensions.ffn_width, False)).numpy())
                if not (np.isfinite(groups[-1]).all() and np.isfinite(neurons[-1]).all()):
                    raise NirvanaError(
                        f"Layer {index}: the activations are NaN or infinite; its units cannot be ranked."
                    )
                advance(1)
        return UnitScores(groups=tuple(groups), neurons=tuple(neurons))

    def transform_layers(self, tokens: torch.Tensor, visit: LayerVisit, *, micro_batch: int) -> None:
        """Run tokens [N, T] through all layers of the dense model and of what ``visit`` makes of it."""
        with torch.no_grad():
            dense = made = list(self._embedded(micro_batches(tokens, micro_batch)))
            for index in range(len(self._layers)):
                with self._loaded_layer(index) as layer:
                    runs = ([partial(self._run, layer, states) for states in some] for some in (dense, made))
                    dense, made = visit((index,), layer, *runs)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [N, T, V] of tokens [N, T], one layer in memory at a time."""
        [states] = self.last_states((tokens,))
        return self.output_head()(states)

    def last_states(
        self, batches: Sequence[torch.Tensor], *, progress: Progress = SILENT
    ) -> list[torch.Tensor]:
        """What leaves the last layer, [n, T, D] for each of ``batches`` [n, T]; each layer is loaded once."""
        with progress.task("Running layers", len(self._layers)) as advance:
            [states] = self.last_states_of([lambda weights: weights], batches, advance=advance)
        return states

    def next_tokens(self, windows: torch.Tensor) -> torch.Tensor:
        """What each position is to predict, for windows [N, T]; what stands at the last one means nothing."""
        return windows.roll(-1, dims=1)

    def last_states_of(
        self, views: Sequence[View], batches: Sequence[torch.Tensor], *, advance: Advance
    ) -> list[list[torch.Tensor]]:
        """:meth:`last_states` of several sliced or masked views; each layer is read once for all of them."""
        remembered = RememberedWeights(self._weights)
        seen = [view(remembered) for view in views]
        with torch.no_grad():
            hidden = [list(self._embedded(batches)) for _ in views]
            for index in range(len(self._layers)):
                for number, weights in enumerate(seen):
                    with self._loaded_layer(index, weights) as layer:
                        hidden[number] = [home(self._run(layer, states)) for states in hidden[number]]
                    advance(1)
                remembered.forget()
        return hidden

    def output_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What turns states that left the last layer [..., D] into logits [..., V]; loaded once."""
        final, head = self._final_norm(), self._float32(head_name(self._shape))
        return lambda states: final(self._away(states)) @ head.T

    def _embedded(self, batches: Sequence[torch.Tensor]) -> Iterable[torch.Tensor]:
        return (embedded(self._weights, self._shape, batch) for batch in batches)

    def _run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """One layer over unpadded windows: causal attention, positions from 0."""
        hidden = self._away(hidden)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        angles = self._rotary(hidden, positions)
        output: torch.Tensor = layer(
            hidden, attention_mask=None, position_ids=positions, position_embeddings=angles, use_cache=False
        )
        return output

    def _final_norm(self) -> Callable[[torch.Tensor], torch.Tensor]:
        norm = self._float32(f"{self._shape.family.final_norm}.weight")
        epsilon = self._model.config.rms_norm_eps
        return lambda states: nn.functional.rms_norm(states, norm.shape, norm, epsilon)

    def _backward(self, layer: nn.Module, states: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Accumulate weight gradients in ``layer`` and return the gradient of its input."""
        leaf = self._away(states).detach().requires_grad_()
        torch.autograd.backward(self._run(layer, leaf), self._away(gradient))
        assert leaf.grad is not None
        return home(leaf.grad)

    def _taken_gradients(self, index: int, layer: nn.Module) -> dict[str, torch.Tensor]:
        """The gradients that ``layer`` has gathered, by checkpoint name; it keeps none."""
        parameters = dict(layer.named_parameters(prefix=self._shape.family.layer(index)))
        gradients = {}
        for name in scored_tensors(self._shape, index):
            gradient = parameters[name].grad
            assert gradient is not None
            gradients[name] = gradient
        layer.zero_grad(set_to_none=True)
        return gradients

    def _reduced(self, index: int, layer: nn.Module) -> _UnitSums:
        """Unit scores from the gradients that ``layer`` has gathered, which are used up."""
        parameters = dict(layer.named_parameters(prefix=self._shape.family.layer(index)))
        scores = {
            name: gradient.mul_(parameters[name].detach()).abs_()
            for name, gradient in self._taken_gradients(index, layer).items()
        }
        groups, neurons = unit_sums(self._shape, index, scores)
        if not (np.isfinite(groups).all() and np.isfinite(neurons).all()):
            raise NirvanaError(
                f"Layer {index}: the gradients are NaN or infinite; its units cannot be ranked."
            )
        return groups, neurons

    def _loaded_layer(
        self, index: int, weights: WeightSource | None = None
    ) -> AbstractContextManager[nn.Module]:
        prefix = self._shape.family.layer(index)
        return loaded(self._layers[index], weights or self._weights, prefix=prefix, device=self._device)

    def _away(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; itself when it is there."""
        return tensor.to(self._device)

    def _float32(self, name: str) -> torch.Tensor:
        return self._weights.load(name).to(self._device, torch.float32)


@contextmanager
def recorded_inputs(
    layer: nn.Module, modules: Sequence[str], seen: dict[str, FeatureStatistics]
) -> Iterator[None]:
    """While the block runs, add the statistics of the inputs of ``modules`` to ``seen`` by name."""

    def recorder(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def record(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            now = statistics_of(inputs[0])
            seen[name] = merged(seen[name], now) if name in seen else now

        return record

    handles = [layer.get_submodule(name).register_forward_pre_hook(recorder(name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _magnitudes(weights: WeightSource, shape: ModelShape, progress: Progress) -> UnitScores:
    groups, neurons = [], []
    with progress.task("Scoring magnitudes", len(shape.layers)) as advance:
        for index in range(len(shape.layers)):
            scores = {name: weights.load(name).float().abs() for name in scored_tensors(shape, index)}
            layer_groups, layer_neurons = unit_sums(shape, index, scores)
            groups.append(layer_groups)
            neurons.append(layer_neurons)
            advance(1)
    return UnitScores(groups=tuple(groups), neurons=tuple(neurons))
