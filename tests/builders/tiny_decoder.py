"""A two-layer attention-only decoder as an ONNX folder, and the same decoder in numpy: the oracle.

Layers differ in KV heads (1 and 2), as pruned models do; hidden width D = 8, head_dim d = 4, V = 11.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

KV_HEADS = (1, 2)
HEAD_DIM = 4
HIDDEN = 8
VOCAB = 11
MAX_POSITION = 64
_TOKEN_INPUTS = {"input_ids": "T", "attention_mask": "total_tokens", "position_ids": "T"}


def tiny_weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Embedding [V, D], positions [P, D] and, per layer, q, k, v [D, K d] and o [K d, D]."""
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> NDArray[np.float32]:
        return rng.normal(size=shape).astype(np.float32)

    weights = {"embedding": random(VOCAB, HIDDEN), "positions": random(MAX_POSITION, HIDDEN)}
    for layer, heads in enumerate(KV_HEADS):
        for name in "qkv":
            weights[f"{name}.{layer}"] = random(HIDDEN, heads * HEAD_DIM)
        weights[f"o.{layer}"] = random(heads * HEAD_DIM, HIDDEN)
    return weights


def numpy_logits(weights: dict[str, NDArray[np.float32]], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits [T, V] of one unpadded prompt [T], in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    count = len(tokens)
    x = w["embedding"][tokens] + w["positions"][:count]
    for layer, heads in enumerate(KV_HEADS):
        q, k, v = (
            (x @ w[f"{name}.{layer}"]).reshape(count, heads, HEAD_DIM).transpose(1, 0, 2) for name in "qkv"
        )
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(HEAD_DIM)
        scores[:, np.triu(np.ones((count, count), dtype=bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (shares / shares.sum(axis=-1, keepdims=True)) @ v
        x = x + mixed.transpose(1, 0, 2).reshape(count, -1) @ w[f"o.{layer}"]
    return x @ w["embedding"].T


def write_tiny_decoder(folder: Path, *, seed: int = 0, static_heads: bool = True) -> Path:
    """Write ``folder``/model.onnx with its model.onnx.data; returns ``folder``."""
    constants: dict[str, NDArray[np.generic]] = {
        **tiny_weights(seed),
        "head": tiny_weights(seed)["embedding"].T.copy(),
        "zero": np.array(0),
        "one": np.array(1),
        "axis_1": np.array([1]),
        "axes_1_2": np.array([1, 2]),
    }
    nodes: list[onnx.NodeProto] = []

    def op(kind: str, *inputs: str, out: str, **attributes: object) -> None:
        nodes.append(helper.make_node(kind, list(inputs), [out], name=out, **attributes))

    op("Shape", "attention_mask", out="total_1d", start=1, end=2)
    op("Shape", "input_ids", out="new_1d", start=1, end=2)
    op("Squeeze", "total_1d", out="total")
    op("Squeeze", "new_1d", out="new")
    op("Sub", "total", "new", out="past")
    op("Range", "zero", "total", "one", out="key_index")
    op("Range", "past", "total", "one", out="query_index")
    op("Unsqueeze", "query_index", "axis_1", out="query_column")
    op("LessOrEqual", "key_index", "query_column", out="causal")
    op("Cast", "attention_mask", out="real", to=TensorProto.BOOL)
    op("Unsqueeze", "real", "axes_1_2", out="real_keys")
    op("And", "causal", "real_keys", out="mask")
    op("Gather", "embedding", "input_ids", out="embedded")
    op("Gather", "positions", "position_ids", out="placed")
    op("Add", "embedded", "placed", out="x.0")
    inputs = [_value(name, TensorProto.INT64, ["N", axis]) for name, axis in _TOKEN_INPUTS.items()]
    outputs = [_value("logits", TensorProto.FLOAT, ["N", "T", VOCAB])]
    for layer, heads in enumerate(KV_HEADS):
        constants[f"split.{layer}"] = np.array([0, 0, heads, HEAD_DIM])
        constants[f"join.{layer}"] = np.array([0, 0, heads * HEAD_DIM])
        for name in "qkv":
            op("MatMul", f"x.{layer}", f"{name}.{layer}", out=f"{name}.flat.{layer}")
            op("Reshape", f"{name}.flat.{layer}", f"split.{layer}", out=f"{name}.split.{layer}")
            op("Transpose", f"{name}.split.{layer}", out=f"{name}.heads.{layer}", perm=[0, 2, 1, 3])
        for name, part in (("k", "key"), ("v", "value")):
            past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            op("Concat", past, f"{name}.heads.{layer}", out=present, axis=2)
            kept = heads if static_heads else "K"
            inputs.append(_value(past, TensorProto.FLOAT, ["N", kept, "S", HEAD_DIM]))
            outputs.append(_value(present, TensorProto.FLOAT, ["N", kept, "total_tokens", HEAD_DIM]))
        present_pair = (f"present.{layer}.key", f"present.{layer}.value")
        op("Attention", f"q.heads.{layer}", *present_pair, "mask", out=f"mixed.{layer}")
        op("Transpose", f"mixed.{layer}", out=f"mixed.rows.{layer}", perm=[0, 2, 1, 3])
        op("Reshape", f"mixed.rows.{layer}", f"join.{layer}", out=f"joined.{layer}")
        op("MatMul", f"joined.{layer}", f"o.{layer}", out=f"change.{layer}")
        op("Add", f"x.{layer}", f"change.{layer}", out=f"x.{layer + 1}")
    op("MatMul", f"x.{len(KV_HEADS)}", "head", out="logits")
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=128,
    )
    return folder


def _value(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)
