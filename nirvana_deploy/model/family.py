"""What a model family is, as data and a few functions; one file a family lies in ``families/``.

A model is a list of stacks: a stack has blocks, a mask rule and perhaps a context, the stack before it; a
block has sites. A decoder-only model is one stack of blocks with one site each.

A site says which tensors shrink together. A KV group is its K and V rows, the Q rows of its query heads and
those heads' O columns; an FFN neuron is its gate and up rows and its down column. Biases of rows go with the
rows; biases of columns (o, down) belong to the hidden width and stay, like all norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from nirvana_deploy.model.shape import ModelShape

DECODER = "decoder"


@dataclass(frozen=True)
class Site:
    """One attention of a block and the FFN behind it: module names relative to ``prefix``."""

    name: str = DECODER
    prefix: str = "model.layers.{layer}"
    input_norm: str | None = "input_layernorm"
    """RMS norm of the hidden states that q, k and v read; None where they read them as they are."""
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str | None = None
    """RMS norm over head_dim of every query head, ahead of the rotary embedding."""
    k_norm: str | None = None
    norms_all_heads: bool = False
    """These norms are over all heads together: no head can go without a change of the others."""
    attention_post_norm: str | None = None
    """RMS norm of what o gives, ahead of its sum with the hidden states."""
    ffn_norm: str | None = "post_attention_layernorm"
    ffn_rows: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Linears whose rows are the neurons; empty for a site without FFN."""
    ffn_down: str = "mlp.down_proj"
    ffn_post_norm: str | None = None
    """The same of what down gives."""
    fused: tuple[str, ...] = ()
    """Modules whose weight a checkpoint stores as one: the linears above that are named below a module lie in
    it, rows behind rows."""
    position_bias: str | None = None
    """Table [buckets, H] in the first layer that all layers of the site share; it stays whole."""

    def layer(self, index: int) -> str:
        """Prefix of layer ``index``, for example ``model.layers.3``."""
        return self.prefix.format(layer=index)

    def parts(self, module: str) -> tuple[str, ...]:
        """The linears that lie in a ``fused`` module, in order."""
        return tuple(one for one in (self.q, self.k, self.v, *self.ffn_rows) if one.startswith(f"{module}."))


@dataclass(frozen=True)
class Stack:
    """Blocks that one stream of tokens goes through."""

    name: str = DECODER
    sites: tuple[Site, ...] = (Site(),)
    """Sites of each block, in the order of computation; they share a prefix."""
    final_norm: str = "model.norm"
    causal: bool = True
    """A position sees no later one; otherwise it sees all."""
    context: str | None = None
    """Name of the stack whose states the last site of each block attends to, if any."""

    def block(self, index: int) -> str:
        """Module name of block ``index``."""
        return self.sites[0].layer(index)


@dataclass(frozen=True)
class LayerAttention:
    """How one layer of a decoder places tokens, and which it sees."""

    rotary: bool = True
    """Whether queries and keys are rotated by position."""
    kind: str = ""
    """Key of its rotary embedding in ``rope_parameters``; empty where all layers share one."""
    window: int | None = None
    """A query sees so many keys, its own included; None: all before it."""


@dataclass(frozen=True)
class Computation:
    """What a decoder computes between its weights; the defaults are Llama's."""

    layers: tuple[LayerAttention, ...]
    activation: str = "silu"
    """Of the gate: "silu" or "gelu_tanh"."""
    norm_offset: float = 0.0
    """What is added to the weight of a norm as it is stored."""
    embedding_scale: float = 1.0
    """Factor on rows of the embedding."""
    residual_scale: float = 1.0
    """Factor on what an attention or an FFN adds to the hidden states."""
    rotary_share: float = 1.0
    """Share of a head that is rotated, from its first element on."""
    attention_scale: float | None = None
    """Factor on products of queries and keys; None: 1 / sqrt(d)."""
    logits_scale: float = 1.0

    @property
    def rotary_kinds(self) -> tuple[str, ...]:
        """The keys of the rotary embeddings that layers have."""
        return tuple(dict.fromkeys(layer.kind for layer in self.layers if layer.rotary))

    @property
    def widest(self) -> LayerAttention:
        """How the first layer attends that sees all tokens; else the first layer."""
        return next((layer for layer in self.layers if layer.window is None), self.layers[0])


