"""How fast a variant could be: the work that no implementation can leave out. Pure arithmetic.

Decode of a small batch is bound by memory: each token reads every weight of the decoder linears and of
the head once, and the KV cache of its context. Prefill is bound by arithmetic: the products with those
weights, and attention over the causal half of all token pairs.

Dense work over pruned work bounds the speed-up of a runtime that is equally efficient on both. Norms,
activations, the embedding row and the runtime's own overhead, which do not shrink alike, are left out.
A measured speed-up can pass the bound by a few percent where smaller matrices fit the caches better.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderWork:
    """What one decoder has to read and multiply, from its shape."""

    linear_parameters: int
    """Weights of all decoder linears."""
    head_parameters: int
    """V D: weights that the head reads per token, also where they are tied to the embedding."""
    attention_width: int
    """Sum of H d over the layers."""
    kv_cache_bytes_per_token: int
    """Bytes that one token of one sequence adds to the KV cache."""
    weight_bytes_per_step: float
    """Bytes of linears and head in the precision that they are stored in, scales included."""

    def decode_bytes(self, *, context_tokens: float, batch_size: int = 1) -> float:
        """Bytes read by one decode step of ``batch_size`` sequences with ``context_tokens`` each."""
        return self.weight_bytes_per_step + batch_size * context_tokens * self.kv_cache_bytes_per_token

    def prefill_flops(self, *, prompt_tokens: int, batch_size: int = 1) -> float:
        """Floating-point operations of reading ``batch_size`` prompts, with logits at every position."""
        products = 2 * (self.linear_parameters + self.head_parameters) * prompt_tokens
        causal_pairs = prompt_tokens * (prompt_tokens + 1) / 2
        return batch_size * (products + 4 * self.attention_width * causal_pairs)


def mean_context_tokens(*, prompt_tokens: int, new_tokens: int) -> float:
    """Mean context of the decode steps that make ``new_tokens``: the first new token comes from prefill."""
    return prompt_tokens + new_tokens / 2
