"""Score every unit of a model with one streamed backward pass.

Memory is bounded by one layer and the hidden states at layer borders, not by the model: the forward
pass keeps the [N, T, D] states that enter each layer; the backward pass walks the layers from last to
first, loads one, recomputes it, propagates the gradient, reduces ``|w * dw|`` to unit scores and frees it.
That costs one more forward (4/3 of the work of a plain backward) and is the only path: a model that
fits in memory is the special case.

f is a mean over sequences, so the gradients of micro-batches add up to the gradient of the whole batch:
the micro-batch size changes memory and nothing else. Arithmetic is float32 whatever the stored dtype;
sums over a unit are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.model.checkpoint import config_json, meta_model, read_config
from nirvana_deploy.model.shape import ModelShape, shape_from_config
from nirvana_deploy.model.weights import SafetensorsWeights, WeightSource, check_weights
from nirvana_deploy.progress import SILENT, Progress
from nirvana_deploy.prune.features import FeatureScore, FeatureStatistics, merged, statistics_of
from nirvana_deploy.prune.saliency import SALIENCIES, Functional, saliency_named
from nirvana_deploy.prune.score_seq2seq import StreamedEncoderDecoder
from nirvana_deploy.prune.units import UnitScores, WindowScores, scored_tensors, unit_sums

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
    progress: Progress = SILENT,
) -> UnitScores:
    """Score the KV groups and FFN neurons of a checkpoint folder.

    ``tokens`` [N, T] are the calibration windows (None for saliencies that need no data), ``seed`` serves
    ``random`` alone, ``micro_batch`` is in sequences. Raises NirvanaError for NaN or infinite weights or
    gradients, naming the tensor or the layer.
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
        if method.functional is not None:
            stream = StreamedEncoderDecoder if shape.family.encoder_decoder else StreamedModel
            return stream(checkpoint, weights, shape).gradient_scores(
                windows, method.functional, micro_batch=micro_batch, progress=progress
            )
        assert method.features is not None
        return StreamedModel(checkpoint, weights, shape).feature_scores(
            windows, method.features, micro_batch=micro_batch, progress=progress
        )
    if method.reads_weights:
        return _magnitudes(weights, shape, progress)
    generator = np.random.default_rng(seed)
    return UnitScores(
        groups=tuple(generator.random(layer.kv_heads) for layer in shape.layers),
        neurons=tuple(generator.random(layer.ffn_width) for layer in shape.layers),
    )


def micro_batches(tokens: torch.Tensor, sequences: int) -> list[torch.Tensor]:
    """``tokens`` [N, T] as views [n, T] of at most ``sequences``."""
    return [tokens[start : start + sequences] for start in range(0, len(tokens), sequences)]


def score_windows(
    checkpoint: Path,
    tokens: NDArray[np.int64],
    *,
    saliency: str = "nirvana",
    progress: Progress = SILENT,
) -> WindowScores:
    """Score every window of ``tokens`` [N, T] on its own, with a gradient saliency.

    A set of windows is then scored by a mean (:meth:`WindowScores.of`): ``mean |w * g_n|`` instead of
    ``|w * mean g_n|``, so gradients of opposite sign no longer cancel. Raises NirvanaError for a saliency
    that takes no gradient.
    """
    functional = saliency_named(saliency).functional
    if functional is None:
        names = ", ".join(name for name, method in SALIENCIES.items() if method.functional)
        raise NirvanaError(f"Windows are scored one by one with {names}; got {saliency!r}.")
    shape = shape_from_config(config_json(checkpoint))
    weights = SafetensorsWeights(checkpoint)
    check_weights(weights, shape)
    streamed = StreamedModel(checkpoint, weights, shape)
    return streamed.window_scores(torch.from_numpy(tokens), functional, progress=progress)


