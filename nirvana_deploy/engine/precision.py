"""Attention layers that a builder has no fused kernel for, and how they are built.

By default the builder fails on such a layer. TensorRT-RTX lacks fused kernels in float32 for T > 1, for
head_dim < 16, for fewer than 4 query heads if the profile fixes T to 1, and for a single query head. These
layers are marked as decomposable (MatMul, Softmax, MatMul); the engine's record names them. All other
precisions stand in the graph: networks are strongly typed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nirvana_deploy.engine.network import AttentionShape
from nirvana_deploy.engine.profile import Profile
from nirvana_deploy.engine.source import OnnxSource

MISSING_KERNEL = "not supported by a dedicated kernel"
"""In the builder's error when an attention is neither fused nor decomposable."""
_LEAST_HEAD_DIM = 16
_LEAST_DECODE_HEADS = 4
_NEW_TOKENS = ("decoder_sequence_length", "sequence_length", "encoder_sequence_length")


def attention_without_kernel(
    source: OnnxSource, attention: Sequence[AttentionShape], profiles: Sequence[Profile]
) -> dict[int, str]:
    """Position of an attention in its network -> why no fused kernel is expected for it."""
    one_token = any(_new_tokens_fixed_to_one(profile) for profile in profiles)
    found = ((index, _reason(source.dtype, one, one_token)) for index, one in enumerate(attention))
    return {index: reason for index, reason in found if reason}


def allow_decomposition(trt: Any, network: Any, positions: Sequence[int] | None) -> int:
    """Mark the attentions at ``positions`` (all, when None) as decomposable; returns how many."""
    boundaries = list(_attention_inputs(trt, network))
    chosen = boundaries if positions is None else [boundaries[position] for position in positions]
    for boundary in chosen:
        boundary.attention.decomposable = True
    return len(chosen)


def notes_on_attention(source: OnnxSource, reasons: dict[int, str], total: int) -> list[str]:
    """What the user of the engine should know about its attention."""
    if source.dtype == "fp32":
        return [
            "The graph computes in fp32: attention is decomposed into MatMul, Softmax and MatMul wherever no "
            "fused kernel exists, which is slower and takes memory quadratic in the prompt; fp16 and bf16 "
            "are fused."
        ]
    by_reason: dict[str, list[int]] = {}
    for position, reason in reasons.items():
        by_reason.setdefault(reason, []).append(position)
    return [
        f"{len(positions)} of {total} attentions may be decomposed ({reason}): layers "
        f"{', '.join(map(str, positions[:8]))}{', ...' if len(positions) > 8 else ''}."
        for reason, positions in by_reason.items()
    ]


def _reason(dtype: str, one: AttentionShape, one_token: bool) -> str | None:
    if dtype == "fp32":
        return "float32"
    if one.head_dim < _LEAST_HEAD_DIM:
        return f"head_dim below {_LEAST_HEAD_DIM}"
    if one.query_heads == 1:
        return "a single query head"
    if one_token and one.query_heads < _LEAST_DECODE_HEADS:
        return f"fewer than {_LEAST_DECODE_HEADS} query heads at one new token"
    return None


def _new_tokens_fixed_to_one(profile: Profile) -> bool:
    name = next((name for name in _NEW_TOKENS if name in profile.sizes), None)
    return name is not None and profile.sizes[name].maximum == 1


def _attention_inputs(trt: Any, network: Any) -> Iterator[Any]:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give it its own type when asked for
            yield layer
