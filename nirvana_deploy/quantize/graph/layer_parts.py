"""A graph cut between hidden states, so that one layer at a time is in memory.

The exporter names what leaves every layer ``hidden_states.<i>``, and quantization keeps these names. A part
starts behind the node that computes such a value and ends with the next one; what layers share (masks, rotary
angles) is computed in each. Of a graph without such names the one part is the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import default_threads
from nirvana_deploy.quantize.graph.files import graph_errors, load_model
from nirvana_deploy.quantize.graph.unpacking import split_parts, unpack

_BOUNDARY = re.compile(r"hidden_states\.\d+")
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

Feeds = Mapping[str, NDArray[Any]]
"""What one prompt gives a graph: ``input_ids`` [1, T], and an encoder's states to a decoder."""
Values = dict[str, list[NDArray[Any]]]
"""Values of the graph by name, one array for each prompt."""


class Cut:
    """Cuts parts out of a graph whose weights stay in their file."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.path, self.threads = path, threads
        self._model = model = _unpacked(path)
        self._producer = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._inputs = {value.name: value for value in model.graph.input}
        self.outputs = tuple(output.name for output in model.graph.output)
        """Of the graph."""
        last = [model.graph.node[i] for name, i in self._producer.items() if _BOUNDARY.fullmatch(name)]
        self.ends = (*(tuple(filter(None, node.output)) for node in last), ())
        """What the last node of each part computes: a hidden state, and its norm where that is fused with it;
        nothing of the last part, which ends with the graph."""

    def number(self, value: str) -> int:
        """Of the part that computes ``value``."""
        return sum(self._producer[value] > self._producer[end[0]] for end in self.ends if end)

    def position(self, value: str) -> int:
        """Where in the graph's order ``value`` is computed."""
        return self._producer[value]

    def of_parts(self, values: Collection[str]) -> list[list[str]]:
        """``values`` by the part that computes them; those that none does are left out."""
        found: list[list[str]] = [[] for _ in self.ends]
        for value in values:
            if value in self._producer:
                found[self.number(value)].append(value)
        return found

    def table_names(self) -> list[str]:
        """Initializers that are looked up in, as an embedding is."""
        read = [node.input[0] for node in self._model.graph.node if node.op_type == "Gather"]
        return [name for name in dict.fromkeys(read) if name in self._initializers]

    def part(self, wanted: Sequence[str], given: Mapping[str, int]) -> onnx.ModelProto:
        """The nodes that compute ``wanted`` from graph inputs and ``given`` values, with their dtypes."""
        nodes, leaves = self._behind(wanted, given)
        inputs = [self._inputs[name] for name in sorted(leaves & self._inputs.keys())]
        inputs += [
            onnx.helper.make_tensor_value_info(name, given[name], None)
            for name in sorted(leaves & given.keys())
        ]
        initializers = [
            tensor for name, tensor in self._initializers.items() if name in leaves and name not in given
        ]
        graph = onnx.helper.make_graph(
            [self._model.graph.node[i] for i in sorted(nodes)],
            "part",
            inputs,
            [onnx.ValueInfoProto(name=name) for name in wanted],
            initializers,
        )
        return onnx.helper.make_model(
            graph, opset_imports=list(self._model.opset_import), ir_version=self._model.ir_version
        )

    def dtype_of(self, initializer: str) -> int:
        """ONNX dtype of an initializer."""
        return int(self._initializers[initializer].data_type)

    def values(
        self, wanted: Sequence[str], known: Values, prompts: Sequence[Feeds], weights: Feeds | None = None
    ) -> Iterator[list[NDArray[Any]]]:
        """The values ``wanted`` of each prompt, from what is ``known`` of it.

        ``weights`` stand in for the initializers of their names.
        """
        weights = weights or {}
        arrays = {name: several[0] for name, several in known.items()} | dict(weights)
        given = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in arrays.items()}
        session = session_of(self.part(wanted, given), self.path.parent, threads=self.threads)
        inputs = session.get_inputs()
        for index, prompt in enumerate(prompts):
            of_prompt = {value: several[index] for value, several in known.items()}
            feeds = prompt_feeds(inputs, {**prompt, **of_prompt, **weights}, where=self.path)
            yield session.run(list(wanted), feeds)

    def run(
        self,
        prompts: Sequence[Feeds],
        wanted: Collection[str],
        *,
        advance: Callable[[int], None] = lambda parts: None,
    ) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """(prompt, values by name) of the values ``wanted``, part by part: all prompts go through one first.

        ``advance`` is told of every part that is done. In memory are the weights of one part, and of every
        prompt the hidden state between two.
        """
        known: Values = {}
        of_parts = self.of_parts(wanted)
        last = max((number for number, names in enumerate(of_parts) if names), default=-1)
        for number, (end, names) in enumerate(zip(self.ends, of_parts, strict=True)):
            if number > last:
                advance(1)
                continue
            leaving: Values = {name: [] for name in end}
            asked = list(dict.fromkeys([*names, *end]))
            for index, found in enumerate(self.values(asked, known, prompts)):
                values = dict(zip(asked, found, strict=True))
                for name in end:
                    leaving[name].append(values[name])
                if names:
                    yield index, {name: values[name] for name in names}
            known = leaving
            advance(1)

    def _behind(self, wanted: Collection[str], given: Collection[str]) -> tuple[set[int], set[str]]:
        """Numbers of the nodes that ``wanted`` need, and the values that these do not compute."""
        nodes: set[int] = set()
        leaves: set[str] = set()
        todo = list(wanted)
        while todo:
            name = todo.pop()
            if name in given or name not in self._producer:
                leaves.add(name)
            elif self._producer[name] not in nodes:
                nodes.add(self._producer[name])
                todo += [source for source in self._model.graph.node[self._producer[name]].input if source]
        return nodes, leaves


