"""What a model family looks like, as data: one table, read by score, slice and export.

A family says which tensors shrink together. A KV group is its K and V rows, the Q rows of its query
heads and those heads' O columns; an FFN neuron is its gate and up rows and its down column. Biases of
rows go with the rows; biases of columns (o, down) belong to the hidden width and stay.

Supported today: Llama and Mistral. Others are refused by name before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nirvana_deploy.errors import NirvanaError


@dataclass(frozen=True)
class Family:
    """Names of the tensors of a decoder-only family, relative to ``layer_prefix`` where they repeat."""

    name: str
    """Family name, which is also ``model_type`` in config.json."""
    architecture: str
    """Class of transformers that computes it."""
    attention_bias: Literal["config", "qkv", "none"] = "config"
    """Whether q, k, v have biases: as ``attention_bias`` in the config says, always, or never."""
    tied_by_default: bool = False
    """``tie_word_embeddings`` when the config is silent."""
    embedding: str = "model.embed_tokens"
    layer_prefix: str = "model.layers.{layer}"
    input_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    ffn_norm: str = "post_attention_layernorm"
    ffn_rows: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Linears whose rows are the neurons."""
    ffn_down: str = "mlp.down_proj"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def layer(self, index: int) -> str:
        """Prefix of layer ``index``, for example ``model.layers.3``."""
        return self.layer_prefix.format(layer=index)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(name="llama", architecture="LlamaForCausalLM"),
        Family(name="mistral", architecture="MistralForCausalLM", attention_bias="none"),
    )
}


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
    refused = {
        "sliding_window": "sliding-window attention",
        "quantization_config": "weights that are already quantized",
        "num_local_experts": "mixture of experts",
        "attention_chunk_size": "chunked attention",
    }
    for key, feature in refused.items():
        if config.get(key):
            raise NirvanaError(f"Unsupported: config.json asks for {feature} ({key} = {config[key]!r}).")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise NirvanaError(f"Unsupported: hidden_act {config['hidden_act']!r}; supported: 'silu'.")
    return FAMILIES[model_type]