class StreamedModel:
    """A decoder of which one part at a time has weights; the rest lives on torch's meta device."""

    def __init__(self, checkpoint: Path, weights: WeightSource, shape: ModelShape) -> None:
        if shape.family.encoder_decoder:
            raise NirvanaError(f"This needs a decoder-only model; {shape.family.name} is an encoder-decoder.")
        config = read_config(checkpoint)
        self._model = meta_model(config)
        self._weights = weights
        self._shape = shape
        decoder = self._model.model
        self._layers: list[nn.Module] = list(decoder.layers)
        self._rotary: nn.Module = type(decoder.rotary_emb)(
            config
        )  # a real one: its frequencies are no weights

    def gradient_scores(
        self, tokens: torch.Tensor, functional: Functional, *, micro_batch: int, progress: Progress = SILENT
    ) -> UnitScores:
        """``|w * df/dw|`` summed over every unit, for tokens [N, T]; f is averaged over the N sequences."""
        batches = micro_batches(tokens, micro_batch)
        layers = self._backwards(batches, functional, together=True, reduced=self._reduced, progress=progress)
        return UnitScores(
            groups=tuple(groups for [(groups, _)] in layers),
            neurons=tuple(neurons for [(_, neurons)] in layers),
        )

    def window_scores(
        self, tokens: torch.Tensor, functional: Functional, *, progress: Progress = SILENT
    ) -> WindowScores:
        """``|w * df_n/dw|`` summed over every unit, for each window n of tokens [N, T] on its own."""
        batches = micro_batches(tokens, 1)
        layers = self._backwards(
            batches, functional, together=False, reduced=self._reduced, progress=progress
        )
        return WindowScores(
            groups=tuple(np.stack([groups for groups, _ in rows]) for rows in layers),
            neurons=tuple(np.stack([neurons for _, neurons in rows]) for rows in layers),
        )

    def visit_window_gradients(
        self, tokens: torch.Tensor, functional: Functional, visit: Visit, *, progress: Progress = SILENT
    ) -> None:
        """Call ``visit`` with df_n/dw of one layer for each window n of tokens [N, T] in turn, then with the
        layer before it: from the last layer to the first, N calls each.
        """
        batches = micro_batches(tokens, 1)

        def visited(index: int, layer: nn.Module) -> None:
            visit(index, self._taken_gradients(index, layer))

        self._backwards(batches, functional, together=False, reduced=visited, progress=progress)

    def _backwards(
        self,
        batches: Sequence[torch.Tensor],
        functional: Functional,
        *,
        together: bool,
        reduced: Callable[[int, nn.Module], _Row],
        progress: Progress,
    ) -> list[list[_Row]]:
        """Per layer what ``reduced`` makes of its gradients, which it must use up: one row for the mean of f
        over all sequences ``together``, else one per batch, each f averaged over that batch.
        """
        borders, scored = [], []
        sequences = sum(len(batch) for batch in batches)
        label = f"Scoring {sequences} x {batches[0].shape[1]} tokens"
        with progress.task(label, (2 * len(self._layers) + 1) * len(batches)) as advance:
            hidden = self._embedded(batches)
            for index in range(len(self._layers)):
                borders.append(hidden)
                with self._loaded_layer(index) as layer, torch.no_grad():
                    hidden = [self._run(layer, states) for states in hidden]
                advance(len(batches))
            gradients = self._output_gradients(hidden, batches, functional, together=together)
            advance(len(batches))
            for index in reversed(range(len(self._layers))):
                with self._loaded_layer(index) as layer:
                    rows, passed_on = [], []
                    for states, gradient in zip(borders.pop(), gradients, strict=True):
                        passed_on.append(self._backward(layer, states, gradient))
                        if not together:
                            rows.append(reduced(index, layer))
                    gradients = passed_on
                    scored.append(rows or [reduced(index, layer)])
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
            hidden = self._embedded(batches)
            for index, dimensions in enumerate(self._shape.layers):
                with self._loaded_layer(index) as layer:
                    seen: dict[str, FeatureStatistics] = {}
                    with recorded_inputs(layer, (family.decoder.o, family.decoder.ffn_down), seen):
                        hidden = [self._run(layer, states) for states in hidden]
                    output = layer.get_parameter(f"{family.decoder.o}.weight")
                    down = layer.get_parameter(f"{family.decoder.ffn_down}.weight")
                    groups.append(score(output, seen[family.decoder.o], dimensions.kv_heads, True).numpy())
                    neurons.append(
                        score(down, seen[family.decoder.ffn_down], dimensions.ffn_width, False).numpy()
                    )
                if not (np.isfinite(groups[-1]).all() and np.isfinite(neurons[-1]).all()):
                    raise NirvanaError(
                        f"Layer {index}: the activations are NaN or infinite; its units cannot be ranked."
                    )
                advance(1)
        return UnitScores(groups=tuple(groups), neurons=tuple(neurons))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [N, T, V] of tokens [N, T], one layer in memory at a time."""
        [states] = self.last_states((tokens,))
        return self.output_head()(states)

    def last_states(
        self, batches: Sequence[torch.Tensor], *, progress: Progress = SILENT
    ) -> list[torch.Tensor]:
        """What leaves the last layer, [n, T, D] for each of ``batches`` [n, T]; each layer is loaded once."""
        with progress.task("Running layers", len(self._layers)) as advance, torch.no_grad():
            hidden = self._embedded(batches)
            for index in range(len(self._layers)):
                with self._loaded_layer(index) as layer:
                    hidden = [self._run(layer, states) for states in hidden]
                advance(1)
        return hidden

    def output_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What turns states that left the last layer [..., D] into logits [..., V]; loaded once."""
        norm, head = self._output_weights()
        return lambda states: self._logits(states, norm, head)

    def _embedded(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        embedding = self._float32(f"{self._shape.family.embedding}.weight")
        return [nn.functional.embedding(batch, embedding) for batch in batches]

    def _run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """One layer over unpadded windows: causal attention, positions from 0."""
        positions = torch.arange(hidden.shape[1])[None]
        angles = self._rotary(hidden, positions)
        output: torch.Tensor = layer(
            hidden, attention_mask=None, position_ids=positions, position_embeddings=angles, use_cache=False
        )
        return output

    def _output_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        family = self._shape.family
        head = family.embedding if self._shape.tied_embeddings else family.head
        return self._float32(f"{family.final_norm}.weight"), self._float32(f"{head}.weight")

    def _logits(self, hidden: torch.Tensor, norm: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        epsilon = self._model.config.rms_norm_eps
        return nn.functional.rms_norm(hidden, norm.shape, norm, epsilon) @ head.T

    def _output_gradients(
        self,
        hidden: list[torch.Tensor],
        batches: Sequence[torch.Tensor],
        functional: Functional,
        *,
        together: bool,
    ) -> list[torch.Tensor]:
        """df/dhidden per micro-batch, [n, T, D] each."""
        norm, head = self._output_weights()
        sequences = sum(len(batch) for batch in batches)
        gradients = []
        for states, batch in zip(hidden, batches, strict=True):
            leaf = states.detach().requires_grad_()
            value = functional(self._logits(leaf, norm, head), batch)
            (gradient,) = torch.autograd.grad(value / (sequences if together else len(batch)), leaf)
            gradients.append(gradient)
        return gradients

    def _backward(self, layer: nn.Module, states: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Accumulate weight gradients in ``layer`` and return the gradient of its input."""
        leaf = states.requires_grad_()
        torch.autograd.backward(self._run(layer, leaf), gradient)
        assert leaf.grad is not None
        return leaf.grad

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

    def _loaded_layer(self, index: int) -> _LoadedLayer:
        return _LoadedLayer(self._layers[index], self._layer_tensors(index))

    def _layer_tensors(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        prefix = self._shape.family.layer(index) + "."
        for name in self._layers[index].state_dict():
            yield name, self._float32(prefix + name)

    def _float32(self, name: str) -> torch.Tensor:
        return self._weights.load(name).to(torch.float32)


class _LoadedLayer:
    """Context in which one layer has its weights; outside it they take no memory."""

    def __init__(self, layer: nn.Module, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._layer = layer
        self._tensors = tensors

    def __enter__(self) -> nn.Module:
        self._layer.load_state_dict(dict(self._tensors), assign=True)
        return self._layer

    def __exit__(self, *exception: object) -> None:
        self._layer.to("meta")
        self._layer.zero_grad(set_to_none=True)


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
