"""What each layer and each linear costs: the KL divergence when it alone runs in int8.

One graph with a switch per linear is built: both its float and its int8 form are computed, and a boolean
input says which result goes on. So every question about a subset of the linears is one more prompt, with the
very kernels and folded weights that the quantized folder has, and all of them go through the layers together.
All layers are measured first, then the linears of the worst ones, which is where the worst linears are.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.base.ownership.temporary import scratch_folder
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.model.family import DECODER
from nirvana_deploy.quantize.graph.layer_parts import Feeds
from nirvana_deploy.quantize.graph.layer_runner import Runner
from nirvana_deploy.quantize.graph.linears import Linear, OnnxGraph, open_folder, write_folder
from nirvana_deploy.quantize.int8.rewrite import quantize_linear
from nirvana_deploy.quantize.int8.smooth import apply_folds, find_folds
from nirvana_deploy.quantize.int8.spec import Int8Linear, Int8Spec
from nirvana_deploy.runtime.divergence import Yardstick

_SWITCHES = "quantized_linears"
_WINDOWS, _TOKENS = 2, 64
_SHARE = 0.8
"""Linears are measured in the layers that make up this share of the sum over layers."""


@dataclass(frozen=True)
class Sensitivity:
    """KL(float || a part in int8), nats, worst first."""

    layers: Mapping[str, float]
    """By layer ("3", in an encoder-decoder "encoder 3"; "head"): all of its linears in int8."""
    linears: Mapping[str, float]
    """By module name: that linear alone; those of the worst layers."""

    def to_json(self) -> dict[str, Any]:
        """For quantization.json."""
        return {"layers": dict(self.layers), "linears": dict(self.linears)}


def sensitivity_of(
    folder: Path,
    spec: Int8Spec,
    windows: NDArray[np.int64],
    *,
    at_least: int = 0,
    scratch: Path,
    progress: Progress = SILENT,
) -> Sensitivity:
    """Measure the layers of ``spec`` and the linears of the worst, ``at_least`` so many linears.

    ``folder`` is the float folder; the first 64 tokens of 2 ``windows`` [M, T] are run, once per layer and
    linear measured. The graph with switches lies in ``scratch`` meanwhile: float weights and a quarter more.
    """
    with scratch_folder(scratch) as temporary:
        switched = temporary / "switches"
        order, members = _write_switched(folder, spec, switched)
        runner = Runner(switched)
        few = windows[:_WINDOWS, :_TOKENS]

        def measured(parts: Mapping[str, Sequence[str]], label: str) -> dict[str, float]:
            """All parts in one pass through the layers: each has its own copy of the windows."""
            given = [_positions(order, on) for on in ((), *parts.values()) for _ in few]
            copies = np.concatenate([few] * (1 + len(parts)))
            stream = runner.logits(copies, given=given, label=label, progress=progress)

            def following(some: NDArray[np.int64]) -> Iterable[NDArray[np.float32]]:
                return itertools.islice(stream, len(some))

            yardstick = Yardstick(following, few)
            found = {name: yardstick.divergence(following) for name in parts}
            return dict(sorted(found.items(), key=lambda item: -item[1]))

        layers = measured(members, "Sensitivity of each layer")
        linears = measured(
            {name: (name,) for name in _worth_measuring(layers, members, at_least)},
            "Sensitivity of the worst layers' linears",
        )
    return Sensitivity(layers=layers, linears=linears)


def _worth_measuring(
    layers: Mapping[str, float], members: Mapping[str, Sequence[str]], at_least: int
) -> list[str]:
    """The linears of the worst layers; ``layers`` are sorted."""
    total, sum_so_far = sum(layers.values()), 0.0
    names: list[str] = []
    for layer, kl in layers.items():
        if sum_so_far >= _SHARE * total and len(names) >= at_least:
            break
        sum_so_far += kl
        names += members[layer]
    return names


def _write_switched(
    folder: Path, spec: Int8Spec, out: Path
) -> tuple[dict[str, tuple[str, ...]], dict[str, list[str]]]:
    """Write the graphs with switches; the linears by file, in the order of its switches, and by layer."""
    graphs = open_folder(folder)
    order: dict[str, tuple[str, ...]] = {}
    members: dict[str, list[str]] = {}
    for graph in graphs:
        graph.untie(spec.linears)
        apply_folds(graph, find_folds(graph), spec.smoothing)
        linears = [linear for linear in graph.linears if linear.name in spec.linears]
        switches = ir.Value(
            name=_SWITCHES, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([len(linears)])
        )
        if linears:
            graph.model.graph.inputs.append(switches)
        for index, linear in enumerate(linears):
            _add_switch(graph, linear, spec.linears[linear.name], switches, index)
            members.setdefault(_layer(linear), []).append(linear.name)
        order[graph.path.name] = tuple(linear.name for linear in linears)
    write_folder(folder, out, graphs, label="Writing switches")
    return order, members


def _layer(linear: Linear) -> str:
    """The layer's name in a :class:`Sensitivity`."""
    if linear.layer is None:
        return linear.role
    return str(linear.layer) if linear.site == DECODER else f"{linear.site} {linear.layer}"


def _add_switch(
    graph: OnnxGraph, linear: Linear, decision: Int8Linear, switches: ir.Value, index: int
) -> None:
    name, weight = f"{linear.name}.switch", linear.node.inputs[1]
    assert weight is not None
    at = graph.constant(f"{name}_index", np.array(index, dtype=np.int64))
    on = graph.node("Gather", [switches, at], before=linear.node, name=f"{name}_on", dtype=ir.DataType.BOOL)
    plain = graph.node(
        "MatMul", [linear.x, weight], before=linear.node, name=f"{name}_float", dtype=linear.dtype
    )
    graph.insert_behind(linear, "Where", lambda integer: [on, integer, plain], name=name)
    quantize_linear(graph, linear, decision)


def _positions(order: Mapping[str, Sequence[str]], on: Collection[str]) -> dict[str, Feeds]:
    return {
        file: {_SWITCHES: np.array([name in on for name in names], dtype=np.bool_)}
        for file, names in order.items()
        if names
    }
