"""What every exported graph is made of: inputs, weights, linears, norms, outputs.

Dimension letters as in ``model/shape.py``; B sequences of a batch, S past plus new tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript import GraphBuilder, OpBuilder

from nirvana_deploy.export.dtypes import Dtype
from nirvana_deploy.export.streaming import Parameter, as_array

OPSET = 23
IR_VERSION = 10  # the newest that every consumer reads
PRODUCER = "nirvana-deploy"
_CONTRIB = "com.microsoft"
_FLOAT32 = int(ir.DataType.FLOAT)


class GraphParts:
    """One graph while it is being built."""

    def __init__(
        self, name: str, *, opset: int, dtype: Dtype, norm_epsilon: float, parameter: Parameter
    ) -> None:
        graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name=name)
        self.builder = GraphBuilder(graph)
        self.op: OpBuilder = self.builder.op
        self.dtype = dtype
        self._norm_epsilon = norm_epsilon
        self._parameter = parameter
        self._outputs: list[tuple[ir.Value, str, list[int | str]]] = []

    def finish(self, metadata: dict[str, str]) -> ir.Model:
        """The model with its outputs in place."""
        graph = self.builder.graph
        for value, name, dimensions in self._outputs:
            value.name, value.shape, value.dtype = name, ir.Shape(dimensions), self.dtype.ir
            graph.outputs.append(value)
        return ir.Model(graph, ir_version=IR_VERSION, producer_name=PRODUCER, metadata_props=dict(metadata))

    def contrib(self) -> OpBuilder:
        """The operators of ONNX Runtime's own domain; from now on the graph imports it."""
        self.builder.graph.opset_imports[_CONTRIB] = 1
        return self.builder.opset(_CONTRIB, 1)

    def ids(self, name: str, dimensions: list[int | str]) -> ir.Value:
        """An int64 graph input."""
        return self.builder.input(name, ir.DataType.INT64, dimensions)

    def activations(self, name: str, dimensions: list[int | str]) -> ir.Value:
        """A graph input of the graph's dtype."""
        return self.builder.input(name, self.dtype.ir, dimensions)

    def add_output(
        self, value: ir.Value, name: str, dimensions: list[int | str], *, first: bool = False
    ) -> None:
        """Make ``value`` a graph output; consumers expect ``logits`` before the caches."""
        self._outputs.insert(0 if first else len(self._outputs), (value, name, dimensions))

    def weight(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> ir.Value:
        """An initializer named as in the checkpoint, whose bytes are read when the file is written."""
        return self._initializer(self._parameter(name, shape, transposed), shape)

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """A small initializer of the array's own type."""
        return self._initializer(ir.Tensor(array, name=name), array.shape)

    def table(
        self, name: str, shape: tuple[int, ...], compute: Callable[[], NDArray[np.generic]]
    ) -> ir.Value:
        """An initializer of the graph's dtype that is computed when the file is written."""
        tensor = ir.LazyTensor(
            lambda: ir.Tensor(compute(), name=name), dtype=self.dtype.ir, shape=ir.Shape(shape), name=name
        )
        return self._initializer(tensor, shape)

    def linear(self, x: ir.Value, module: str, inputs: int, outputs: int, *, bias: bool) -> ir.Value:
        """x W^T (+ b); the weight is stored as [inputs, outputs], so that no runtime transposes it."""
        y = self.op.MatMul(x, self.weight(f"{module}.weight", (inputs, outputs), transposed=True))
        return self.op.Add(y, self.weight(f"{module}.bias", (outputs,))) if bias else y

    def norm(self, x: ir.Value, module: str, width: int) -> ir.Value:
        """RMS norm over the last dimension, ``width``; the mean of squares is taken in float32."""
        scale = self.weight(f"{module}.weight", (width,))
        return self.op.RMSNormalization(x, scale, axis=-1, epsilon=self._norm_epsilon, stash_type=_FLOAT32)

    def fused_add_and_norm(
        self, x: ir.Value, y: ir.Value, module: str, width: int
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of x + y, x + y) in one operator of ONNX Runtime, which accumulates in float32 too."""
        scale = self.weight(f"{module}.weight", (width,))
        normed, _, _, total = self.contrib().SkipSimplifiedLayerNormalization(
            x, y, scale, epsilon=self._norm_epsilon, _outputs=4
        )
        return normed, total

    def scaled(self, x: ir.Value, factor: float) -> ir.Value:
        """x times a number of the graph's dtype; x itself when that is 1."""
        if factor == 1:
            return x
        name = f"scale.{factor:.9g}"
        number = self.builder.graph.initializers.get(name)
        if number is None:
            number = self.constant(name, as_array(torch.tensor([factor], dtype=self.dtype.torch)))
        return self.op.Mul(x, number)

    def cast(self, x: ir.Value) -> ir.Value:
        """float32 to the graph's dtype."""
        return self.op.Cast(x, to=self.dtype.ir) if self.dtype.half_precision else x

    def _initializer(self, tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> ir.Value:
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape))
        value.const_value = tensor
        self.builder.graph.register_initializer(value)
        return value
