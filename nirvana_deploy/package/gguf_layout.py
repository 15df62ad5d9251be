"""How llama.cpp wants a decoder laid out: its architecture, its metadata and its tensors, as data.

Most of llama.cpp's graphs read one head count for all layers (``Family.gguf``). Two read the counts of every
layer: ``deci`` (Nemotron's pruned Llamas: q, k, v apart, adjacent rotary pairs, optional biases) and
``openelm`` (q, k, v in one tensor, head norms, tied embeddings: what Qwen3 computes). Adjacent rotary pairs
rotate elements 2j and 2j + 1 of a head, where a checkpoint rotates j and j + d/2, so the rows of q and k are
reordered [llama.cpp, conversion of Llama].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.families import FAMILIES
from nirvana_deploy.model.families.decoder_only import ONNX_HINT, require_no_window
from nirvana_deploy.model.family import Computation, GgufArchitecture
from nirvana_deploy.model.shape import LayerShape, ModelShape
from nirvana_deploy.model.weights import WeightSource

_DECI = GgufArchitecture("deci", per_layer=True, pairs_adjacent=True, rope_factors=True)
_OPENELM = GgufArchitecture("openelm", per_layer=True, fused_qkv=True)
_UNIFORM_HINT = "Prune with --allocation uniform: layers of one shape have an architecture of their own."


def architecture_for(shape: ModelShape, computation: Computation | None) -> GgufArchitecture:
    """The architecture that computes a decoder; raises NirvanaError where llama.cpp has none."""
    family, uniform = shape.family, shape.family.gguf
    if uniform is None and computation is not None:
        raise NirvanaError(f"A {family.name} is not written as GGUF here.", hint=ONNX_HINT)
    if uniform is None:
        decoders = ", ".join(f.architecture.removesuffix("ForCausalLM") for f in FAMILIES.values() if f.gguf)
        raise NirvanaError(
            f"An encoder-decoder ({family.name}) cannot be written as GGUF: the decoders of llama.cpp that "
            "read the shape of every layer have no encoder.",
            hint=f"nirvana-deploy package takes decoders: {decoders}.",
        )
    square = shape.layers[0].query_heads * shape.head_dim == shape.hidden_size
    if len(set(shape.layers)) == 1 and (square or not uniform.square_queries):
        return uniform
    if len(set(shape.layers)) == 1 and uniform.settings is not None:
        raise NirvanaError(
            f"llama.cpp's {uniform.name} has as many query rows as the model is wide, {shape.hidden_size}; "
            f"this one has {shape.layers[0].query_heads * shape.head_dim}.",
            hint=ONNX_HINT,
        )
    if uniform.settings is not None:
        raise NirvanaError(
            f"llama.cpp has no architecture for a {family.name} whose layers differ.", hint=_UNIFORM_HINT
        )
    if family.decoder.q_norm is None:
        return _DECI
    if not shape.tied_embeddings or shape.attention_bias:
        kind = "an untied head" if not shape.tied_embeddings else "attention biases"
        raise NirvanaError(
            f"llama.cpp has no architecture for a {family.name} whose layers differ and that has {kind}: "
            "'openelm', its only one with head norms and a shape for every layer, has none.",
            hint=_UNIFORM_HINT,
        )
    return _OPENELM


def settings_of(
    architecture: GgufArchitecture, config: PreTrainedConfig, computation: Computation
) -> dict[str, Any]:
    """Metadata of what is computed besides Llama's arithmetic; raises NirvanaError for what has none."""
    if architecture.settings is not None:
        return architecture.settings(config, computation)
    require_no_window(architecture.name, config, computation)
    return {}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: where its rows come from."""

    name: str
    shape: tuple[int, ...]
    """[rows, columns] of a linear, [elements] of a norm or bias."""
    read: Callable[[], torch.Tensor]

    @property
    def is_matrix(self) -> bool:
        """Whether the weight type concerns it; norms and biases stay float32."""
        return len(self.shape) == 2


def gguf_tensors(
    architecture: GgufArchitecture,
    shape: ModelShape,
    weights: WeightSource,
    *,
    rope_factors: torch.Tensor | None,
) -> list[GgufTensor]:
    """All tensors in the order of the file, not yet read; ``rope_factors`` [d/2] are those of ``rope_of``."""
    family, d = shape.family, shape.head_dim

    def plain(name: str, source: str) -> GgufTensor:
        return GgufTensor(name, weights.shape(source), lambda: weights.load(source))

    def rotated(name: str, source: str) -> GgufTensor:
        if not architecture.pairs_adjacent:
            return plain(name, source)
        return GgufTensor(name, weights.shape(source), lambda: pairs_adjacent(weights.load(source), d))

    tensors = [plain("token_embd.weight", f"{family.embedding}.weight")]
    if rope_factors is not None:
        tensors.append(GgufTensor("rope_freqs.weight", tuple(rope_factors.shape), lambda: rope_factors))
    for position in range(len(shape.layers)):
        site, prefix = shape.place(position)
        block = f"blk.{position}"
        linears: list[tuple[str, str, Callable[[str, str], GgufTensor]]] = [
            ("attn_q", site.q, rotated),
            ("attn_k", site.k, rotated),
            ("attn_v", site.v, plain),
        ]
        if architecture.fused_qkv:
            parts = [f"{prefix}.{module}.weight" for module in (site.q, site.k, site.v)]
            tensors.append(_stacked(f"{block}.attn_qkv.weight", parts, weights))
            linears = []
        linears.append(("attn_output", site.o, plain))
        gate, up = site.ffn_rows
        linears += [("ffn_gate", gate, plain), ("ffn_up", up, plain), ("ffn_down", site.ffn_down, plain)]
        for name, module, tensor in linears:
            tensors.append(tensor(f"{block}.{name}.weight", f"{prefix}.{module}.weight"))
            if f"{prefix}.{module}.bias" in weights.names():
                tensors.append(tensor(f"{block}.{name}.bias", f"{prefix}.{module}.bias"))
        norms = {
            "attn_norm": site.input_norm,
            "post_attention_norm": site.attention_post_norm,
            "post_ffw_norm": site.ffn_post_norm,
            "ffn_norm": site.ffn_norm,
            "attn_q_norm": site.q_norm,
            "attn_k_norm": site.k_norm,
        }
        tensors += [
            plain(f"{block}.{name}.weight", f"{prefix}.{norm}.weight") for name, norm in norms.items() if norm
        ]
    tensors.append(plain("output_norm.weight", f"{family.final_norm}.weight"))
    if not shape.tied_embeddings:
        tensors.append(plain("output.weight", f"{family.head}.weight"))
    return tensors


def _stacked(name: str, sources: list[str], weights: WeightSource) -> GgufTensor:
    shapes = [weights.shape(source) for source in sources]
    rows = sum(shape[0] for shape in shapes)
    return GgufTensor(
        name, (rows, *shapes[0][1:]), lambda: torch.cat([weights.load(source) for source in sources])
    )


def pairs_adjacent(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [H d, ...] of q or k (weight or bias), reordered within each head: 0, d/2, 1, d/2 + 1, ..."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def metadata(architecture: GgufArchitecture, shape: ModelShape, config: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters under llama.cpp's keys, without the architecture's name before them."""
    per_layer: dict[str, Callable[[LayerShape], int]] = {
        "attention.head_count": lambda layer: layer.query_heads,
        "attention.head_count_kv": lambda layer: layer.kv_heads,
        "feed_forward_length": lambda layer: layer.ffn_width,
    }
    values: dict[str, Any] = {
        key: [of(layer) for layer in shape.layers] if architecture.per_layer else of(shape.layers[0])
        for key, of in per_layer.items()
    }
    return values | {
        "vocab_size": shape.vocab_size,
        "context_length": config["max_position_embeddings"],
        "embedding_length": shape.hidden_size,
        "block_count": len(shape.layers),
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
    }


