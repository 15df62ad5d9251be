"""What a model family looks like, as data: one table, read by score, slice and export.

A family says which tensors shrink together. A KV group is its K and V rows, the Q rows of its query
heads and those heads' O columns; an FFN neuron is its gate and up rows and its down column. Biases of
rows go with the rows; biases of columns (o, down) belong to the hidden width and stay.

Norms of the hidden width, and Qwen3's norms of one head, are shared by all units and stay whole.

What is not in the table is refused by name before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nirvana_deploy.base.errors import NirvanaError

DECODER = "decoder"


@dataclass(frozen=True)
class Site:
    """One attention of a layer and the FFN behind it: module names relative to ``prefix``.

    A decoder-only layer is one site. An encoder-decoder has three kinds: the layers of the encoder, those
    of the decoder, and the decoder's cross-attentions, which have no FFN of their own.
    """

    name: str = DECODER
    prefix: str = "model.layers.{layer}"
    input_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str | None = None
    """RMS norm over head_dim of every query head, ahead of the rotary embedding."""
    k_norm: str | None = None
    ffn_norm: str | None = "post_attention_layernorm"
    ffn_rows: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Linears whose rows are the neurons; empty where no FFN follows."""
    ffn_down: str = "mlp.down_proj"
    position_bias: str | None = None
    """Table [buckets, H] in the first layer that all layers of the site share; it stays whole."""

    def layer(self, index: int) -> str:
        """Prefix of layer ``index``, for example ``model.layers.3``."""
        return self.prefix.format(layer=index)


@dataclass(frozen=True)
class Family:
    """What the models of a family have in common."""

    name: str
    """Family name, which is also ``model_type`` in config.json."""
    architecture: str
    """Class of transformers that computes it."""
    auto_class: str = "AutoModelForCausalLM"
    """Class of transformers that finds it."""
    attention_bias: Literal["config", "qkv", "none"] = "config"
    """Whether q, k, v have biases: as ``attention_bias`` in the config says, always, or never."""
    layerwise_window: bool = False
    """A sliding window concerns only some layers, and none unless ``use_sliding_window`` is set."""
    tied_by_default: bool = False
    """``tie_word_embeddings`` when the config is silent."""
    embedding: str = "model.embed_tokens"
    sites: tuple[Site, ...] = (Site(),)
    """All kinds of sites, in the order in which plans list them."""
    encoder_norm: str | None = None
    """Final norm of the encoder, where there is one."""
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder reads the input before the decoder writes."""
        return self.encoder_norm is not None

    @property
    def decoder(self) -> Site:
        """The names of a decoder layer."""
        return self.site(DECODER)

    def site(self, name: str) -> Site:
        """The site called ``name``; raises KeyError when the family has none."""
        return {site.name: site for site in self.sites}[name]

    def layer(self, index: int) -> str:
        """Prefix of decoder layer ``index``, for example ``model.layers.3``."""
        return self.decoder.layer(index)

    @property
    def config_class(self) -> str:
        """Class of transformers that holds its config."""
        return self.architecture.partition("For")[0] + "Config"


def _t5_site(name: str, stack: str, place: int, attention: str, **ffn: Any) -> Site:
    """The site of a T5 stack whose attention is sublayer ``place`` of each block."""
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

    return Family(
        name="t5",
        architecture="T5ForConditionalGeneration",
        auto_class="AutoModelForSeq2SeqLM",
        attention_bias="none",
        tied_by_default=True,
        embedding="shared",
        sites=(
            _t5_site("encoder", "encoder", 0, "SelfAttention", **ffn(1)),
            _t5_site(DECODER, "decoder", 0, "SelfAttention", **ffn(2)),
            _t5_site("cross", "decoder", 1, "EncDecAttention", ffn_norm=None, ffn_rows=()),
        ),
        encoder_norm="encoder.final_layer_norm",
        final_norm="decoder.final_layer_norm",
    )


_MAX_WINDOW_LAYERS = 28
"""Layers before the first one with a sliding window, when the config is silent."""

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(name="llama", architecture="LlamaForCausalLM"),
        Family(name="mistral", architecture="MistralForCausalLM", attention_bias="none"),
        Family(name="qwen2", architecture="Qwen2ForCausalLM", attention_bias="qkv", layerwise_window=True),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            layerwise_window=True,
            sites=(Site(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),),
        ),
        _t5("wi"),
    )
}
_GATED_T5 = _t5("wi_0", "wi_1")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed ``config.json``.

    Raises NirvanaError for an architecture, or for a feature of one, that this project does not handle.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        supported = ", ".join(f"{f.architecture} ({f.name})" for f in FAMILIES.values())
        raise NirvanaError(
            f"Unsupported architecture: model_type {model_type!r}, "
            f"architectures {config.get('architectures')}. "
            f"Supported: {supported}."
        )
    family = FAMILIES[model_type]
    if _has_sliding_layers(config, family):
        raise NirvanaError(
            "Unsupported: config.json asks for sliding-window attention "
            f"(sliding_window = {config.get('sliding_window')!r})."
        )
    refused = {
        "quantization_config": "weights that are already quantized",
        "num_local_experts": "mixture of experts",
        "attention_chunk_size": "chunked attention",
    }
    for key, feature in refused.items():
        if config.get(key):
            raise NirvanaError(f"Unsupported: config.json asks for {feature} ({key} = {config[key]!r}).")
    if family.encoder_decoder:
        gated = str(config.get("feed_forward_proj", "relu")).startswith("gated-")
        return _GATED_T5 if gated else family
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise NirvanaError(f"Unsupported: hidden_act {config['hidden_act']!r}; supported: 'silu'.")
    return family


def _has_sliding_layers(config: Mapping[str, Any], family: Family) -> bool:
    if not family.layerwise_window:
        return bool(config.get("sliding_window"))
    if layer_types := config.get("layer_types"):
        return any(kind != "full_attention" for kind in layer_types)
    first = config.get("max_window_layers", _MAX_WINDOW_LAYERS)
    return bool(config.get("use_sliding_window")) and first < config.get("num_hidden_layers", first + 1)
