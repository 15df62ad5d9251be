"""How fast a variant could be: the work that no implementation can leave out. Pure arithmetic.

Decode of a small batch is bound by memory: a step reads the weights of decoder linears and head once, and
the KV cache of its context. Prefill is bound by arithmetic: the products with these weights, and attention
over the causal half of all token pairs. An encoder-decoder reads its prompt with the encoder, over all pairs,
and decodes with its own and the cross cache. Dense work over pruned work bounds the speed-up; work over what
the machine reaches bounds the time (``roofline/``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nirvana_deploy.export.footprint import Footprint

Rows = Literal["new", "last", "prompt"]
"""How many rows a product has per sequence: tokens that are read, one, or those of an encoder's prompt."""


@dataclass(frozen=True)
class Product:
    """Activations times a stored matrix."""

    rows: Rows
    weights: int
    """K N."""
    arithmetic: str
    """What is multiplied: "float32", "float16", "bfloat16" or "integer"."""


@dataclass(frozen=True)
class Mixing:
    """One attention: queries times keys, and shares times values."""

    queries: Rows
    keys: Rows
    """``prompt``: all keys of the prompt are seen; else those up to the query's own."""
    width: int
    """H d."""
    arithmetic: str


@dataclass(frozen=True)
class Phase:
    """Work of one pass: a prefill, or a decode step."""

    weight_bytes: float
    """Stored weights, scales included, each read once."""
    cache_read_bytes: float
    cache_written_bytes: float
    logits_bytes: float
    """Written."""
    operations: Mapping[str, float]
    """Multiplications and additions, by what is multiplied."""

    @property
    def read_bytes(self) -> float:
        """Weights and cache."""
        return self.weight_bytes + self.cache_read_bytes

    @property
    def moved_bytes(self) -> float:
        """All that passes between memory and processor at least."""
        return self.read_bytes + self.cache_written_bytes + self.logits_bytes

    @property
    def all_operations(self) -> float:
        """Of every kind."""
        return sum(self.operations.values())


@dataclass(frozen=True)
class Work:
    """Work of a model, as ``roofline/graph.py`` counts it in its ONNX files."""

    linear_parameters: int
    """Weights of all linears but the head."""
    footprint: Footprint
    products: tuple[Product, ...]
    mixings: tuple[Mixing, ...]
    logit_bytes: int
    """V times the size of a logit."""
    encoder_decoder: bool = False
    rewrites_cache: bool = False
    """Every step writes the whole cache anew, as a graph that concatenates it does."""

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes that one written token of one sequence adds to the KV cache."""
        return self.footprint.kv_cache_bytes_per_token

    def prefill(self, *, prompt_tokens: int, batch_size: int = 1) -> Phase:
        """Read ``batch_size`` prompts; of an encoder-decoder, also the decoder's start token."""
        new = 1 if self.encoder_decoder else prompt_tokens
        counts: dict[Rows, int] = {"new": new, "last": 1, "prompt": prompt_tokens}
        cross = self.footprint.cross_cache_bytes_per_token
        return Phase(
            weight_bytes=self.footprint.weight_bytes_per_step + self.footprint.weight_bytes_once,
            cache_read_bytes=0.0,
            cache_written_bytes=batch_size * (new * self.kv_cache_bytes_per_token + prompt_tokens * cross),
            logits_bytes=batch_size * self._logit_rows(counts) * self.logit_bytes,
            operations=self._operations(counts, past=0.0, batch_size=batch_size),
        )

    def decode(self, *, context_tokens: float, prompt_tokens: int = 0, batch_size: int = 1) -> Phase:
        """One step of ``batch_size`` sequences with ``context_tokens`` each, the new one included.

        ``prompt_tokens`` are what an encoder has read.
        """
        own, cross = self.kv_cache_bytes_per_token, self.footprint.cross_cache_bytes_per_token
        counts: dict[Rows, int] = {"new": 1, "last": 1, "prompt": prompt_tokens}
        return Phase(
            weight_bytes=self.footprint.weight_bytes_per_step,
            cache_read_bytes=batch_size * (context_tokens * own + prompt_tokens * cross),
            cache_written_bytes=batch_size * own * (context_tokens if self.rewrites_cache else 1),
            logits_bytes=batch_size * self._logit_rows(counts) * self.logit_bytes,
            operations=self._operations(counts, past=context_tokens - 1, batch_size=batch_size, read=True),
        )

    def mean_decode(self, *, prompt_tokens: int, new_tokens: int, batch_size: int = 1) -> Phase:
        """:meth:`decode` on average over the steps of a request."""
        decoder_prompt = 1 if self.encoder_decoder else prompt_tokens
        context_tokens = mean_context_tokens(prompt_tokens=decoder_prompt, new_tokens=new_tokens)
        return self.decode(context_tokens=context_tokens, prompt_tokens=prompt_tokens, batch_size=batch_size)

    def _logit_rows(self, counts: Mapping[Rows, int]) -> int:
        """The head is the last product of a graph."""
        return counts[self.products[-1].rows] if self.products else 1

    def _operations(
        self, counts: Mapping[Rows, int], *, past: float, batch_size: int, read: bool = False
    ) -> dict[str, float]:
        """By arithmetic; ``read`` says that an encoder has read the prompt before."""
        found: defaultdict[str, float] = defaultdict(float)
        for product in self.products:
            if not (read and product.rows == "prompt"):
                found[product.arithmetic] += 2 * product.weights * counts[product.rows]
        for mixing in self.mixings:
            if read and mixing.queries == "prompt":
                continue
            queries = counts[mixing.queries]
            seen = counts["prompt"] if mixing.keys == "prompt" else past + (queries + 1) / 2
            found[mixing.arithmetic] += 4 * mixing.width * queries * seen
        return {name: batch_size * count for name, count in found.items()}


def mean_context_tokens(*, prompt_tokens: int, new_tokens: int) -> float:
    """Mean context of the decode steps for ``new_tokens``; prefill makes the first one."""
    return prompt_tokens + new_tokens / 2