@dataclass(frozen=True)
class Rope:
    """The rotary embedding in llama.cpp's words."""

    metadata: dict[str, Any]
    factors: torch.Tensor | None
    """[d/2] float32: what the frequencies are divided by; None when they are the plain ones."""


def rope_of(
    architecture: GgufArchitecture, parameters: dict[str, Any], frequencies: torch.Tensor, scaling: float
) -> Rope:
    """The rotary embedding of a config's ``rope_parameters``, whose frequencies [d/2] transformers computed.

    ``scaling`` is transformers' factor on cosine and sine. Any frequencies can be said as divisors of the
    plain ones; an architecture that reads no divisors takes plain and linearly scaled ones only. Raises
    NirvanaError for the rest (yarn scales attention too, by a rule of llama.cpp's own).
    """
    theta = float(parameters["rope_theta"])
    found: dict[str, Any] = {"rope.freq_base": theta, "rope.dimension_count": 2 * len(frequencies)}
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return Rope(found, None)
    if kind == "linear":
        scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
        return Rope(found | scaled, None)
    if scaling != 1.0 or not architecture.rope_factors:
        raise NirvanaError(
            f"A {kind} rotary embedding cannot be said to llama.cpp's architecture {architecture.name!r}.",
            hint=ONNX_HINT,
        )
    count = len(frequencies)
    plain = theta ** -(torch.arange(count, dtype=torch.float64) / count)
    return Rope(found, (plain / frequencies.double()).float())
