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


def write_tiny_decoder(
    folder: Path, *, seed: int = 0, cache_dtype: int = TensorProto.FLOAT, static_heads: bool = True
) -> Path:
    """Write ``folder``/model.onnx with model.onnx.data; returns ``folder``."""
    weights = {**tiny_weights(seed), "head": tiny_weights(seed)["embedding"].T.copy()}
    nodes: list[onnx.NodeProto] = []
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "two": np.array([2]),
        "zero_scalar": np.array(0),
        "one_scalar": np.array(1),
    }

    def op(kind: str, *inputs: str, to: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [to], name=to, **attributes))
        return to

    op("Shape", "attention_mask", to="total_1d", start=1, end=2)
    op("Squeeze", "total_1d", to="total")
    op("Shape", "input_ids", to="new_1d", start=1, end=2)
    op("Squeeze", "new_1d", to="new")
    op("Sub", "total", "new", to="past")
    op("Range", "zero_scalar", "total", "one_scalar", to="key_index")
    op("Range", "past", "total", "one_scalar", to="query_index")
    op("Unsqueeze", "query_index", "one", to="query_column")
    op("LessOrEqual", "key_index", "query_column", to="causal")
    op("Cast", "attention_mask", to="real", **{"to": TensorProto.BOOL}) if False else nodes.append(
        helper.make_node("Cast", ["attention_mask"], ["real"], to=TensorProto.BOOL)
    )
    return folder