@dataclass(frozen=True)
class GgufArchitecture:
    """One of llama.cpp's graphs."""

    name: str
    per_layer: bool = False
    """Reads head counts and FFN width of every layer."""
    pairs_adjacent: bool = False
    """Rotates elements 2j and 2j + 1 of a head, not j and j + d/2."""
    fused_qkv: bool = False
    rope_factors: bool = False
    """Reads ``rope_freqs.weight``: divisors of the rotary frequencies, one a pair."""
    square_queries: bool = False
    """Wants as many query rows, H d, as the model is wide."""
    settings: Callable[[PreTrainedConfig, Computation], dict[str, Any]] | None = None
    """Metadata, without the architecture's name before the keys, of what it computes besides Llama's
    arithmetic; raises NirvanaError for what it cannot be told. None: it computes that alone."""


@dataclass(frozen=True)
class Family:
    """What the models of a family have in common."""

    name: str
    """Family name, which is also ``model_type`` in config.json."""
    architecture: str
    """Class of transformers that computes it."""
    resolve: Callable[[Mapping[str, Any]], Family]
    """config.json -> this family, or the variant of it that the config asks for.

    Raises NirvanaError for a feature that this project does not handle.
    """
    read_shape: Callable[[Mapping[str, Any], Family], ModelShape]
    """config.json, dense or pruned, and the resolved family -> shape."""
    stock_config: Callable[[dict[str, Any], ModelShape], dict[str, Any] | None]
    """config.json of the dense model and the shape of a smaller one whose layers are all alike -> the
    config.json with which a class of transformers loads it; None when no such class computes it."""
    computation: Callable[[PreTrainedConfig], Computation] | None = None
    """The config as transformers reads it -> what is computed; None for an encoder-decoder."""
    auto_class: str = "AutoModelForCausalLM"
    """Class of transformers that finds it."""
    other_architectures: tuple[str, ...] = ()
    """Older names of ``architecture`` in config.json."""
    stacks: tuple[Stack, ...] = (Stack(),)
    """In the order in which they run; the last one gives logits."""
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    embedding_copies: tuple[str, ...] = ()
    """Modules that some checkpoints store the embedding under once more."""
    unused: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    """Patterns of stored tensors that older versions of transformers wrote and nothing reads."""
    config_name: str | None = None
    """Class of transformers that holds its config, where the architecture does not tell."""
    own_settings: tuple[tuple[str, Any], ...] = ()
    """What config.json must also say when layers differ."""
    genai_type: str | None = None
    """``type`` in genai_config.json; None when onnxruntime-genai does not run the family."""
    gguf: GgufArchitecture | None = None
    """llama.cpp's graph for layers that are all alike; None when llama.cpp has none, or none was shown
    to load what is written for it."""
    tried_on: str = "random"
    """Weights that the whole arrow was tried on: "real" ones, "relabelled" (a real Llama's under this name),
    or "random" alone."""

    def __repr__(self) -> str:
        return f"Family({self.name!r}, {self.architecture})"

    @property
    def sites(self) -> tuple[Site, ...]:
        """All kinds of sites, in the order in which plans list them."""
        return tuple(site for stack in self.stacks for site in stack.sites)

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder reads the input before the decoder writes."""
        return len(self.stacks) > 1

    @property
    def units(self) -> tuple[str, ...]:
        """What can be removed."""
        bound = all(site.norms_all_heads for site in self.sites)
        return ("FFN neurons",) if bound else ("KV groups", "FFN neurons")

    @property
    def writes_text(self) -> bool:
        """Whether it continues a text from nothing, and so can write its own calibration text."""
        return not self.encoder_decoder

    @property
    def shares_position_bias(self) -> bool:
        """Whether layers read the rows of their own heads from a bias of all heads of the dense model."""
        return any(site.position_bias for site in self.sites)

    @property
    def decoder(self) -> Site:
        """The names of a decoder layer."""
        return self.site(DECODER)

    @property
    def final_norm(self) -> str:
        """The norm ahead of the head."""
        return self.stacks[-1].final_norm

    @property
    def config_class(self) -> str:
        """Class of transformers that holds its config."""
        return self.config_name or self.architecture.partition("For")[0] + "Config"

    @property
    def own_architecture(self) -> str:
        """Class of modeling_nirvana.py that computes it when its layers differ."""
        return f"Nirvana{self.architecture}"

    @property
    def own_config_class(self) -> str:
        """Class of modeling_nirvana.py that holds its config when its layers differ."""
        return f"Nirvana{self.config_class}"

    def site(self, name: str) -> Site:
        """The site called ``name``; raises KeyError when the family has none."""
        return {site.name: site for site in self.sites}[name]

    def stack(self, name: str) -> Stack:
        """The stack called ``name``; raises KeyError when the family has none."""
        return {stack.name: stack for stack in self.stacks}[name]

    def layer(self, index: int) -> str:
        """Prefix of decoder layer ``index``, for example ``model.layers.3``."""
        return self.decoder.layer(index)
