"""How fast a variant could be: the work that no implementation can leave out. Pure arithmetic.

Decode of a small batch is bound by memory: a token reads the weights of decoder linears and head once, and
the KV cache of its context. Prefill is bound by arithmetic: the products with these weights, and attention
over the causal half of all token pairs. An encoder-decoder reads its prompt with the encoder, over all pairs,
and decodes with its own and the cross cache. Dense work over pruned work bounds the speed-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nirvana_deploy.export.footprint import Footprint
from nirvana_deploy.model.family import DECODER
from nirvana_deploy.model.shape import ModelShape


class Work(Protocol):
    """Work of one request: bytes read and operations."""

    @property
    def linear_parameters(self) -> int:
        """Weights of all linears but the head."""
        ...

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes that one written token of one sequence adds to the KV cache."""
        ...

    def mean_decode_bytes(self, *, prompt_tokens: int, new_tokens: int, batch_size: int) -> float:
        """Bytes read by one decode step, on average over those of a request."""
        ...

    def prefill_flops(self, *, prompt_tokens: int, batch_size: int) -> float:
        """Floating-point operations ahead of the first token."""
        ...


@dataclass(frozen=True)
class DecoderWork:
    """Work of a decoder, from its shape."""

    linear_parameters: int
    """Weights of all decoder linears."""
    head_parameters: int
    """V D: weights read by the head per token, tied or not."""
    attention_width: int
    """Sum of H d over the layers."""
    kv_cache_bytes_per_token: int
    """Bytes that one token of one sequence adds to the KV cache."""
    weight_bytes_per_step: float
    """Bytes of linears and head as stored, scales included."""

    def decode_bytes(self, *, context_tokens: float, batch_size: int = 1) -> float:
        """Bytes read by one decode step of ``batch_size`` sequences with ``context_tokens`` each."""
        return self.weight_bytes_per_step + batch_size * context_tokens * self.kv_cache_bytes_per_token

    def mean_decode_bytes(self, *, prompt_tokens: int, new_tokens: int, batch_size: int = 1) -> float:
        """:meth:`decode_bytes` on average over the decode steps of a request."""
        context_tokens = mean_context_tokens(prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        return self.decode_bytes(context_tokens=context_tokens, batch_size=batch_size)

    def prefill_flops(self, *, prompt_tokens: int, batch_size: int = 1) -> float:
        """Floating-point operations of reading ``batch_size`` prompts, with logits at every position."""
        products = 2 * (self.linear_parameters + self.head_parameters) * prompt_tokens
        causal_pairs = prompt_tokens * (prompt_tokens + 1) / 2
        return batch_size * (products + 4 * self.attention_width * causal_pairs)


@dataclass(frozen=True)
class EncoderDecoderWork:
    """Work of an encoder-decoder, from its shape."""

    encoder_parameters: int
    """Weights of the encoder's linears and of the projections to cross keys and values."""
    decoder_parameters: int
    """Weights of the linears on the path of a decoder token."""
    head_parameters: int
    """V D."""
    encoder_width: int
    """Sum of H d over the encoder's layers."""
    cross_width: int
    """Sum of H d over the cross-attentions."""
    kv_cache_bytes_per_token: int
    """Bytes that one decoder token of one sequence adds to the KV cache."""
    cross_cache_bytes_per_token: int
    """Bytes of cross keys and values per prompt token of one sequence."""
    weight_bytes_per_step: float
    """Bytes of decoder linears and head as stored."""

    @property
    def linear_parameters(self) -> int:
        """Weights of all linears but the head."""
        return self.encoder_parameters + self.decoder_parameters

    def mean_decode_bytes(self, *, prompt_tokens: int, new_tokens: int, batch_size: int = 1) -> float:
        """Bytes read by one decode step; the decoder's context is the start token and the new ones."""
        context_tokens = mean_context_tokens(prompt_tokens=1, new_tokens=new_tokens)
        caches = (
            context_tokens * self.kv_cache_bytes_per_token + prompt_tokens * self.cross_cache_bytes_per_token
        )
        return self.weight_bytes_per_step + batch_size * caches

    def prefill_flops(self, *, prompt_tokens: int, batch_size: int = 1) -> float:
        """Floating-point operations of reading ``batch_size`` prompts and one decoder step behind them."""
        products = 2 * self.encoder_parameters * prompt_tokens
        products += 2 * (self.decoder_parameters + self.head_parameters)
        attention = 4 * (self.encoder_width * prompt_tokens**2 + self.cross_width * prompt_tokens)
        return float(batch_size * (products + attention))


def work_of(shape: ModelShape, footprint: Footprint) -> Work:
    """Return the work of a model: operations from its shape, bytes from its ONNX file."""
    head = shape.vocab_size * shape.hidden_size
    if not shape.family.encoder_decoder:
        return DecoderWork(
            linear_parameters=shape.linear_parameters,
            head_parameters=head,
            attention_width=_attention_width(shape, DECODER),
            kv_cache_bytes_per_token=footprint.kv_cache_bytes_per_token,
            weight_bytes_per_step=footprint.weight_bytes_per_step,
        )
    cross_heads = sum(layer.kv_heads for layer in shape.layers if layer.site == "cross")
    encoder = shape.site_parameters("encoder") + 2 * cross_heads * shape.head_dim * shape.hidden_size
    return EncoderDecoderWork(
        encoder_parameters=encoder,
        decoder_parameters=shape.linear_parameters - encoder,
        head_parameters=head,
        encoder_width=_attention_width(shape, "encoder"),
        cross_width=_attention_width(shape, "cross"),
        kv_cache_bytes_per_token=footprint.kv_cache_bytes_per_token,
        cross_cache_bytes_per_token=footprint.cross_cache_bytes_per_token,
        weight_bytes_per_step=footprint.weight_bytes_per_step,
    )


def _attention_width(shape: ModelShape, site: str) -> int:
    return sum(layer.query_heads for layer in shape.layers if layer.site == site) * shape.head_dim


def mean_context_tokens(*, prompt_tokens: int, new_tokens: int) -> float:
    """Mean context of the decode steps for ``new_tokens``; prefill makes the first one."""
    return prompt_tokens + new_tokens / 2
