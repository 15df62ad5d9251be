"""Calibrated rounding of a whole graph, layer by layer: each linear sees the inputs it will have.

Calibration windows run through one layer at a time, cut out of the float graph between two hidden states.
Within a layer the linears are taken in groups that read one value (q, k and v; o; gate and up; down), and a
group is rounded before the next one's inputs are computed, so that every group makes up for the rounding
before it. Nothing is computed twice: the inputs of one group are what the next group's are computed from.
In memory are one layer's weights and activations and the X^T X of one group, whatever the depth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.progress import SILENT, Progress
from nirvana_deploy.quantize.linears import Linear, OnnxGraph
from nirvana_deploy.quantize.rounding import RoundedWeight
from nirvana_deploy.quantize.runner import prompt_feeds, session_of

_BOUNDARY = re.compile(r"hidden_states\.\d+")

Prompt = Mapping[str, NDArray[Any]]
"""What one calibration window gives a graph: ``input_ids`` [1, T], and an encoder's states to a decoder."""
Values = dict[str, list[NDArray[Any]]]
"""Values of the graph by name, one array for each prompt."""
Rounding = Callable[[Linear, NDArray[np.float32]], RoundedWeight]
"""(linear, X^T X [K, K] of its inputs) -> its rounded weight."""


def round_layerwise(
    graph: OnnxGraph,
    linears: Sequence[Linear],
    prompts: Sequence[Prompt],
    rounding: Rounding,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[Linear, RoundedWeight]]:
    """Round ``linears`` of the float ``graph``, which must not have been rewritten yet, one after another.

    The others of its linears stay float. Raises NirvanaError naming a linear whose inputs are not finite, or
    zero throughout.
    """
    cut = _Cut(graph.path, threads=threads)
    known: Values = {}
    with progress.task("Rounding layer by layer", len(linears)) as advance:
        for segment in cut.segments(linears):
            weights = {
                str(linear.weight.name): _stored(linear, linear.read_weight()) for linear in segment.linears
            }
            for group in segment.groups:
                x = str(group[0].x.name)
                known[x] = list(cut.values(x, known, weights, prompts))
                hessian = _hessian(group[0], known[x])
                for linear in group:
                    rounded = rounding(linear, hessian)
                    weights[str(linear.weight.name)] = _stored(linear, rounded.dequantized())
                    yield linear, rounded
                    advance(1)
            if segment.end:
                known = {segment.end: list(cut.values(segment.end, known, weights, prompts))}


@dataclass(frozen=True)
class _Segment:
    """The linears between two hidden states."""

    groups: tuple[tuple[Linear, ...], ...]
    """Linears that read the same value together, in the order of the graph."""
    end: str | None
    """The hidden state that leaves; None behind the last one."""

    @property
    def linears(self) -> list[Linear]:
        return [linear for group in self.groups for linear in group]


class _Cut:
    """Cuts parts out of a graph whose weights stay in their file."""

    def __init__(self, path: Path, *, threads: int | None) -> None:
        self._path, self._threads = path, threads
        self._model = model = onnx.load(path, load_external_data=False)
        self._producer = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._inputs = {value.name: value for value in model.graph.input}

    def segments(self, linears: Sequence[Linear]) -> list[_Segment]:
        """``linears`` between the graph's hidden states; all in one segment where it names none."""
        ends = [name for name in self._producer if _BOUNDARY.fullmatch(name)]
        of_segment: list[dict[str, list[Linear]]] = [{} for _ in range(len(ends) + 1)]
        positions = [self._producer[name] for name in ends]
        for linear in sorted(linears, key=lambda linear: self._position(linear)):
            number = sum(self._position(linear) > position for position in positions)
            of_segment[number].setdefault(str(linear.x.name), []).append(linear)
        named = zip(of_segment, [*ends, None], strict=True)
        return [_Segment(tuple(map(tuple, groups.values())), end) for groups, end in named]

    def _position(self, linear: Linear) -> int:
        return self._producer[str(linear.node.outputs[0].name)]

    def values(
        self, name: str, known: Values, weights: Mapping[str, NDArray[Any]], prompts: Sequence[Prompt]
    ) -> Iterator[NDArray[Any]]:
        """The value ``name`` of every prompt, from ``known`` ones and ``weights`` as they are now."""
        given = {value: arrays[0].dtype for value, arrays in known.items()}
        given |= {weight: array.dtype for weight, array in weights.items()}
        session = session_of(self._part(name, given), self._path.parent, threads=self._threads)
        inputs = session.get_inputs()
        for index, prompt in enumerate(prompts):
            of_prompt = {value: arrays[index] for value, arrays in known.items()}
            feeds = prompt_feeds(inputs, {**prompt, **of_prompt, **weights}, where=self._path)
            yield session.run([name], feeds)[0]

    def _part(self, wanted: str, given: Mapping[str, np.dtype[Any]]) -> onnx.ModelProto:
        """The nodes that compute ``wanted`` from the values ``given`` and graph inputs."""
        nodes, leaves = self._behind(wanted, given)
        inputs = [self._inputs[name] for name in sorted(leaves & self._inputs.keys())]
        inputs += [_value(name, given[name]) for name in sorted(leaves & given.keys())]
        initializers = [
            tensor for name, tensor in self._initializers.items() if name in leaves and name not in given
        ]
        graph = onnx.helper.make_graph(
            [self._model.graph.node[i] for i in sorted(nodes)],
            "part",
            inputs,
            [onnx.ValueInfoProto(name=wanted)],
            initializers,
        )
        return onnx.helper.make_model(
            graph, opset_imports=list(self._model.opset_import), ir_version=self._model.ir_version
        )

    def _behind(self, wanted: str, given: Collection[str]) -> tuple[set[int], set[str]]:
        """Numbers of the nodes that ``wanted`` needs, and the values that these do not compute."""
        nodes: set[int] = set()
        leaves: set[str] = set()
        todo = [wanted]
        while todo:
            name = todo.pop()
            if name in given or name not in self._producer:
                leaves.add(name)
            elif self._producer[name] not in nodes:
                nodes.add(self._producer[name])
                todo += [source for source in self._model.graph.node[self._producer[name]].input if source]
        return nodes, leaves


def _hessian(linear: Linear, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """X^T X [K, K] of what ``linear`` reads, over all tokens of all prompts."""
    total = np.zeros((linear.K, linear.K), dtype=np.float32)
    for value in inputs:
        rows = value.reshape(-1, linear.K).astype(np.float32, copy=False)
        total += rows.T @ rows
    energy = total.diagonal()
    if not np.isfinite(energy).all() or not energy.any():
        state = "zero throughout" if np.isfinite(energy).all() else "NaN or infinite"
        raise NirvanaError(
            f"Calibration activations of {linear.name} are {state}; rounding cannot be fitted to them.",
            hint="Check the model and the calibration text, or round without it: --rounding search.",
        )
    return total


def _stored(linear: Linear, weight: NDArray[np.float32]) -> NDArray[Any]:
    """W [K, N] as the graph holds it: in its dtype, [N, K] where a Transpose follows."""
    return np.ascontiguousarray(weight.T if linear.transposed else weight, dtype=linear.dtype.numpy())


def _value(name: str, dtype: np.dtype[Any]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(dtype), None)
