"""T5 and Flan-T5: an encoder, and a decoder whose blocks attend to it, with relative position biases.

The bias of a stack is computed in its first layer for all heads of the dense model; a layer that lost heads
reads the rows of its own. So config.json of a pruned model names the heads that each layer kept
(``pruned_layers``), and even equal widths have no stock config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.model.family import DECODER, Family, Site, Stack
from nirvana_deploy.model.shape import LayerShape, ModelShape, positive

ENCODER = "encoder"
CROSS = "cross"
"""The decoder's cross-attentions, which have no FFN of their own."""


def _resolve(config: Mapping[str, Any]) -> Family:
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated-")
    return GATED_T5 if gated else T5


def _read_shape(config: Mapping[str, Any], family: Family) -> ModelShape:
    heads, width, depth = (positive(config, key) for key in ("num_heads", "d_ff", "num_layers"))
    decoder_depth = config.get("num_decoder_layers") or depth
    pruned = config.get("pruned_layers")
    layers = []
    for site in family.sites:
        dense: dict[str, Any] = {"kept_heads": range(heads), "d_ff": width if site.ffn_rows else 0}
        for index in range(depth if site.name == ENCODER else decoder_depth):
            layer = pruned[site.name][index] if pruned else dense
            kept = len(layer["kept_heads"])
            layers.append(LayerShape(kept, kept, ffn_width=layer["d_ff"], site=site.name))
    # transformers 5 writes tie_word_embeddings true for every T5; the scale tells which kind it was
    tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    return ModelShape(
        family=family,
        hidden_size=positive(config, "d_model"),
        vocab_size=positive(config, "vocab_size"),
        head_dim=positive(config, "d_kv"),
        layers=tuple(layers),
        tied_embeddings=bool(tied),
        attention_bias=False,
        output_bias=False,
        ffn_bias=False,
        position_bias=(config.get("relative_attention_num_buckets", 32), heads),
    )


def _no_stock_config(config: dict[str, Any], smaller: ModelShape) -> None:
    return None


def _site(name: str, stack: str, place: int, attention: str, **ffn: Any) -> Site:
    """The site of a stack whose attention is sublayer ``place`` of each block."""
    at = f"layer.{place}"
    return Site(
        name=name,
        prefix=f"{stack}.block.{{layer}}",
        input_norm=f"{at}.layer_norm",
        q=f"{at}.{attention}.q",
        k=f"{at}.{attention}.k",
        v=f"{at}.{attention}.v",
        o=f"{at}.{attention}.o",
        **ffn,
    )


def _t5(*rows: str) -> Family:
    """T5 with the FFN linears ``rows``: ``wi``, or ``wi_0`` and ``wi_1`` when it is gated."""

    def ffn(place: int) -> dict[str, Any]:
        dense = f"layer.{place}.DenseReluDense"
        return {
            "ffn_norm": f"layer.{place}.layer_norm",
            "ffn_rows": tuple(f"{dense}.{row}" for row in rows),
            "ffn_down": f"{dense}.wo",
            "position_bias": "layer.0.SelfAttention.relative_attention_bias",
        }

    encoder = Stack(
        name=ENCODER,
        sites=(_site(ENCODER, ENCODER, 0, "SelfAttention", **ffn(1)),),
        final_norm="encoder.final_layer_norm",
        causal=False,
    )
    decoder = Stack(
        name=DECODER,
        sites=(
            _site(DECODER, DECODER, 0, "SelfAttention", **ffn(2)),
            _site(CROSS, DECODER, 1, "EncDecAttention", ffn_norm=None, ffn_rows=()),
        ),
        final_norm="decoder.final_layer_norm",
        context=ENCODER,
    )
    return Family(
        name="t5",
        architecture="T5ForConditionalGeneration",
        resolve=_resolve,
        read_shape=_read_shape,
        stock_config=_no_stock_config,
        auto_class="AutoModelForSeq2SeqLM",
        other_architectures=("T5WithLMHeadModel",),
        stacks=(encoder, decoder),
        embedding="shared",
        embedding_copies=("encoder.embed_tokens", "decoder.embed_tokens"),
        unused=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    )


T5 = _t5("wi")
GATED_T5 = _t5("wi_0", "wi_1")