def _unpacked(path: Path) -> onnx.ModelProto:
    """The graph as quantization sees it: with one product for each linear."""
    model = load_model(path)
    unpack(model, split_parts)
    with graph_errors(path):
        return ir.to_proto(model)


def prompt_feeds(inputs: Sequence[Any], given: Feeds, *, where: Path) -> dict[str, NDArray[Any]]:
    """All ``inputs`` of a session for prompts ``input_ids`` [B, T] without padding and without a past."""
    tokens = given["input_ids"]
    known: dict[str, NDArray[Any]] = {
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy(),
        "write_indices": np.zeros(len(tokens), dtype=np.int64),
        "use_cache_branch": np.zeros(1, dtype=np.bool_),
        **given,
    }
    feeds: dict[str, NDArray[Any]] = {}
    for node in inputs:
        dtype = _DTYPES.get(node.type)
        if node.name in known:
            array = known[node.name]
            feeds[node.name] = array if dtype is None else array.astype(dtype, copy=False)
        elif node.name.startswith("past_key_values.") and dtype is not None:
            slots = node.shape[2] if isinstance(node.shape[2], int) else 0
            feeds[node.name] = np.zeros((len(tokens), node.shape[1], slots, node.shape[3]), dtype=dtype)
        else:
            raise NirvanaError(
                f"{where} asks for the input {node.name!r} ({node.type}), which this runner does not know.",
                hint="nirvana-deploy export CHECKPOINT --out DIR writes graphs that it knows.",
            )
    return feeds


def session_of(
    model: onnx.ModelProto, folder: Path, *, threads: int | None = None, optimized: Path | None = None
) -> Any:
    """A CPU session of a graph in memory, its external data in ``folder``.

    ``optimized``: also write the graph that ONNX Runtime made of it. Raises NirvanaError when it refuses.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # an output without a declared shape is meant
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.disable_prepacking", "1")  # nothing will be run
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
        )
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        )
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the binding has no common base class for its load errors
        raise NirvanaError(f"ONNX Runtime cannot load the graph of {folder}: {error}") from error
